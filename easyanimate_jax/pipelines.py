"""From encoded text and pictures to videos: one denoising program, and the pipelines around it.

Arrays in, arrays out. Text comes as encoder states, a tuple of one or two (B, L, width) arrays for
the prompts and for the negative prompt; the latter may have a single row for all. Each row draws
its noise from a seed of its own, so a video does not depend on what else is in the batch.

Letters beyond the legend: P is the width of a token, 4 x channels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from easyanimate_jax.data.buckets import PATCH, grid_of
from easyanimate_jax.diffusion.conditioning import (
    SAMPLING_NOISE,
    guide,
    inpaint_condition,
    masked_video,
    reference_noise,
)
from easyanimate_jax.models.mmdit import patchify, unpatchify
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.sharding import num_parts, shard

Texts = tuple[Float[Array, "_ _ _"] | Float[np.ndarray, "_ _ _"], ...]
Videos = UInt8[np.ndarray, "B F H W 3"]
Pictures = UInt8[np.ndarray, "B _ _ 3"]

INPAINT_CHANNELS = 17  # a mask and the latents of the given pixels (spec 6)
PIXELS_AT_ONCE = 2**18  # of one frame, in the VAE: a row of 512 x 512, or 64 rows of 64 x 64


@partial(jax.jit, static_argnames=("process", "steps", "rescale", "progress"))
def denoise(
    model,
    process,
    noise: Float[Array, "B N P"],
    grid: Int[Array, "B 3"],
    lengths: Int[Array, "B"],
    texts: Texts,
    negative_texts: Texts | None,
    condition: Float[Array, "B N _"] | None,
    *,
    steps: int,
    guidance: float | Float[Array, ""],
    rescale: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> Float[Array, "B N P"]:
    """Noise -> latents, as tokens. Without `negative_texts` there is no guidance.

    Both halves of the guidance go through the network at once, in the order [uncond, cond].
    `progress` is called with the number of each finished step.
    """
    rows, length, _ = noise.shape
    real = jnp.arange(length)[None, :, None] < lengths[:, None, None]
    real = jnp.broadcast_to(real, noise.shape)

    def predict(x, time):
        inputs = x if condition is None else jnp.concatenate([x, condition], axis=-1)
        if negative_texts is None:
            return model(inputs, grid, lengths, jnp.full(rows, time), texts).astype(jnp.float32)
        inputs, grids, counts = (jnp.concatenate([a, a]) for a in (inputs, grid, lengths))
        both_texts = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), negative_texts, texts)
        both = model(inputs, grids, counts, jnp.full(2 * rows, time), both_texts)
        uncond, cond = jnp.split(both.astype(jnp.float32), 2)
        return guide(uncond, cond, guidance, rescale, where=real)

    def body(x, moment):
        number, (time, next_time) = moment
        x = process.step(x, predict(x, time), time, next_time)
        if progress is not None:
            jax.debug.callback(progress, number)
        return x, None

    moments = jnp.arange(1, steps + 1), jnp.asarray(process.intervals(steps))
    latents, _ = jax.lax.scan(body, noise, moments)
    return shard(latents, None, None, None)  # on every device, so that any host can decode


def text_to_video(
    model,
    vae: CausalVAE,
    process,
    texts: Texts,
    negative_texts: Texts,
    *,
    frames: int,
    height: int,
    width: int,
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 6.0,
    rescale: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> Videos:
    """One video per row of `texts`. An inpaint model is told that nothing is given (spec 6.2)."""
    num_tokens = math.prod(grid_of(frames, height, width))
    extra = model.config.in_channels - model.config.out_channels
    if extra not in (0, INPAINT_CHANNELS):
        raise ValueError(
            f"a model of {model.config.in_channels} input channels wants a control signal, and "
            f"text-to-video has none; use a T2V (16) or inpaint (33) checkpoint"
        )
    empty = jnp.zeros((len(seeds), num_tokens, extra * PATCH**2)) if extra else None
    return _generate(
        model,
        vae,
        process,
        texts,
        negative_texts,
        empty,
        size=(frames, height, width),
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        rescale=rescale,
        progress=progress,
    )


text_to_image = partial(text_to_video, frames=1)  # a picture is a video of one frame


def image_to_video(
    model,
    vae: CausalVAE,
    process,
    texts: Texts,
    negative_texts: Texts,
    *,
    start: Pictures | None = None,
    end: Pictures | None = None,
    frames: int,
    height: int,
    width: int,
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 6.0,
    rescale: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> Videos:
    """Videos that begin with `start`, end with `end`, or both (spec 6.2)."""
    grid_of(frames, height, width)
    extra = model.config.in_channels - model.config.out_channels
    if extra != INPAINT_CHANNELS:
        raise ValueError(
            f"a model of {model.config.in_channels} input channels cannot take pictures; "
            f"use an inpaint checkpoint (33), or text-to-video"
        )
    given = {index: pictures for index, pictures in ((0, start), (-1, end)) if pictures is not None}
    if not given or frames == 1:
        raise ValueError(
            f"{len(given)} pictures and {frames} frames: image-to-video wants a start or an end "
            f"picture, and 5 frames or more"
        )
    video = np.full((len(seeds), frames, height, width, 3), -1, np.float32)
    mask = np.ones((len(seeds), frames, height, width, 1), np.float32)
    for index, pictures in given.items():
        if pictures.shape != (len(seeds), height, width, 3):
            raise ValueError(
                f"pictures of shape {pictures.shape} for {len(seeds)} videos of {height}x{width}: "
                f"give one per seed, resized to that size"
            )
        video[:, index] = pictures.astype(np.float32) / 127.5 - 1
        mask[:, index] = 0
    condition = _by_rows(partial(_picture_tokens, vae), video, mask, np.asarray(seeds, np.uint32))
    return _generate(
        model,
        vae,
        process,
        texts,
        negative_texts,
        condition,
        size=(frames, height, width),
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        rescale=rescale,
        progress=progress,
    )


def decode(vae: CausalVAE, latents: Float[np.ndarray, "B T h w C"]) -> Videos:
    """Latents -> 8-bit videos, some rows at a time; truncated, not rounded, as in the reference."""
    return _by_rows(partial(_pixels, vae), latents, pixels_per_cell=64)


def _generate(
    model,
    vae,
    process,
    texts,
    negative_texts,
    condition,
    *,
    size,
    seeds,
    steps,
    guidance,
    rescale,
    progress,
):
    """Fill rows and tokens up to what the mesh divides, denoise, cut, decode."""
    rows, grid = len(seeds), grid_of(*size)
    num_tokens = math.prod(grid)
    if any(len(text) != rows for text in texts):
        raise ValueError(
            f"{[len(t) for t in texts]} rows of text and {rows} seeds: give a seed each"
        )
    all_rows = -rows % num_parts("batch") + rows
    length = -num_tokens % num_parts("tokens") + num_tokens

    def fill(x, size):
        padding = (0, all_rows - rows), (0, size - x.shape[1]), (0, 0)
        return jnp.pad(jnp.asarray(x), padding)

    def fill_texts(texts):
        repeated = (jnp.broadcast_to(text, (rows, *text.shape[1:])) for text in texts)
        return tuple(fill(text, text.shape[1]) for text in repeated)

    width = PATCH**2 * model.config.out_channels
    latents = denoise(
        model,
        process,
        fill(_noise(np.asarray(seeds, np.uint32), (num_tokens, width)), length),
        jnp.tile(jnp.asarray(grid, jnp.int32), (all_rows, 1)),
        jnp.full(all_rows, num_tokens, jnp.int32),
        fill_texts(texts),
        fill_texts(negative_texts) if guidance > 1 else None,
        None if condition is None else fill(condition, length),
        steps=steps,
        guidance=guidance,
        rescale=rescale,
        progress=progress,
    )
    return decode(vae, np.asarray(unpatchify(latents[:rows, :num_tokens], grid)))


@partial(jax.jit, static_argnames="shape")
def _noise(seeds, shape):
    def draw(seed):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), shape)

    return jax.vmap(draw)(seeds)


@jax.jit
def _picture_tokens(vae, video, mask, seeds):
    """The inpaint condition as tokens: the given pixels slightly noised, the posterior's mode."""

    def blur(seed, video):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return reference_noise(key, video[None], jnp.full(1, SAMPLING_NOISE))[0]

    video = jax.vmap(blur)(seeds, masked_video(video, mask))
    mean, _ = vae.chunked_encode(video)
    return patchify(inpaint_condition(mask, vae.normalize(mean)))


@jax.jit
def _pixels(vae, latents):
    video = vae.chunked_decode(vae.denormalize(latents))
    return (jnp.clip(video / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def _by_rows(function, *arrays: np.ndarray, pixels_per_cell: int = 1) -> np.ndarray:
    """`function` over equal groups of rows, the last one filled up: one compiled program."""
    rows, _, height, width, _ = arrays[0].shape
    groups = math.ceil(rows * height * width * pixels_per_cell / PIXELS_AT_ONCE)
    size = math.ceil(rows / min(groups, rows))
    parts = []
    for first in range(0, rows, size):
        index = np.minimum(np.arange(first, first + size), rows - 1)
        parts.append(np.asarray(function(*(x[index] for x in arrays))))
    return np.concatenate(parts)[:rows]
