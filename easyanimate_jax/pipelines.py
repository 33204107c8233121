"""From encoded text, pictures and videos to videos: the pipelines around one denoising program.

Arrays in, arrays out. Text comes as encoder states, a tuple of one or two (B, L, width) arrays for
the prompts and for the negative prompt; the latter may have a single row for all. Each row draws
its noise from a seed of its own, so a video does not depend on what else is in the batch. A mask is
1 where the video is to be made and 0 where it is given.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from easyanimate_jax.data.buckets import PATCH, check_size, grid_of
from easyanimate_jax.denoising import Sampling, Source, Texts, denoise
from easyanimate_jax.diffusion.conditioning import (
    SAMPLING_NOISE,
    camera_condition,
    inpaint_condition,
    masked_video,
    reference_noise,
    repaint_mask,
)
from easyanimate_jax.models.mmdit import patchify, unpatchify
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.sharding import num_parts

Videos = UInt8[np.ndarray, "B F H W 3"]
Masks = UInt8[np.ndarray, "_ _ _ _ 1"]
Rays = Float[np.ndarray, "B F H W 6"]
Pictures = UInt8[np.ndarray, "B _ _ 3"] | UInt8[np.ndarray, "B _ _ _ 3"]  # one a row, or several
Progress = Callable[[int], None] | None

DEFAULT = Sampling()
INPAINT_CHANNELS = 17  # a mask and the latents of the given pixels (spec 6)
LATENT_CHANNELS, RAY_CHANNELS = 16, 6
OVERLAP = 4  # frames that a segment of a long video shares with the one before
PIXELS_AT_ONCE = 2**18  # of one frame, in the VAE: a row of 512 x 512, or 64 rows of 64 x 64


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
    sampling: Sampling = DEFAULT,
    progress: Progress = None,
) -> Videos:
    """One video per row of `texts`. An inpaint model is told that nothing is given (spec 6.2)."""
    check_size(frames, height, width)
    if extra_channels(model) not in (0, INPAINT_CHANNELS):
        raise ValueError(
            f"a model of {model.config.in_channels} input channels wants a control signal, and "
            f"text-to-video has none; use a T2V (16) or inpaint (33) checkpoint"
        )
    return _generate(
        model,
        vae,
        process,
        texts,
        negative_texts,
        size=(frames, height, width),
        seeds=seeds,
        sampling=sampling,
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
    sampling: Sampling = DEFAULT,
    picture_noise: float = SAMPLING_NOISE,
    progress: Progress = None,
) -> Videos:
    """Videos that begin with `start`, end with `end`, or both; each a picture or several (6.2).

    More `picture_noise` on the given pictures lets the video move more.
    """
    check_size(frames, height, width)
    _want_inpaint(model, "pictures")
    rows = len(seeds)
    given = {
        name: pictures if pictures.ndim == 5 else pictures[:, None]
        for name, pictures in (("start", start), ("end", end))
        if pictures is not None
    }
    count = sum(pictures.shape[1] for pictures in given.values())
    if not given or count >= frames:
        raise ValueError(
            f"{count} pictures and {frames} frames: image-to-video wants a start or an end "
            f"picture, and at least {_frames_above(count)} frames for so many"
        )
    video = np.zeros((rows, frames, height, width, 3), np.uint8)
    mask = np.ones((rows, frames, height, width, 1), np.uint8)
    for name, pictures in given.items():
        if pictures.shape[:1] + pictures.shape[2:] != (rows, height, width, 3):
            raise ValueError(
                f"pictures of shape {pictures.shape} for {rows} videos of {height}x{width}: "
                f"give one per seed, resized to that size"
            )
        place = slice(pictures.shape[1]) if name == "start" else slice(-pictures.shape[1], None)
        video[:, place], mask[:, place] = pictures, 0
    return _generate(
        model,
        vae,
        process,
        texts,
        negative_texts,
        condition=_inpaint_tokens(vae, video, mask, seeds, picture_noise),
        size=(frames, height, width),
        seeds=seeds,
        sampling=sampling,
        progress=progress,
    )


def _frames_above(count: int) -> int:
    """The smallest possible number of frames above `count`."""
    return max(5, count // 4 * 4 + (1 if count % 4 == 0 else 5))


def video_to_video(
    model,
    vae: CausalVAE,
    process,
    texts: Texts,
    negative_texts: Texts,
    *,
    video: Videos,
    mask: Masks | None = None,
    strength: float = 0.7,
    seeds: Sequence[int],
    sampling: Sampling = DEFAULT,
    picture_noise: float = SAMPLING_NOISE,
    progress: Progress = None,
) -> Videos:
    """`video` made anew (spec 6.6); with a strength of 1 and a mask this is inpainting.

    A strength below 1 starts from the noised video, so that less of it changes. Where `mask` is 0
    the video stays: an inpaint model sees it there, and a T2V model has it put back at each step.
    """
    rows, *size, _ = video.shape
    check_size(*size)
    extra = extra_channels(model)
    if extra not in (0, INPAINT_CHANNELS):
        raise ValueError(
            f"a model of {model.config.in_channels} input channels wants a control signal; "
            f"video-to-video takes a T2V (16) or inpaint (33) checkpoint"
        )
    if rows != len(seeds):
        raise ValueError(f"{rows} videos and {len(seeds)} seeds: give a seed each")
    if mask is not None and mask.shape != (*video.shape[:4], 1):
        raise ValueError(
            f"a mask of shape {mask.shape} for videos of shape {video.shape}: give one value per "
            f"pixel and frame, 1 to make it anew"
        )
    if mask is None and strength == 1:
        raise ValueError("strength 1 without a mask keeps nothing of the video: give less, or mask")
    if mask is not None and mask.all():
        mask = None  # nothing is given: the inpaint model's condition is zero, not of black pixels
    condition = keep = None
    if mask is not None and extra:
        condition = _inpaint_tokens(vae, video, mask, seeds, picture_noise)
    if mask is not None and not extra:
        keep = _by_rows(_keep_tokens, mask)
    source = None
    if strength < 1 or keep is not None:
        source = Source(_by_rows(partial(_video_tokens, vae), video), keep)
    return _generate(
        model,
        vae,
        process,
        texts,
        negative_texts,
        condition=condition,
        source=source,
        strength=strength,
        size=tuple(size),
        seeds=seeds,
        sampling=sampling,
        progress=progress,
    )


def control_to_video(
    model,
    vae: CausalVAE,
    process,
    texts: Texts,
    negative_texts: Texts,
    *,
    control: Videos | None = None,
    camera: Rays | None = None,
    reference: Pictures | None = None,
    frames: int,
    height: int,
    width: int,
    seeds: Sequence[int],
    sampling: Sampling = DEFAULT,
    progress: Progress = None,
) -> Videos:
    """Videos that follow a control video or a camera, with a picture to look like (spec 7.1).

    What is not given is zero. As in the reference, a video of one frame has no reference picture.
    """
    check_size(frames, height, width)
    rows, shape = len(seeds), (len(seeds), frames, height, width)
    wanted = {
        LATENT_CHANNELS: "a control video",
        2 * LATENT_CHANNELS: "a control video and a reference picture",
        RAY_CHANNELS + LATENT_CHANNELS: "a camera and a reference picture",
    }
    extra = extra_channels(model)
    if extra not in wanted:
        raise ValueError(
            f"a model of {model.config.in_channels} input channels takes no control; use a "
            f"control (32 or 48) or camera (38) checkpoint"
        )
    has_camera, has_reference = extra == RAY_CHANNELS + LATENT_CHANNELS, extra > LATENT_CHANNELS
    for name, value, fits in (
        ("control", control, not has_camera),
        ("camera", camera, has_camera),
        ("reference", reference, has_reference),
    ):
        if value is not None and not fits:
            raise ValueError(f"{name} is given, and this model takes {wanted[extra]}: leave it out")
    for name, value, channels in (("control", control, 3), ("camera", camera, 6)):
        if value is not None and value.shape != (*shape, channels):
            raise ValueError(f"{name} of shape {value.shape}: it must be {(*shape, channels)}")
    if reference is not None and reference.shape != (rows, height, width, 3):
        raise ValueError(
            f"reference of shape {reference.shape}: it must be {(rows, height, width, 3)}"
        )
    grid = grid_of(frames, height, width)
    signal = RAY_CHANNELS if has_camera else LATENT_CHANNELS
    parts = [np.zeros((rows, math.prod(grid), signal * PATCH**2), np.float32)]
    if control is not None:
        parts = [_by_rows(partial(_video_tokens, vae), control)]
    if camera is not None:
        parts = [_by_rows(_camera_tokens, camera)]
    if has_reference:
        tokens = np.zeros((rows, math.prod(grid), LATENT_CHANNELS * PATCH**2), np.float32)
        if reference is not None and frames > 1:
            first = _by_rows(partial(_video_tokens, vae), reference[:, None])
            tokens[:, : first.shape[1]] = first
        parts.append(tokens)
    return _generate(
        model,
        vae,
        process,
        texts,
        negative_texts,
        condition=np.concatenate(parts, axis=-1),
        size=(frames, height, width),
        seeds=seeds,
        sampling=sampling,
        progress=progress,
    )


def long_video(
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
    segment: int = 49,
    start: Pictures | None = None,
    end: Pictures | None = None,
    sampling: Sampling = DEFAULT,
    progress: Progress = None,
) -> Videos:
    """Videos of any length, in segments that begin with the last frames of the one before (6.7).

    The shared frames are blended. The last segment shares up to three more, so that the video has
    the length that was asked for.
    """
    check_size(frames, height, width)
    check_size(segment, height, width)
    _want_inpaint(model, "the last frames of a segment")
    if segment <= 2 * OVERLAP:
        raise ValueError(f"segments of {segment} frames share {OVERLAP}: use 9 frames or more")
    make = partial(
        image_to_video,
        model,
        vae,
        process,
        texts,
        negative_texts,
        height=height,
        width=width,
        sampling=sampling,
        progress=progress,
    )
    parts = segments(frames, segment)
    videos = None
    for number, (first, stop) in enumerate(parts):
        size = {"frames": stop - first, "seeds": [_segment_seed(seed, number) for seed in seeds]}
        ends = {"end": end if stop == frames else None}
        if videos is None:
            pictures = {"start": start} | ends
            if start is None and ends["end"] is None:
                videos = text_to_video(*make.args, **make.keywords, **size)
            else:
                videos = make(**pictures, **size)
            continue
        shared = videos.shape[1] - first
        made = make(start=videos[:, first:], **ends, **size)
        weight = (np.arange(shared, dtype=np.float32) / shared)[None, :, None, None, None]
        mixed = videos[:, first:] * (1 - weight) + made[:, :shared] * weight
        videos = np.concatenate(
            [videos[:, :first], mixed.astype(np.uint8), made[:, shared:]], axis=1
        )
    return videos


def segments(frames: int, segment: int) -> list[tuple[int, int]]:
    """(first frame, stop) of the segments of a long video, each of 4n+1 frames."""
    parts = [(0, min(segment, frames))]
    while parts[-1][1] < frames:
        first = parts[-1][1] - OVERLAP
        if frames - first <= segment:
            length = (frames - first + 2) // 4 * 4 + 1
            parts.append((frames - length, frames))
        else:
            parts.append((first, first + segment))
    return parts


def _segment_seed(seed: int, number: int) -> int:
    """Other noise for every segment, the seed's own for the first."""
    return (seed + number * 0x9E3779B9) % 2**32


