"""AdamW with the reference's clipping rule (spec 9.1, 9.2); Muon or Adafactor for the matrices.

The learning rate is an argument of the train step, not part of the optimizer: it belongs to the
stage, and a change of stage must not recompile the step.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from optax import contrib

from easyanimate_jax.facts import check_fields
from easyanimate_jax.models.layers import matches

Matrices = Literal["adam", "muon", "adafactor"]
Moments = Literal["float32", "bfloat16"]
Rates = tuple[tuple[str, float], ...]  # patterns of weights, and factors of the learning rate

MUON_STEPS = 4  # Newton-Schulz iterations
MUON_RMS = 0.2  # RMS of an update's entries, about Adam's (Liu et al. 2025, arXiv 2502.16982)


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule of all stages; defaults are those of the released V5 scripts (spec 9.1)."""

    matrices: Matrices = "adam"
    """Update rule of the projections in the blocks' attention and MLP; Adam updates all others.
    "muon" makes the momentum orthogonal (Jordan 2024), keeps one moment instead of two, and uses
    Adam's learning rates. Use it to train from random weights. "adafactor" keeps of the second
    moment only the means of its rows and columns (Shazeer and Stern 2018, arXiv 1804.04235)."""

    moments: Moments = "float32"
    """Type in which moments are kept. "bfloat16" takes half the memory and rounds at random, so
    that changes smaller than its steps are kept on average."""

    b1: float = 0.9
    """Decay of the first moment of Adam and Adafactor per step. With 0, Adafactor keeps none."""

    b2: float = 0.999
    """Decay of Adam's second moment per step."""

    eps: float = 1e-10
    """Number added to the root of Adam's second moment."""

    weight_decay: float = 5e-3
    """Decoupled weight decay: a step subtracts learning rate x this x weight. 0 is no decay."""

    max_grad_norm: float = 0.05
    """Largest norm of the gradients; larger gradients are clipped. 0 never clips."""

    clip_start: int = 1000
    """Steps over which the clipping limit falls from 5 times `max_grad_norm` to `max_grad_norm`.
    After them, outliers are clipped harder (S0 of spec 9.2). 0 starts at the final limit."""

    def __post_init__(self):
        check_fields(
            self,
            b1="[0, 1)",
            b2="[0, 1)",
            eps="(0, inf)",
            weight_decay="[0, inf)",
            max_grad_norm="[0, inf)",
            clip_start="[0, inf)",
        )


class ClipState(NamedTuple):
    """The state of `clip_abnormal`: the number of updates made, () int32."""

    count: jax.Array


def clip_abnormal(max_norm: float, start: int, initial_ratio: float = 5.0):
    """Clip by a limit that falls from 5 x to 1 x `max_norm`, and harder on outliers (spec 9.2).

    limit(n) falls linearly from `initial_ratio * max_norm` to `max_norm` over `start` steps. After
    that, a norm g > 5 limit is clipped to limit / min(g / limit, 10). `max_norm` 0 never clips.
    """
    max_norm = max_norm or math.inf

    def init(params):
        del params
        return ClipState(jnp.zeros((), jnp.int32))

    def update(grads, state, params=None):
        del params
        progress = jnp.minimum(state.count, start) / start if start else 1.0
        limit = max_norm * (initial_ratio + (1 - initial_ratio) * progress)
        norm = optax.tree.norm(grads)
        ratio = norm / limit
        abnormal = (ratio > 5) & (state.count > start)
        limit = jnp.where(abnormal, limit / jnp.minimum(ratio, 10.0), limit)
        scale = jnp.minimum(1.0, limit / (norm + 1e-6))
        return jax.tree.map(lambda g: g * scale, grads), ClipState(state.count + 1)

    return optax.GradientTransformation(init, update)


def scale_by_muon(*, stacked: bool) -> optax.GradientTransformation:
    """Return Muon's transformation: orthogonal momentum with about the RMS of Adam's update.

    The last axis of a kernel is its output, the other axes are its input. A `stacked` kernel has
    the layers as an additional first axis.
    """

    def matrix(x) -> contrib.MuonDimensionNumbers:
        return contrib.MuonDimensionNumbers(tuple(range(int(stacked), x.ndim - 1)), x.ndim - 1)

    def scale(x):
        shape = x.shape[int(stacked) :]
        return MUON_RMS * max(math.prod(shape[:-1]), shape[-1]) ** 0.5 * x

    return optax.chain(
        contrib.scale_by_muon(
            ns_steps=MUON_STEPS,
            preconditioning="aol",
            weight_dimension_numbers=lambda tree: jax.tree.map(matrix, tree),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(scale, updates)),
    )


