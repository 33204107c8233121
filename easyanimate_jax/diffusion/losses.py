"""The training loss of spec 4.4, for both noise processes."""

import jax.numpy as jnp
from jaxtyping import Array, Float

OUTLIER = 50.0  # larger errors count as zero


def masked_squared_error(
    prediction: Float[Array, "..."], target: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Return the elementwise squared error in float32; errors above `OUTLIER` give zero.

    Infinite and NaN errors stay, so that training detects and skips a broken step.
    """
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    outlier = (jnp.abs(error) > OUTLIER) & jnp.isfinite(error)
    return jnp.where(outlier, 0.0, error**2)
