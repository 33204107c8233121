"""3-D rotary position angles, computed on the device from each sample's token grid.

Follows section 2.5 of the specification. A quarter of the head width encodes time; three eighths
each encode height and width. Each grid is scaled to fit a base grid of 30 x 45 tokens (480 x 720
pixels) and centred in it. Time is not rescaled.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from easyanimate_jax.sharding import platform

BASE_HEIGHT, BASE_WIDTH = 30, 45
THETA = 10000.0
MAX_GRID = 256  # most token rows or columns: 4096 pixels

Angles = tuple[Float[Array, "B N half"], Float[Array, "B N half"]]  # cosines, sines; half: K / 2


def _fitted_sizes() -> np.ndarray:
    """Return int8 (MAX_GRID + 1, MAX_GRID + 1, 2): the fitted height and width of each grid.

    The reference rounds in float64. Exact or float32 arithmetic gives other results for some grids
    of its aspect table: for 44 x 11, 30 / 44 * 11 is slightly below 7.5 in float64.
    """
    rows, columns = np.mgrid[: MAX_GRID + 1, : MAX_GRID + 1].clip(1).astype(np.float64)
    tall = rows / columns > BASE_HEIGHT / BASE_WIDTH
    height = np.where(tall, BASE_HEIGHT, np.round(BASE_WIDTH / columns * rows))
    width = np.where(tall, np.round(BASE_HEIGHT / rows * columns), BASE_WIDTH)
    return np.stack([height, width], axis=-1).astype(np.int8)


FITTED_SIZES = _fitted_sizes()


def positions(grid: Int[Array, "B 3"], num_tokens: int) -> Float[Array, "B N 3"]:
    """Return time, height and width of tokens 0..num_tokens-1, which are in (t, y, x) order.

    `grid` holds latent frames, token rows and token columns. Padded tokens past the end of the grid
    get later time steps; any finite position is valid for them.
    """
    size = jnp.maximum(grid[:, 1:], 1)  # rows and columns; padded rows of a batch hold zeros
    fitted = jnp.asarray(FITTED_SIZES)[size[:, 0], size[:, 1]].astype(jnp.int32)
    start = jnp.round((np.array([[BASE_HEIGHT, BASE_WIDTH]]) - fitted) / 2)  # half to even
    # The reference's last position is (start + fitted) * (size - 1) / size. The step is therefore
    # fitted / size only if start is 0. Released weights were trained with these positions.
    stop = (start + fitted) * (size - 1) / size
    step = (stop - start) / jnp.maximum(size - 1, 1)

    token = jnp.arange(num_tokens)[None]
    rows, columns = size[:, :1], size[:, 1:]
    t, y, x = token // (rows * columns), token // columns % rows, token % columns
    space = start[:, None] + jnp.stack([y, x], axis=-1) * step[:, None]
    return jnp.concatenate([t[..., None].astype(jnp.float32), space], axis=-1)


def rotary_angles(grid: Int[Array, "B 3"], num_tokens: int, head_width: int) -> Angles:
    """Return the cosines and sines of each token's K / 2 angles, float32."""
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
    """Rotate each pair (x[2j], x[2j + 1]) by angle j in float32; return the dtype of `x`."""
    if platform() == "tpu":
        return _rotate_by_product(x, angles)
    cos, sin = (a[:, :, None] for a in angles)
    even, odd = rearrange(
        x.astype(jnp.float32), "B N heads (half two) -> two B N heads half", two=2
    )
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rearrange(turned, "B N heads half two -> B N heads (half two)").astype(x.dtype)


def _rotate_by_product(x: Float[Array, "B N heads K"], angles: Angles):
    """Rotate as `rotate` does, with a matrix product that exchanges the neighbours of a pair.

    On a TPU, separating neighbours moves every number across lanes. The product is 15 times cheaper
    by the compiler's estimate. It is exact, because each sum has one nonzero term.
    """
    cos, sin = (jnp.repeat(a, 2, axis=-1)[:, :, None] for a in angles)
    place = np.arange(x.shape[-1])
    exchange = np.zeros((len(place), len(place)), np.float32)
    exchange[place ^ 1, place] = np.where(place % 2 == 0, -1, 1)
    other = jnp.einsum(
        "BNhK,KJ->BNhJ", x, jnp.asarray(exchange, x.dtype), preferred_element_type=jnp.float32
    )
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)
