"""The train step as a jitted program: sharded state, sharded batch, donated buffers.

`train.py` runs this program, and the verb `aot` compiles the same one for absent devices.
"""

import dataclasses
import math
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from easyanimate_jax.data.loader import Batch, Group, Worse
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.facts import AUTO, LATENT_CHANNELS, PATCH
from easyanimate_jax.models.layers import matches
from easyanimate_jax.models.lora import LoRAConfig, attach, fill, is_adapter
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.models.storage import Kernels, store
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.sharding import AnyMesh, activation_spec, shardings
from easyanimate_jax.training.optimizer import OptimizerConfig, Rates, make_optimizer
from easyanimate_jax.training.post.distill import guidance_loss, is_guided, segment_loss
from easyanimate_jax.training.post.matching import matching_step
from easyanimate_jax.training.post.nft import nft_loss, sample_groups
from easyanimate_jax.training.post.objectives import (
    DirectPreference,
    Distillation,
    DistributionMatching,
    GuidanceDistillation,
    NegativeAwareFinetuning,
    RewardBackpropagation,
    SegmentDistillation,
)
from easyanimate_jax.training.post.preference import preference_loss
from easyanimate_jax.training.post.reward import reward_loss, reward_weights
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.step import (
    Judge,
    Part,
    TrainState,
    denoising_loss,
    init_state,
    train_step,
)
from easyanimate_jax.weights.folder import vae_config
from easyanimate_jax.weights.module import abstract, named_weights

# Vector memory that one operation may use, by device kind; the default is 16 MiB. v5p and Ironwood
# have 64 MiB per core, v6e has 128 MiB; other trainers for these chips use the same limits. Larger
# tiles make matrix products a sixth faster by the compiler's estimate, and the backward pass of
# Splash needs the memory for its long blocks of keys.
COMPILER_OPTIONS = {
    "TPU v5": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
    "TPU v6 lite": {"xla_tpu_scoped_vmem_limit_kib": "98304"},
    "TPU7x": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
}


class StepConfig(NamedTuple):
    """The settings of a run's train step that do not depend on the stage."""

    model: MMDiTConfig
    optimizer: OptimizerConfig
    process: DDPM | Flow
    ema_decay: float  # 0: no average
    lora: LoRAConfig | None = None  # the adapters to train
    train: Rates = ()  # patterns of the weights to train, and factors of their learning rate
    frozen: Kernels = "float32"  # storage of the kernels that are not trained
    taught: bool = False  # whether a stage has a teacher
    critic: bool = False  # whether a stage has a critic
    reward: tuple[tuple[str, ...], str] | None = None  # rewards with a gradient, and the VAE

    @property
    def exact(self) -> tuple[str, ...]:
        """Return the patterns of the weights of the model itself that are trained."""
        return tuple(pattern for pattern, _ in self.train)

    @property
    def partial(self) -> bool:
        """Return whether only a part of the weights is trained."""
        return bool(self.lora or self.train)

    def with_channels(self, in_channels: int) -> "StepConfig":
        """Return the settings of a model with so many input channels."""
        return self._replace(model=dataclasses.replace(self.model, in_channels=in_channels))


def make_model(config: StepConfig, key: PRNGKeyArray) -> MMDiT:
    """Return a new model; its frozen kernels are stored as `config` says, with adapters beside.

    Raises ValueError for a pattern of `config.train` that no weight matches.
    """
    return with_adapters(make_base(config, key), config, jax.random.fold_in(key, 1))


def make_base(config: StepConfig, key: PRNGKeyArray) -> MMDiT:
    """Return the model of `make_model` without its adapters."""
    made = MMDiT(config.model, rngs=nnx.Rngs(params=key))
    if config.partial:
        _check_patterns(config, made)
        store(made, config.frozen, config.exact)
    return made


def with_adapters(model: MMDiT, config: StepConfig, key: PRNGKeyArray, start=None) -> MMDiT:
    """Return the model, after new adapters were put beside its layers if `config` has any.

    `start` holds the product that they begin with, as `models.lora.fill` takes it.
    """
    if config.lora is not None:
        attach(model, config.lora, key=key)
        fill(model, start or {})
    return model


