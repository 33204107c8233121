"""Convert 8-bit pixels to the transformer's tokens, and latents to 8-bit pixels.

The VAE processes a few rows at a time, with one compiled program for all groups of rows. The memory
that encoding needs is checked before it runs. Tokens are those of `models.mmdit.patchify`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from easyanimate_jax.diffusion.conditioning import (
    camera_condition,
    inpaint_condition,
    masked_video,
    reference_noise,
    repaint_mask,
)
from easyanimate_jax.facts import LATENT_CHANNELS, SPACE_FACTOR, to_bytes, to_signed
from easyanimate_jax.generation.protocols import Autoencoder
from easyanimate_jax.memory import check_fit
from easyanimate_jax.models.mmdit import patchify
from easyanimate_jax.sharding import num_parts, shard

Videos = UInt8[np.ndarray, "B F H W 3"]
Clips = UInt8[np.ndarray, "B _ H W 3"]  # any number of frames
Masks = UInt8[np.ndarray, "_ _ _ _ 1"]
Tokens = Float[np.ndarray, "B N _"]

PIXELS_AT_ONCE = 2**18  # per frame in the VAE: 1 row of 512 x 512, or 64 rows of 64 x 64


def decode(
    vae: Autoencoder, latents: Float[np.ndarray, "B T h w C"], tile: int | None = None
) -> Videos:
    """Return the videos of normalised latents, uint8, truncated and not rounded (spec 10.1).

    With a `tile`, in pixels of a side, overlapping tiles of that size are decoded and blended. This
    needs less memory, and changes pixels near the seams slightly (spec 3.6).
    """
    decoded = partial(pixels_of, vae, tile=tile)
    return by_rows(decoded, latents, pixels_per_cell=SPACE_FACTOR**2)


def inpaint_tokens(
    vae: Autoencoder, video: Videos, mask: Masks, seeds: Sequence[int], noise: float
) -> Tokens:
    """Return the inpaint condition of videos: the mask and the latents of the kept pixels.

    `noise` is the strength of the noise on the kept pixels, in units of [-1, 1]. Raises ValueError
    if a device has too little memory.
    """
    seeds, strengths = np.asarray(seeds, np.uint32), np.full(len(seeds), noise, np.float32)
    return _encode(picture_tokens, vae, video, mask, seeds, strengths)


@jax.jit
def picture_tokens(vae, video, mask, seeds, strengths):
    """Return the tokens of `inpaint_tokens` for one group of rows, from the posterior's mode."""

    def blur(seed, video, strength):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return reference_noise(key, video[None], strength[None])[0]

    mask = mask.astype(jnp.float32)
    video = jax.vmap(blur)(seeds, masked_video(to_signed(video), mask), strengths)
    mean, _ = vae.chunked_encode(_spread(video, SPACE_FACTOR))
    return _whole(patchify(inpaint_condition(mask, vae.normalize(mean))))


def encoded(vae: Autoencoder, video: Clips) -> Tokens:
    """Return the normalised latents of videos as tokens.

    Raises ValueError if a device has too little memory.
    """
    return _encode(video_tokens, vae, video)


@jax.jit
def video_tokens(vae, video):
    """Return the tokens of `encoded` for one group of rows, from the posterior's mode."""
    mean, _ = vae.chunked_encode(_spread(to_signed(video), SPACE_FACTOR))
    return _whole(patchify(vae.normalize(mean)))


def _encode(program, vae, *arrays: np.ndarray) -> np.ndarray:
    """Check the memory for `program(vae, ...)`, and return its result for all rows."""
    rows, frames, height, width, _ = arrays[0].shape
    at_once = rows_at_once(rows, height * width)
    shapes = (jax.ShapeDtypeStruct((at_once, *x.shape[1:]), x.dtype) for x in arrays)
    check_fit(f"encoding {at_once} x {frames}x{height}x{width}", program, vae, *shapes)
    return by_rows(partial(program, vae), *arrays)


@jax.jit
def camera_tokens(rays):
    """Return the condition tokens of cameras, (B, F, H, W, 6) Pluecker rays."""
    return patchify(camera_condition(rays))


@jax.jit
def keep_tokens(mask):
    """Return tokens of masks (B, F, H, W, 1) for repainting: 1 for values to keep, else 0."""
    keep = 1 - repaint_mask(mask.astype(jnp.float32))
    return patchify(jnp.repeat(keep, LATENT_CHANNELS, axis=-1))


@partial(jax.jit, static_argnames="tile")
def pixels_of(vae, latents, *, tile: int | None = None):
    """Return the pixels of normalised latents for one group of rows, uint8 (B, F, H, W, 3)."""
    latents = vae.denormalize(latents)
    whole = tile is None or tile >= SPACE_FACTOR * max(latents.shape[2:4])
    video = vae.chunked_decode(_spread(latents, 1)) if whole else vae.tiled_decode(latents, tile)
    return _whole(to_bytes(video))


def _spread(x, cell: int):
    """Shard x over all devices of the mesh, by picture rows or columns, if their number divides.

    XLA propagates this sharding through the whole network: devices exchange borders before each
    convolution and add their partial sums in each norm.
    """
    axes = [None] * x.ndim
    for dim in (2, 3):
        if x.shape[dim] // cell % num_parts("picture") == 0:
            axes[dim] = "picture"
            break
    return shard(x, *axes)


def _whole(x):
    """Replicate x on all devices, so that any host can read it."""
    return shard(x, *[None] * x.ndim)


def by_rows(function: Callable, *arrays: np.ndarray, pixels_per_cell: int = 1) -> np.ndarray:
    """Return `function` of all rows, called on groups of equal size so that it compiles once.

    The last group is padded. `pixels_per_cell` is the number of pixels that one element stands for.
    """
    rows, _, height, width, _ = arrays[0].shape
    size = rows_at_once(rows, height * width * pixels_per_cell)
    parts = []
    for first in range(0, rows, size):
        index = np.minimum(np.arange(first, first + size), rows - 1)
        parts.append(np.asarray(function(*(x[index] for x in arrays))))
    return np.concatenate(parts)[:rows]


def rows_at_once(rows: int, pixels: int) -> int:
    """Return the number of rows that the VAE processes at once, with `pixels` in each frame."""
    groups = math.ceil(rows * pixels / PIXELS_AT_ONCE)
    return math.ceil(rows / min(groups, rows))
