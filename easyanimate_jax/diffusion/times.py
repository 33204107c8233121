"""What both noise processes share about time: uniform draws, and how many steps a sampler runs."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

NUM_TRAIN_TIMES = 1000  # released scheduler config


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], stratified: bool) -> Float[Array, "..."]:
    """Uniform draws in [0, 1); stratified: each in a stratum of its own, in random order.

    The strata lower the variance of the batch loss and leave every row's marginal uniform.
    """
    if not stratified:
        return jax.random.uniform(key, shape)
    offset, order = jax.random.split(key)
    count = math.prod(shape)
    strata = jax.random.permutation(order, count).reshape(shape)
    return (strata + jax.random.uniform(offset, shape)) / count


def to_index(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """floor(1000 u), kept below 1000 where u rounds to 1."""
    return jnp.minimum(jnp.floor(u * NUM_TRAIN_TIMES), NUM_TRAIN_TIMES - 1)


def align(time: Float[Array, "..."], x) -> Float[Array, "..."]:
    """Trailing ones after `time`, so that it broadcasts over the other dimensions of x."""
    return time.reshape(time.shape + (1,) * (x.ndim - time.ndim))


def first_step(num_steps: int, strength: float) -> int:
    """The step at which sampling starts: strength 1 runs all of them, less keeps the last."""
    if not 1 <= num_steps <= NUM_TRAIN_TIMES:
        raise ValueError(f"{num_steps} sampling steps: choose 1 to {NUM_TRAIN_TIMES}")
    if not 0 < strength <= 1 or int(num_steps * strength) == 0:
        raise ValueError(
            f"strength {strength} of {num_steps} steps leaves none: "
            f"choose a strength from {1 / num_steps:.3g} to 1"
        )
    return num_steps - int(num_steps * strength)