class RoundedState(NamedTuple):
    """The state of `in_bfloat16`: the number of updates, () int32, and the rounded state."""

    count: jax.Array
    rounded: optax.OptState


def in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the transformation with the floats of its state kept as bfloat16 between updates.

    A value is rounded up or down at random, with the chances that make the expected value exact:
    Adam's second moment changes by a thousandth per step, which nearest rounding would lose. The
    draws depend on the number of the update and of the array, not on the mesh.
    """

    def init(params):
        state = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if _wide(x) else x, inner.init(params)
        )
        return RoundedState(jnp.zeros((), jnp.int32), state)

    def update(updates, state, params=None):
        exact = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state.rounded
        )
        updates, exact = inner.update(updates, exact, params)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        leaves, structure = jax.tree.flatten(exact)
        leaves = [
            round_at_random(x, jax.random.fold_in(key, number)) if _wide(x) else x
            for number, x in enumerate(leaves)
        ]
        return updates, RoundedState(state.count + 1, jax.tree.unflatten(structure, leaves))

    return optax.GradientTransformation(init, update)


def _wide(x) -> bool:
    return x.dtype == jnp.float32


def round_at_random(x: Float[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """Return float32 values as bfloat16, rounded up or down so that the expected value is exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    drawn = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = (bits + drawn) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(jnp.bfloat16)


def scale_by_adafactor() -> optax.GradientTransformation:
    """Return Adafactor's scaling of stacked kernels: each layer by its own factored RMS.

    The update of a layer has an RMS of at most 1, about Adam's. The statistics are plain arrays, a
    mean for each row and column, and every device keeps them all.
    """
    inner = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))

    def init(params):
        leaves = jax.tree.leaves(params)
        return jax.vmap(inner.init)(leaves) if leaves else ()

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates, ()
        leaves, state = jax.vmap(inner.update)(leaves, state, jax.tree.leaves(params))
        return jax.tree.unflatten(structure, leaves), state

    return optax.GradientTransformation(init, update)


def labels(weights, matrices: Matrices = "muon"):
    """Return the update rule of each weight: `matrices` or "adam", in the tree of `weights`.

    The kernels of the blocks' attention and MLP are updated by the rule `matrices`.
    """

    def label(path, _):
        parts = name_of(path).split(".")
        block = parts[0] == "blocks" and ("attention" in parts or "mlp" in parts)
        return matrices if block and parts[-1] == "kernel" else "adam"

    return jax.tree_util.tree_map_with_path(label, weights)


def scale_rates(rates: Rates) -> optax.GradientTransformation:
    """Multiply the update of each weight by the factor of the first pattern that its name matches.

    Weights that match none, and adapters, keep their update.
    """

    def scale(path, x):
        name = name_of(path)
        matching = (factor for pattern, factor in rates if matches(name, [pattern]))
        factor = 1.0 if "adapter" in name.split(".") else next(matching, 1.0)
        return x if factor == 1 else factor * x

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def name_of(path: tuple) -> str:
    """Return the dotted name of a weight by its path in a tree, such as `patches.kernel`."""
    keys = [next(getattr(k, a) for a in ("name", "key", "idx") if hasattr(k, a)) for k in path]
    return ".".join(map(str, keys)).removesuffix(".value")  # of the variable


@cache
def make_optimizer(config: OptimizerConfig, rates: Rates = ()) -> optax.GradientTransformation:
    """Return the chain of clipping, the update rules, decoupled weight decay, and `rates`.

    The caller multiplies the updates by -learning rate. Equal configs give the same object, because
    JAX compares it when it looks up a traced program.
    """
    kept = in_bfloat16 if config.moments == "bfloat16" else lambda inner: inner
    update = kept(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.matrices != "adam":
        rules = {"adam": update, config.matrices: kept(_matrix_rule(config))}
        update = optax.partition(rules, partial(labels, matrices=config.matrices))
    return optax.chain(
        clip_abnormal(config.max_grad_norm, config.clip_start),
        update,
        optax.add_decayed_weights(config.weight_decay),
        *([scale_rates(rates)] if rates else []),
    )


def _matrix_rule(config: OptimizerConfig) -> optax.GradientTransformation:
    if config.matrices == "muon":
        return scale_by_muon(stacked=True)
    average = [optax.ema(config.b1, debias=False)] if config.b1 else []
    return optax.chain(scale_by_adafactor(), *average)
