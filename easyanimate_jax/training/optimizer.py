"""AdamW with the reference's clipping rule (spec 9.1, 9.2).

The learning rate is an argument of the train step, not part of the optimizer: it belongs to the
stage, and a stage change must not compile anything.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class OptimizerConfig:
    """Defaults are the released V5 scripts (spec 9.1); `clip_start` is the rule's S0."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-10
    weight_decay: float = 5e-3
    max_grad_norm: float = 0.05
    clip_start: int = 1000


class ClipState(NamedTuple):
    count: jax.Array


def clip_abnormal(max_norm: float, start: int, initial_ratio: float = 5.0):
    """Clip by a limit that falls from 5 x to 1 x `max_norm`, and harder on outliers (spec 9.2).

    limit(n) goes linearly from `initial_ratio * max_norm` to `max_norm` over `start` steps. After
    that a norm g > 5 limit is clipped to limit / min(g / limit, 10).
    """

    def init(params):
        del params
        return ClipState(jnp.zeros((), jnp.int32))

    def update(grads, state, params=None):
        del params
        progress = jnp.minimum(state.count, start) / start
        limit = max_norm * (initial_ratio + (1 - initial_ratio) * progress)
        norm = optax.tree.norm(grads)
        ratio = norm / limit
        abnormal = (ratio > 5) & (state.count > start)
        limit = jnp.where(abnormal, limit / jnp.minimum(ratio, 10.0), limit)
        scale = jnp.minimum(1.0, limit / (norm + 1e-6))
        return jax.tree.map(lambda g: g * scale, grads), ClipState(state.count + 1)

    return optax.GradientTransformation(init, update)


@cache
def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, Adam and decoupled weight decay; the caller multiplies by -learning rate.

    One object per config: JAX knows a traced program again by it.
    """
    return optax.chain(
        clip_abnormal(config.max_grad_norm, config.clip_start),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay),
    )
