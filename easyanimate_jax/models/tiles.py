"""Split a video or its latents into overlapping tiles, and blend the results (spec 3.6)."""

import jax
import jax.numpy as jnp

TILE_OVERLAP = 0.25  # share of a tile's side that is blended with the next tile


def map_tiles(network, x, size, step):
    """Return rows of `network(tile)` for tiles of side `size`, one every `step`, of a 5-D `x`."""
    return [
        [network(x[:, :, i : i + size, j : j + size]) for j in range(0, x.shape[3], step)]
        for i in range(0, x.shape[2], step)
    ]


def stitch(tiles, size, step):
    """Blend each tile with the one above, then with the one to its left; join `step` of each.

    As in the reference, each neighbour is already blended and not yet cropped. Changes `tiles`.
    """
    extent = int(size * TILE_OVERLAP)
    for i, row in enumerate(tiles):
        for j in range(len(row)):
            if i > 0:
                row[j] = _blend(tiles[i - 1][j], row[j], extent, axis=2)
            if j > 0:
                row[j] = _blend(row[j - 1], row[j], extent, axis=3)
    rows = [jnp.concatenate([tile[:, :, :step, :step] for tile in row], axis=3) for row in tiles]
    return jnp.concatenate(rows, axis=2)


def _blend(before, tile, extent, axis):
    extent = min(extent, before.shape[axis], tile.shape[axis])
    weight = jnp.arange(extent).reshape([-1 if a == axis else 1 for a in range(5)]) / extent
    end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    start = jax.lax.slice_in_dim(tile, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(tile, extent, None, axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)
