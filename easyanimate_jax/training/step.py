"""One optimizer step, accumulated over microbatches, and the training state.

Letters beyond the legend: A microbatches of a global batch, P token width (4 x 16 channels).
Every random draw of a row depends on `fold_in(key, step)` and the row's index in the global batch,
so neither the mesh nor the microbatch size changes the numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.diffusion.losses import masked_squared_error
from easyanimate_jax.facts import PATCH
from easyanimate_jax.models.lora import is_adapter, without_some
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.models.vae import CausalVAE


class TrainState(NamedTuple):
    """The training state: counters, weights, averaged weights and optimizer state.

    A run that trains only a part of the weights has them in two: `model` holds the trained ones,
    such as adapters, `frozen` all others, and `whole` joins them.
    """

    step: jax.Array  # () int32, updates made so far
    skipped: jax.Array  # () int32, updates skipped because loss or gradient was not finite
    model: MMDiT | nnx.State
    ema: MMDiT | nnx.State | None  # None: the run keeps no average
    opt_state: optax.OptState
    frozen: nnx.State | None = None  # not in checkpoints
    teacher: MMDiT | None = None  # not in checkpoints; None if it is `frozen`, or nothing needs it
    critic: "Critic | None" = None  # of `DistributionMatching`
    judge: "Judge | None" = None  # of stages with a reward; not in checkpoints


class Critic(NamedTuple):
    """A second network that is trained: its weights, of the form of `TrainState.model`."""

    model: MMDiT | nnx.State
    opt_state: optax.OptState


class Judge(NamedTuple):
    """The autoencoder and the weights of rewards, which turn latents into numbers."""

    vae: CausalVAE
    weights: Any = ()  # {name: weights} of the rewards that have a gradient


class Networks(NamedTuple):
    """The networks that a loss evaluates."""

    student: MMDiT  # the one that is trained
    teacher: MMDiT | None = None  # as `init` is, without gradient
    judge: Judge | None = None
    average: MMDiT | None = None  # of the student, without gradient


class Part(NamedTuple):
    """How a model is put together of which only a part is trained."""

    whole: nnx.GraphDef
    frozen: nnx.GraphDef | None = None  # without adapters; None unless that is the teacher
    dropout: float = 0.0  # share of the adapters' ranks that an update leaves out


def init_state(
    make_model,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    *,
    trained: Callable[[tuple, object], bool] | None = None,
    average: bool = True,
    teach: Callable[[MMDiT], MMDiT] | None = None,
    critic: bool = False,
) -> TrainState:
    """Return the state before the first update: new weights, their average, and zero moments.

    `make_model(key)` builds the network. `trained(path, variable)` selects the weights to train;
    the others are frozen. None trains all. Without `average` there are no averaged weights.
    `teach(model)` makes the teacher beside a model that is trained as a whole. A `critic` begins as
    the teacher: a copy of the model, or adapters whose product is zero.
    """
    model, frozen = make_model(key), None
    teacher = None if teach is None else teach(model)
    if trained is not None:
        _, model, frozen = nnx.split(model, trained, ...)
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, model) if average else None
    second = None
    if critic:
        weights = jax.tree_util.tree_map_with_path(_without_product, model)
        second = Critic(weights, optimizer.init(weights))
    return TrainState(zero, zero, model, ema, optimizer.init(model), frozen, teacher, second)


def _without_product(path: tuple, x: Array) -> Array:
    """Return a copy of a weight; that of an adapter's second matrix is zero."""
    adapter = is_adapter(tuple(getattr(key, "key", None) for key in path), None)
    return jnp.zeros_like(x) if adapter and path[-2].key == "up" else jnp.copy(x)


def whole(graph, weights, frozen) -> MMDiT:
    """Return the model of a state's `model` or `ema` and its `frozen` weights.

    `graph` is the structure of the model (`nnx.graphdef`).
    """
    return weights if frozen is None else nnx.merge(graph, weights, frozen)


def networks(weights, state: TrainState, part: Part | None, key: PRNGKeyArray) -> Networks:
    """Return the model of `weights` and the frozen ones of a state, and its teacher, if any.

    `key` draws which ranks of adapters are left out.
    """
    average = average_of(state, part)
    if part is None:
        return Networks(weights, state.teacher, state.judge, average)
    weights = without_some(weights, key, part.dropout)
    teacher = part.frozen and nnx.merge(part.frozen, state.frozen)
    return Networks(whole(part.whole, weights, state.frozen), teacher, state.judge, average)


