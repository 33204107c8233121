"""AdamW with the reference's clipping rule (spec 9.1, 9.2), and Muon for the blocks' matrices.

The learning rate is an argument of the train step, not part of the optimizer: it belongs to the
stage, and a change of stage must not recompile the step.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from easyanimate_jax.facts import check_fields

Matrices = Literal["adam", "muon"]

MUON_STEPS = 4  # Newton-Schulz iterations
MUON_RMS = 0.2  # RMS of an update's entries, about Adam's (Liu et al. 2025, arXiv 2502.16982)


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule of all stages; defaults are those of the released V5 scripts (spec 9.1)."""

    matrices: Matrices = "adam"
    """Update rule of the projections in the blocks' attention and MLP; Adam updates all others.
    "muon" makes the momentum orthogonal (Jordan 2024), keeps one moment instead of two, and uses
    Adam's learning rates. Use it to train from random weights."""

    b1: float = 0.9
    """Decay of Adam's first moment per step."""

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


def labels(weights):
    """Return the update rule of each weight: "muon" or "adam", in the tree of `weights`.

    Muon updates the kernels of the blocks' attention and MLP.
    """

    def label(path, _):
        name = jax.tree_util.keystr(path)
        block = ".blocks" in name and (".attention" in name or ".mlp" in name)
        return "muon" if block and ".kernel" in name else "adam"

    return jax.tree_util.tree_map_with_path(label, weights)


@cache
def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the chain of clipping, Adam or Muon, and decoupled weight decay.

    The caller multiplies the updates by -learning rate. Equal configs give the same object, because
    JAX compares it when it looks up a traced program.
    """
    update = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.matrices == "muon":
        update = optax.partition({"adam": update, "muon": scale_by_muon(stacked=True)}, labels)
    return optax.chain(
        clip_abnormal(config.max_grad_norm, config.clip_start),
        update,
        optax.add_decayed_weights(config.weight_decay),
    )