@cache
def graph_of(config: StepConfig, make=make_model) -> nnx.GraphDef:
    """Return the structure of the model that `make_model` returns."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return nnx.graphdef(jax.eval_shape(partial(make, config), key))


def part_of(config: StepConfig) -> Part | None:
    """Return how the model and its teacher are put together; None if all weights are trained."""
    if not config.partial:
        return None
    frozen = graph_of(config, make_base) if config.taught else None
    return Part(graph_of(config), frozen, config.lora.dropout if config.lora else 0.0)


def make_state(config: StepConfig, key: PRNGKeyArray, make=make_model) -> TrainState:
    """Return the state before the first update; `make(config, key)` returns its model.

    Raises ValueError for a pattern of `config.train` that no weight matches.
    """
    return init_state(
        partial(make, config),
        make_optimizer(config.optimizer, config.train),
        key,
        trained=partial(_is_trained, config) if config.partial else None,
        average=config.ema_decay > 0,
        critic=config.critic,
        teach=partial(_teacher, config) if config.taught and not config.partial else None,
    )


def _teacher(config: StepConfig, model: MMDiT) -> MMDiT:
    """Return a copy of a model whose kernels are stored as `config` says."""
    copy = jax.tree.map(jnp.copy, model)
    store(copy, config.frozen)
    return copy


def _is_trained(config: StepConfig, path: tuple, _) -> bool:
    return is_adapter(path, None) or matches(".".join(map(str, path)), config.exact)


def _check_patterns(config: StepConfig, model: MMDiT) -> None:
    names = sorted(named_weights(model))
    for pattern in config.exact:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(
                f"TrainConfig.train: {pattern!r} matches no weight; the weights are "
                f"{', '.join(names)}"
            )


@cache
def abstract_state(config: StepConfig, mesh: AnyMesh):
    """Return (function key -> state, the state's shardings, the state as placed shapes)."""
    make = partial(make_state, config)
    shapes = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))
    shapes = shapes._replace(judge=abstract_judge(config))
    placed = shardings(mesh, shapes)
    return make, placed, _place(shapes, placed)


def abstract_judge(config: StepConfig) -> Judge | None:
    """Return the shapes of the autoencoder and of the rewards' weights, if the run has a reward.

    An autoencoder that is not there has the released shapes.
    """
    if config.reward is None:
        return None
    names, vae = config.reward
    settings = vae_config(vae) if Path(vae).exists() else VAEConfig()
    weights = {name: jax.eval_shape(partial(reward_weights, name)) for name in names}
    return Judge(abstract(CausalVAE, settings), weights)