def average_of(state: TrainState, part: Part | None) -> MMDiT:
    """Return the averaged model of a state; the trained one if the run keeps no average."""
    weights = state.model if state.ema is None else state.ema
    return weights if part is None else whole(part.whole, weights, state.frozen)


def input_channels(state: TrainState) -> int:
    """Return the number of input channels of the state's model."""
    kernels = (_patch_kernel(part) for part in (state.model, state.frozen))
    kernel = next(kernel for kernel in kernels if kernel is not None)
    return kernel.get_value().shape[0] // PATCH**2


def _patch_kernel(tree) -> nnx.Variable | None:
    """Return the kernel of the input layer, if a module or a part of its weights has it."""
    if isinstance(tree, MMDiT):
        return tree.patches.kernel
    if isinstance(tree, nnx.State) and "kernel" in tree.get("patches", ()):
        return tree.patches.kernel
    return None


def widen_state(state, in_channels: int):
    """Return the tree with `in_channels` input channels: in model, EMA, moments, frozen weights.

    New channels come last and have zero weights, so a T2V model becomes an inpainting or control
    model that at first ignores its condition. With fewer channels the first ones are kept (spec
    2.9).
    """

    rows = in_channels * PATCH**2

    def resize(kernel):
        return jnp.pad(kernel[:rows], ((0, max(0, rows - kernel.shape[0])), (0, 0)))

    def widen(model):
        if not has_patches(model):
            return model
        model = jax.tree.map(lambda x: x, model)  # a copy of the module, not of the arrays
        # By tree map: a moment that the optimizer keeps for other weights has no kernel here.
        kernel = _patch_kernel(model)
        kernel.set_value(jax.tree.map(resize, kernel.get_value()))
        if isinstance(model, MMDiT):
            model.patches.in_features = rows
            model.config = dataclasses.replace(model.config, in_channels=in_channels)
        return model

    def has_patches(x):
        return _patch_kernel(x) is not None

    return jax.tree.map(widen, state, is_leaf=has_patches)


def keeping(state, save: str | tuple[str, ...]):
    """Return the tree with `save` in the config of each of its transformers; no array is copied."""

    def change(model):
        if not isinstance(model, MMDiT) or model.config.save == save:
            return model
        model = jax.tree.map(lambda x: x, model)  # a copy of the module, not of the arrays
        model.config = dataclasses.replace(model.config, save=save)
        return model

    return jax.tree.map(change, state, is_leaf=lambda x: isinstance(x, MMDiT))


class Drawn(NamedTuple):
    """The rows of a microbatch in float32, with latents and noise drawn for this update."""

    batch: Batch
    latents: Float[Array, "B N P"]
    noise: Float[Array, "B N P"]


def draw(batch: Batch, rows: Integer[Array, "B"], key: PRNGKeyArray) -> Drawn:
    """Return the rows with new latents and new noise, which follow from `key` and their numbers.

    Every visit draws new latents from the VAE's posterior, `mean + std * eps` (spec 3.4).
    """

    batch = as_float32(batch)

    def of_row(row):
        posterior, noise = jax.random.split(jax.random.fold_in(key, row))
        shape = batch.mean.shape[1:]
        return jax.random.normal(posterior, shape), jax.random.normal(noise, shape)

    posterior, noise = jax.vmap(of_row)(rows)
    return Drawn(batch, batch.mean + jnp.exp(batch.logvar / 2) * posterior, noise)


def as_float32(batch: Batch) -> Batch:
    """Return a batch for computation: latents and texts, stored as float16, as float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float16 else x, batch)


def predict(
    model: MMDiT, batch: Batch, x: Float[Array, "B N P"], time: Float[Array, "B"], texts=None
) -> Float[Array, "B N P"]:
    """Return the prediction for noisy latents, with the rows' condition and their own `texts`."""
    if batch.condition is not None:
        x = jnp.concatenate([x, batch.condition], axis=-1)
    return model(x, batch.grid, batch.lengths, time, batch.texts if texts is None else texts)


def row_means(values: Float[Array, "B N P"], lengths: Int[Array, "B"]) -> Float[Array, "B"]:
    """Return each row's mean over its real tokens and their values."""
    values = values.mean(axis=-1)
    real = jnp.arange(values.shape[1])[None] < lengths[:, None]
    return jnp.sum(values * real, axis=1) / jnp.maximum(lengths, 1)


