"""The training losses of spec 4.4, for either noise process."""

import jax.numpy as jnp
from jaxtyping import Array, Float

OUTLIER = 50.0  # errors above this count as zero


def masked_squared_error(
    prediction: Float[Array, "..."], target: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Elementwise squared error in float32; outliers count as zero in a later mean.

    Infinite and NaN errors stay, so that a broken step is seen and skipped.
    """
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    outlier = (jnp.abs(error) > OUTLIER) & jnp.isfinite(error)
    return jnp.where(outlier, 0.0, error**2)