def extra_channels(model) -> int:
    """Clean channels that the model takes beside the noisy ones."""
    return model.config.in_channels - model.config.out_channels


def _want_inpaint(model, what: str) -> None:
    if extra_channels(model) != INPAINT_CHANNELS:
        raise ValueError(
            f"a model of {model.config.in_channels} input channels cannot take {what}; "
            f"use an inpaint checkpoint (33), or text-to-video"
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
    *,
    size,
    seeds,
    sampling,
    condition=None,
    source=None,
    strength=1.0,
    progress=None,
):
    """Fill rows and tokens up to what the mesh divides, denoise, cut, decode."""
    rows, grid = len(seeds), grid_of(*size)
    num_tokens = math.prod(grid)
    if any(len(text) != rows for text in texts):
        raise ValueError(
            f"{[len(t) for t in texts]} rows of text and {rows} seeds: give a seed each"
        )
    if condition is None and extra_channels(model):
        condition = np.zeros((rows, num_tokens, extra_channels(model) * PATCH**2), np.float32)
    all_rows = -rows % num_parts("batch") + rows
    length = -num_tokens % num_parts("tokens") + num_tokens

    def fill(x, size):
        padding = (0, all_rows - rows), (0, size - x.shape[1]), (0, 0)
        return jnp.pad(jnp.asarray(x), padding)

    def fill_texts(texts):
        repeated = (jnp.broadcast_to(text, (rows, *text.shape[1:])) for text in texts)
        return tuple(fill(text, text.shape[1]) for text in repeated)

    seeds = np.asarray(seeds, np.uint32)
    latents = denoise(
        model,
        process,
        fill(_noise(seeds, (num_tokens, PATCH**2 * model.config.out_channels)), length),
        np.pad(seeds, (0, all_rows - rows)),
        jnp.tile(jnp.asarray(grid, jnp.int32), (all_rows, 1)),
        jnp.full(all_rows, num_tokens, jnp.int32),
        fill_texts(texts),
        fill_texts(negative_texts) if sampling.guidance > 1 else None,
        None if condition is None else fill(condition, length),
        jax.tree.map(lambda x: fill(x, length), source),
        sampling=sampling,
        strength=strength,
        progress=progress,
    )
    latents = np.asarray(unpatchify(latents[:rows, :num_tokens], grid))
    for seed, row in zip(seeds, latents, strict=True):
        if not np.isfinite(row).all():
            warnings.warn(
                f"the latents of seed {seed} are not finite: the weights hold NaN, or the numbers "
                f"leave bfloat16; use an earlier checkpoint, or less guidance",
                RuntimeWarning,
                stacklevel=3,
            )
    return decode(vae, latents)