def denoising_loss(
    networks: Networks,
    batch: Batch,
    time: Float[Array, "B"],
    rows: Int[Array, "B"],
    key: PRNGKeyArray,
    *,
    process,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the weighted sum over rows of the losses that `row_losses` returns, and no metrics."""
    losses = row_losses(networks.student, batch, time, rows, key, process=process)
    return jnp.sum(losses * process.weight(time) * batch.weight), {}


def row_losses(
    model: MMDiT,
    batch: Batch,
    time: Float[Array, "B"],
    rows: Integer[Array, "B"],
    key: PRNGKeyArray,
    *,
    process,
) -> Float[Array, "B"]:
    """Return each row's mean squared error over its real tokens.

    The draws of a row depend on `key` and its number in `rows`.
    """
    batch, latents, noise = draw(batch, rows, key)
    prediction = predict(model, batch, process.add_noise(latents, noise, time), time)
    target = process.target(latents, noise, time)
    return row_means(masked_squared_error(prediction, target), batch.lengths)


def updated(
    optimizer: optax.GradientTransformation,
    grads,
    opt_state: optax.OptState,
    weights,
    learning_rate: Float[Array, ""],
):
    """Return (weights, optimizer state) after an update."""
    updates, opt_state = optimizer.update(grads, opt_state, weights)
    scaled = jax.tree.map(lambda u: -learning_rate * u, updates)
    return optax.apply_updates(weights, scaled), opt_state


def over_microbatches(function: Callable, carry, inputs):
    """Return the result of `jax.lax.scan`; a single microbatch has no loop.

    XLA for CPUs makes convolutions in a loop several times slower.
    """
    if len(jax.tree.leaves(inputs)[0]) > 1:
        return jax.lax.scan(function, carry, inputs)
    carry, found = function(carry, jax.tree.map(lambda x: x[0], inputs))
    return carry, jax.tree.map(lambda x: x[None], found)


def train_step(
    state: TrainState,
    batch: Batch,
    key: PRNGKeyArray,
    learning_rate: Float[Array, ""],
    *,
    optimizer: optax.GradientTransformation,
    process,
    ema_decay: float,
    batch_size: int | None = None,
    part: Part | None = None,
    loss: Callable = denoising_loss,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Make one update from a global batch of (A, B) rows; return (new state, metrics).

    An update with a non-finite loss or gradient is skipped and counted, and so is one with a loss
    of 0. The first `batch_size` rows are real (None: all rows); the others are padding. The padding
    depends on the devices, so times are drawn, and stratified, only over the real rows. The
    average's decay warms up as (1 + n) / (10 + n), so early samples show the current weights.

    A state with frozen weights needs `part`. `loss` has the arguments and results of
    `denoising_loss`; what it returns beside the loss is summed over rows and is in the metrics.
    """
    step_key = jax.random.fold_in(key, state.step)
    time_key, noise_key = jax.random.split(step_key)
    rows = jnp.arange(batch.weight.size).reshape(batch.weight.shape)
    tokens = batch.lengths.reshape(-1)[: batch_size or rows.size]
    time = process.sample_time(time_key, tokens.shape, tokens)
    time = jnp.pad(time, (0, rows.size - time.size), constant_values=1).reshape(rows.shape)
    batch = batch._replace(weight=batch.weight / batch.weight.sum())

    def loss_of(weights, batch, time, rows):
        found = networks(weights, state, part, jax.random.fold_in(step_key, 1))
        return loss(found, batch, time, rows, noise_key, process=process)

    def accumulate(carry, micro):
        rows, time, batch = micro
        (value, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.model, batch, time, rows
        )
        return jax.tree.map(jnp.add, carry, (value, grads)), metrics

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.model))
    (value, grads), metrics = over_microbatches(accumulate, zeros, (rows, time, batch))
    metrics = {name: jnp.sum(values) for name, values in metrics.items()}
    new, own = _after(state, value, grads, optimizer, learning_rate, ema_decay)
    return new, metrics | own


def _after(state: TrainState, value, grads, optimizer, learning_rate, ema_decay: float):
    """Return (state after an update with these gradients, metrics)."""
    grad_norm = optax.tree.norm(grads)
    model, opt_state = updated(optimizer, grads, state.opt_state, state.model, learning_rate)
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = None if state.ema is None else optax.incremental_update(model, state.ema, 1 - decay)

    # The loss is exactly 0 if all errors are outliers, which count as zero (spec 4.4).
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm) & (value != 0)
    model, ema, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (model, ema, opt_state),
        (state.model, state.ema, state.opt_state),
    )
    skipped = state.skipped + ~finite
    metrics = {"loss": value, "grad_norm": grad_norm, "skipped": skipped}
    new = state._replace(
        step=state.step + 1, skipped=skipped, model=model, ema=ema, opt_state=opt_state
    )
    return new, metrics
