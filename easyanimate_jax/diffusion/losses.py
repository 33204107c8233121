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


def motion_sub_loss(
    loss: Float[Array, ""],
    prediction: Float[Array, "B T h w C"],
    target: Float[Array, "B T h w C"],
    ratio: float = 0.25,
) -> Float[Array, ""]:
    """`loss` mixed with the error of the differences between neighbouring latent frames."""
    if prediction.shape[1] <= 2:
        return loss
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return (1 - ratio) * loss + ratio * jnp.mean(jnp.diff(error, axis=1) ** 2)
