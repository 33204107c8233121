"""One update of a video autoencoder, its averaged weights and its discriminators; the state."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.sharding import batch_sharding
from easyanimate_jax.training.optimizer import scale_by_muon
from easyanimate_jax.training.vae.config import VAEStage, VAETrainConfig
from easyanimate_jax.training.vae.crops import pixels
from easyanimate_jax.training.vae.losses import Discriminators, Networks, judge_loss, vae_loss
from easyanimate_jax.weights.module import abstract


class VAEState(NamedTuple):
    """The training state of a video autoencoder."""

    step: jax.Array  # () int32, updates made so far
    networks: Networks
    ema: CausalVAE  # the averaged weights, which are written at the end
    opt_state: optax.OptState
    judges: Discriminators | None  # None if the config never uses them
    judge_opt_state: optax.OptState


def optimizer(config: VAETrainConfig) -> optax.GradientTransformation:
    """Return the optimizer: clipping to norm 1, Adam or Muon, weight decay, cosine schedule.

    With `decoder_only` the weights that make latents are frozen.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, 0.01 * config.learning_rate
    )
    rule = optax.scale_by_adam(*config.betas)
    if config.matrices == "muon":
        rule = optax.partition({"adam": rule, "muon": scale_by_muon(stacked=False)}, labels)
    update = optax.chain(
        rule,
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    whole = optax.chain(optax.clip_by_global_norm(1.0), update)
    if not config.decoder_only:
        return whole
    return optax.partition({"trained": whole, "frozen": optax.set_to_zero()}, parts)


def parts(networks):
    """Return "frozen" for each weight that makes latents, and "trained" for all others."""

    def part(path, _):
        makes_latents = {"encoder", "quant_conv"} & {getattr(key, "name", None) for key in path}
        return "frozen" if makes_latents else "trained"

    return jax.tree_util.tree_map_with_path(part, networks)


def labels(networks):
    """Return the update rule of each weight: "muon" or "adam".

    Muon updates the kernels of convolutions, except the first and last of the VAE and the heads of
    the discriminators.
    """

    def label(path, x):
        outer = {"conv_in", "conv_out", "head"} & {getattr(key, "name", None) for key in path}
        return "muon" if x.ndim > 3 and not outer else "adam"

    return jax.tree_util.tree_map_with_path(label, networks)


def random_key(config: VAETrainConfig) -> jax.Array:
    """Return a key of the "rbg" generator; the default one compiles for seconds per shape."""
    return jax.random.key(config.seed, impl="rbg")


def init_state(config: VAETrainConfig, start: CausalVAE | None = None) -> VAEState:
    """Return the state before the first step, with new weights or those of `start`."""
    rngs = nnx.Rngs(random_key(config))
    vae = CausalVAE(config.vae, rngs=rngs) if start is None else start
    networks = Networks(vae, jnp.zeros(()))
    judges = None if config.discriminator_start is None else Discriminators(rngs=rngs)
    init = optimizer(config).init
    ema = jax.tree.map(jnp.copy, vae)
    step = jnp.zeros((), jnp.int32)
    return VAEState(step, networks, ema, init(networks), judges, init(judges))


def train_step(
    state: VAEState, frames: UInt8[Array, "B F H W 3"], *, config: VAETrainConfig, adversarial: bool
) -> tuple[VAEState, dict[str, Float[Array, ""]]]:
    """Return (state after one update from a global batch of crops, the step's metrics).

    The average's decay warms up as (1 + n) / (10 + n), as the transformer's does.
    """
    video = pixels(frames)
    key = jax.random.fold_in(random_key(config), state.step)
    update = optimizer(config).update
    judges = state.judges if adversarial else None
    (_, (output, metrics)), grads = jax.value_and_grad(vae_loss, has_aux=True)(
        state.networks, judges, video, key, config
    )
    updates, opt_state = update(grads, state.opt_state, state.networks)
    networks = optax.apply_updates(state.networks, updates)
    decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
    # This form keeps the bits of a frozen weight; a * w + (1 - a) * w is not always w.
    ema = jax.tree.map(lambda e, w: e + (1 - decay) * (w - e), state.ema, networks.vae)
    state = state._replace(step=state.step + 1, networks=networks, ema=ema, opt_state=opt_state)
    if adversarial:
        output = jax.lax.stop_gradient(output)
        metrics["judge"], grads = jax.value_and_grad(judge_loss)(judges, video, output)
        updates, opt_state = update(grads, state.judge_opt_state, judges)
        judges = optax.apply_updates(judges, updates)
        state = state._replace(judges=judges, judge_opt_state=opt_state)
    return state, metrics


def first_state(config: VAETrainConfig, mesh: Mesh, start: CausalVAE | None) -> VAEState:
    """Return the result of `init_state`, replicated on every device of `mesh`."""
    make = jax.jit(partial(init_state, config), out_shardings=replicated(mesh))
    return make() if start is None else make(start)


def abstract_state(config: VAETrainConfig, mesh: Mesh, network: VAEConfig) -> VAEState:
    """Return the shapes and shardings of the state of a VAE whose config is `network`."""
    shapes = jax.eval_shape(partial(init_state, config), abstract(CausalVAE, network))
    place = partial(jax.ShapeDtypeStruct, sharding=replicated(mesh))
    return jax.tree.map(lambda x: place(x.shape, x.dtype), shapes)


def compile_step(
    config: VAETrainConfig, mesh: Mesh, state: VAEState, stage: VAEStage, *, adversarial: bool
) -> jax.stages.Compiled:
    """Return `train_step` compiled for a stage's batches; it donates the state."""
    step = partial(train_step, config=config, adversarial=adversarial)
    shape = stage.batch_size, stage.frames, stage.size, stage.size, 3
    frames = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh, len(shape)))
    program = jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))
    return program.lower(state, frames).compile()


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())