def abstract_batch(
    model: MMDiTConfig,
    mesh: AnyMesh,
    *,
    batch_size: int,
    microbatch: int,
    tokens: int,
    text_lengths: tuple[int, ...],
    empty: bool = False,
    pairs: bool = False,
    group: NegativeAwareFinetuning | None = None,
) -> Batch:
    """Return the sharded shapes of a batch as the loader makes it.

    `empty` adds the empty texts, `pairs` the worse clips, and `group` its sampled videos.
    Arrays begin with (microbatches, rows). The last microbatch is padded with rows of weight 0.
    """
    rows = -(-batch_size // microbatch), microbatch
    channels = LATENT_CHANNELS * PATCH**2
    extra = (model.in_channels - LATENT_CHANNELS) * PATCH**2

    def array(*shape: int, dtype=jnp.float16):
        return jax.ShapeDtypeStruct((*rows, *shape), dtype)

    batch = Batch(
        mean=array(tokens, channels),
        logvar=array(tokens, channels),
        grid=array(3, dtype=jnp.int32),
        lengths=array(dtype=jnp.int32),
        texts=tuple(map(array, text_lengths, model.text_widths)),
        condition=array(tokens, extra, dtype=jnp.float32) if extra else None,
        weight=array(dtype=jnp.float32),
    )
    if empty:
        texts = zip(text_lengths, model.text_widths, strict=True)
        shapes = [jax.ShapeDtypeStruct((rows[0], 1, *text), jnp.float16) for text in texts]
        batch = batch._replace(empty=tuple(shapes))
    if pairs:
        batch = batch._replace(worse=Worse(batch.mean, batch.logvar, batch.condition))
    if group is not None:
        batch = batch._replace(group=_abstract_group(rows, channels, group))
    return _place(batch, batch_shardings(mesh, batch))


def _abstract_group(
    rows: tuple[int, int], channels: int, objective: NegativeAwareFinetuning
) -> Group:
    """Return the shapes of the sampled videos of (microbatches, rows)."""
    shape = rows[0], objective.count, rows[1]
    latents = jax.ShapeDtypeStruct((*shape, math.prod(objective.grid), channels), jnp.float32)
    number = jax.ShapeDtypeStruct(shape, jnp.float32)
    rewards = jax.ShapeDtypeStruct((*shape, len(objective.rewards)), jnp.float32)
    return Group(latents, number, rewards)


def microbatch_rows(stage: Stage, mesh: AnyMesh) -> int:
    """Return the rows of a microbatch, padded to a multiple of the devices that shard rows.

    "auto" stands for the whole batch until a run has chosen (training/auto.py).
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = stage.batch_size
    if stage.microbatch not in (None, AUTO):
        rows = min(stage.microbatch, rows)
    return -(-rows // parts) * parts


def batch_shardings(mesh: AnyMesh, batch: Batch) -> Batch:
    """Return the shardings of a batch: rows over `data` and `fsdp`.

    `context` shards rows too if there are enough, and tokens otherwise.
    """

    def place(x, *axes: str | None, lead: int = 1):
        if x is None:
            return None
        rest = (None,) * (x.ndim - lead - 1 - len(axes))
        names = (*(None,) * lead, "batch", *axes, *rest)
        return NamedSharding(mesh, activation_spec(mesh, x.shape, names))

    worse = batch.worse and Worse(*(place(x, "tokens") for x in batch.worse))
    group = batch.group and Group(
        place(batch.group.latents, "tokens", lead=2),
        *(place(x, lead=2) for x in batch.group[1:]),
    )
    return Batch(
        mean=place(batch.mean, "tokens"),
        logvar=place(batch.logvar, "tokens"),
        grid=place(batch.grid),
        lengths=place(batch.lengths),
        texts=tuple(place(text) for text in batch.texts),
        condition=place(batch.condition, "tokens"),
        weight=place(batch.weight),
        empty=None
        if batch.empty is None
        else tuple(NamedSharding(mesh, PartitionSpec()) for _ in batch.empty),
        worse=worse,
        group=group,
    )


LOSSES = {
    GuidanceDistillation: guidance_loss,
    SegmentDistillation: segment_loss,
    DirectPreference: preference_loss,
    RewardBackpropagation: reward_loss,
    NegativeAwareFinetuning: nft_loss,
}


def loss_of(stage: Stage):
    """Return the loss function of a stage, with the arguments of `denoising_loss`."""
    if stage.objective is None:
        return denoising_loss
    return partial(LOSSES[type(stage.objective)], objective=stage.objective)


def reads_empty(stage: Stage) -> bool:
    """Return whether the step of a stage also reads the states of the empty caption."""
    if isinstance(stage.objective, RewardBackpropagation):
        return stage.objective.guidance > 1
    return isinstance(stage.objective, Distillation) and is_guided(stage.objective)


def reads_pairs(stage: Stage) -> bool:
    """Return whether the step of a stage compares the two clips of a pair."""
    return isinstance(stage.objective, DirectPreference)


def samples_groups(stage: Stage) -> NegativeAwareFinetuning | None:
    """Return the objective of a stage whose updates begin with sampled videos, else None."""
    online = isinstance(stage.objective, NegativeAwareFinetuning)
    return stage.objective if online else None


def groups_program(config: StepConfig, mesh: AnyMesh, stage: Stage):
    """Return the jitted sampler of a stage: (state, batch, key) -> (latents, frames)."""
    sample = partial(
        sample_groups,
        process=config.process,
        objective=stage.objective,
        part=part_of(config.with_channels(stage.in_channels)),
    )
    rows = microbatch_rows(stage, mesh)
    shape = -(-stage.batch_size // rows), stage.objective.count, rows
    names = None, None, "batch"
    tokens = math.prod(stage.objective.grid)
    latents = activation_spec(mesh, (*shape, tokens, 1), (*names, "tokens", None))
    frames = activation_spec(mesh, shape, names)
    placed = tuple(NamedSharding(mesh, spec) for spec in (latents, frames))
    return jax.jit(
        sample,
        out_shardings=placed,
        keep_unused=True,  # the optimizer's state is in memory too, so the compiler counts it
        compiler_options=_compiler_options(mesh),
    )


def step_program(config: StepConfig, placed: TrainState, stage: Stage):
    """Return the jitted train step of a stage; it donates the state and keeps its shardings."""
    if isinstance(stage.objective, DistributionMatching):
        update = partial(matching_step, objective=stage.objective)
    else:
        update = partial(train_step, loss=loss_of(stage))
    step = partial(
        update,
        optimizer=make_optimizer(config.optimizer, config.train),
        process=config.process,
        ema_decay=config.ema_decay,
        batch_size=stage.batch_size,
        part=part_of(config.with_channels(stage.in_channels)),
    )
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(placed, placed.step),
        compiler_options=_compiler_options(placed.step.mesh),
    )


def _compiler_options(mesh: AnyMesh) -> dict[str, str] | None:
    return COMPILER_OPTIONS.get(mesh.devices.flat[0].device_kind)


def _place(shapes, placed):
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placed
    )
