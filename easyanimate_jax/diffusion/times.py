"""Functions of time that both noise processes use: random times, and a sampler's first step."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

NUM_TRAIN_TIMES = 1000  # released scheduler config


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], stratified: bool) -> Float[Array, "..."]:
    """Return uniform draws in [0, 1), float32; if stratified, one from each of equal intervals.

    The intervals come in random order. They lower the variance of the batch loss, and each row's
    own distribution stays uniform (spec 4.3).
    """
    if not stratified:
        return jax.random.uniform(key, shape)
    offset, order = jax.random.split(key)
    count = math.prod(shape)
    strata = jax.random.permutation(order, count).reshape(shape)
    return (strata + jax.random.uniform(offset, shape)) / count


def to_index(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return floor(1000 u), 0 to 999 even if u was rounded to 1 or a little below 0."""
    return jnp.clip(jnp.floor(u * NUM_TRAIN_TIMES), 0, NUM_TRAIN_TIMES - 1)


def align(time: Float[Array, "..."], x) -> Float[Array, "..."]:
    """Append dimensions of size 1 to `time`, so that it broadcasts with x."""
    return time.reshape(time.shape + (1,) * (x.ndim - time.ndim))


def first_step(num_steps: int, strength: float) -> int:
    """Return the first step to run: strength 1 runs all steps, less runs only the last ones.

    Raises ValueError for a number of steps or a strength outside its range.
    """
    if not 1 <= num_steps <= NUM_TRAIN_TIMES:
        raise ValueError(f"{num_steps} sampling steps: use 1 to {NUM_TRAIN_TIMES}")
    if not 0 < strength <= 1 or int(num_steps * strength) == 0:
        raise ValueError(
            f"strength {strength} of {num_steps} steps leaves none: "
            f"use a strength from {1 / num_steps:.3g} to 1"
        )
    return num_steps - int(num_steps * strength)
