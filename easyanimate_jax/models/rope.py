"""3-D rotary position angles, computed on the device from each sample's token grid.

Follows section 2.5 of the specification: a quarter of the head width turns with time, three
eighths each with height and width. Space is measured on a base grid of 30 x 45 tokens (480 x 720
pixels) into which the sample's grid is fitted and centred; time is never rescaled.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from easyanimate_jax.sharding import platform

BASE_HEIGHT, BASE_WIDTH = 30, 45
THETA = 10000.0
MAX_GRID = 256  # token rows or columns: 4096 pixels

Angles = tuple[Float[Array, "B N half"], Float[Array, "B N half"]]  # cosines, sines; half: K / 2


def _fitted_sizes() -> np.ndarray:
    """(MAX_GRID + 1, MAX_GRID + 1, 2): height and width on the base grid of every token grid.

    A table, because the reference rounds in float64: exact or float32 arithmetic differs for some
    grids of its own aspect table, such as 44 x 11, where 30 / 44 * 11 falls just short of 7.5.
    """
    rows, columns = np.mgrid[: MAX_GRID + 1, : MAX_GRID + 1].clip(1).astype(np.float64)
    tall = rows / columns > BASE_HEIGHT / BASE_WIDTH
    height = np.where(tall, BASE_HEIGHT, np.round(BASE_WIDTH / columns * rows))
    width = np.where(tall, np.round(BASE_HEIGHT / rows * columns), BASE_WIDTH)
    return np.stack([height, width], axis=-1).astype(np.int8)


FITTED_SIZES = _fitted_sizes()


def positions(grid: Int[Array, "B 3"], num_tokens: int) -> Float[Array, "B N 3"]:
    """Time, height and width of tokens 0..num_tokens-1 in (t, y, x) order.

    Tokens past the end of the grid get further time steps: any finite position will do there.
    """
    size = jnp.maximum(grid[:, 1:], 1)  # rows and columns; a padding row of a batch may hold zeros
    fitted = jnp.asarray(FITTED_SIZES)[size[:, 0], size[:, 1]].astype(jnp.int32)
    start = jnp.round((np.array([[BASE_HEIGHT, BASE_WIDTH]]) - fitted) / 2)  # half to even
    # The last position is (start + fitted) * (size - 1) / size, so the step is not fitted / size
    # unless start is 0. Released weights were trained with it.
    stop = (start + fitted) * (size - 1) / size
    step = (stop - start) / jnp.maximum(size - 1, 1)

    token = jnp.arange(num_tokens)[None]
    rows, columns = size[:, :1], size[:, 1:]
    t, y, x = token // (rows * columns), token // columns % rows, token % columns
    space = start[:, None] + jnp.stack([y, x], axis=-1) * step[:, None]
    return jnp.concatenate([t[..., None].astype(jnp.float32), space], axis=-1)


def rotary_angles(grid: Int[Array, "B 3"], num_tokens: int, head_width: int) -> Angles:
    """Cosines and sines of the K / 2 angles of every token, float32."""
    widths = (head_width // 4, head_width * 3 // 8, head_width * 3 // 8)
    angles = [
        position[..., None]
        * (THETA ** (-np.arange(0, width, 2) / width)).astype(np.float32)[None, None]
        for position, width in zip(
            jnp.moveaxis(positions(grid, num_tokens), -1, 0), widths, strict=True
        )
    ]
    angles = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B N heads K"], angles: Angles) -> Float[Array, "B N heads K"]:
    """Turn neighbours (x[2j], x[2j + 1]) by angle j, in float32."""
    if platform() == "tpu":
        return _rotate_by_product(x, angles)
    cos, sin = (a[:, :, None] for a in angles)
    even, odd = rearrange(
        x.astype(jnp.float32), "B N heads (half two) -> two B N heads half", two=2
    )
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rearrange(turned, "B N heads half two -> B N heads (half two)").astype(x.dtype)


def _rotate_by_product(x: Float[Array, "B N heads K"], angles: Angles):
    """`rotate` for a TPU, where taking neighbours apart moves every number across lanes.

    There a product with a matrix that exchanges neighbours is fifteen times cheaper, by the
    compiler's estimate, and as exact: each of its sums has one term.
    """
    cos, sin = (jnp.repeat(a, 2, axis=-1)[:, :, None] for a in angles)
    place = np.arange(x.shape[-1])
    exchange = np.zeros((len(place), len(place)), np.float32)
    exchange[place ^ 1, place] = np.where(place % 2 == 0, -1, 1)
    other = jnp.einsum(
        "BNhK,KJ->BNhJ", x, jnp.asarray(exchange, x.dtype), preferred_element_type=jnp.float32
    )
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)