@partial(jax.jit, static_argnames="shape")
def _noise(seeds, shape):
    def draw(seed):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), shape)

    return jax.vmap(draw)(seeds)


def _inpaint_tokens(vae, video, mask, seeds, noise) -> np.ndarray:
    """The inpaint condition of 8-bit videos as tokens."""
    seeds, strengths = np.asarray(seeds, np.uint32), np.full(len(seeds), noise, np.float32)
    return _by_rows(partial(_picture_tokens, vae), video, mask, seeds, strengths)


@jax.jit
def _picture_tokens(vae, video, mask, seeds, strengths):
    """The inpaint condition: the given pixels slightly noised, the posterior's mode."""

    def blur(seed, video, strength):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return reference_noise(key, video[None], strength[None])[0]

    mask = mask.astype(jnp.float32)
    video = jax.vmap(blur)(seeds, masked_video(_values(video), mask), strengths)
    mean, _ = vae.chunked_encode(video)
    return patchify(inpaint_condition(mask, vae.normalize(mean)))


@jax.jit
def _video_tokens(vae, video):
    """The posterior's mode."""
    mean, _ = vae.chunked_encode(_values(video))
    return patchify(vae.normalize(mean))


@jax.jit
def _camera_tokens(rays):
    return patchify(camera_condition(rays))


@jax.jit
def _keep_tokens(mask):
    keep = 1 - repaint_mask(mask.astype(jnp.float32))
    return patchify(jnp.repeat(keep, LATENT_CHANNELS, axis=-1))


def _values(video):
    return video.astype(jnp.float32) / 127.5 - 1


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
