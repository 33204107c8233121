"""The pipeline functions: generate videos from texts, pictures, videos or control signals.

Every function takes arrays and returns arrays. Its first arguments are the models, a `Diffusion`,
and a `Request`. Pixels are uint8. Each row draws its noise from its own seed, so a video does not
depend on the other rows of its batch. A mask is 1 where the video is generated and 0 where it is
kept. No function holds a reference to a part of `diffusion`, so parts can take turns in memory.
All raise ValueError for arrays and sizes that do not fit the request or the model.
"""

import math
import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from easyanimate_jax.data.buckets import check_size, grid_of, latent_frames
from easyanimate_jax.diffusion.conditioning import SAMPLING_NOISE
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.tasks import RAY_CHANNELS, numbers, task_of
from easyanimate_jax.facts import LATENT_CHANNELS, PATCH, SPACE_FACTOR, TIME_FACTOR
from easyanimate_jax.generation.calibration import Calibration
from easyanimate_jax.generation.denoising import Given, Source, denoise
from easyanimate_jax.generation.pixels import (
    Clips,
    Masks,
    Tokens,
    Videos,
    by_rows,
    camera_tokens,
    decode,
    encoded,
    inpaint_tokens,
    keep_tokens,
    pixels_of,
    rows_at_once,
)
from easyanimate_jax.generation.protocols import Diffusion
from easyanimate_jax.generation.request import OVERLAP
from easyanimate_jax.generation.rows import Request
from easyanimate_jax.memory import check_fit
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig, unpatchify
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.sharding import num_parts, shard

Rays = Float[np.ndarray, "B F H W 6"]
Pictures = UInt8[np.ndarray, "B _ _ 3"] | UInt8[np.ndarray, "B _ _ _ 3"]  # one or several per row


class LatentDiffusion(NamedTuple):
    """The models of a pipeline, all in memory: transformer, VAE and noise process."""

    model: MMDiT
    vae: CausalVAE
    process: DDPM | Flow
    calibration: Calibration | None = None  # of the transformer, for MagCache

    @property
    def config(self) -> MMDiTConfig:
        """Return the transformer's config."""
        return self.model.config


def text_to_video(diffusion: Diffusion, request: Request) -> Videos:
    """Return one video per text, uint8 (B, F, H, W, 3).

    An inpaint model gets an empty condition (spec 6.2). Raises ValueError for a control model.
    """
    request.check(diffusion.config)
    _want_free(diffusion, "text-to-video has none")
    return _generate(diffusion, request)


def image_to_video(
    diffusion: Diffusion,
    request: Request,
    *,
    start: Pictures | None = None,
    end: Pictures | None = None,
    picture_noise: float = SAMPLING_NOISE,
) -> Videos:
    """Return videos that begin with `start`, end with `end`, or both (spec 6.2).

    Each holds one picture per row, (B, H, W, 3), or several, (B, pictures, H, W, 3), in the videos'
    size. More `picture_noise`, in units of [-1, 1], allows more motion. Raises ValueError for a
    model that takes no pictures.
    """
    request.check(diffusion.config)
    _want_inpaint(diffusion, "pictures")
    video, mask = _place(request, start, end)
    condition = inpaint_tokens(diffusion.vae, video, mask, request.seeds, picture_noise)
    return _generate(diffusion, request, condition)


def _place(request: Request, start, end) -> tuple[Videos, Masks]:
    """Return videos that hold the pictures at their frames, and a mask of the other frames."""
    rows, frames, *sides = request.shape
    given = [
        (pictures if pictures.ndim == 5 else pictures[:, None], at_start)
        for pictures, at_start in ((start, True), (end, False))
        if pictures is not None
    ]
    count = sum(pictures.shape[1] for pictures, _ in given)
    if not given or count >= frames:
        least = (count + TIME_FACTOR - 1) // TIME_FACTOR * TIME_FACTOR + 1
        raise ValueError(
            f"{count} pictures and {frames} frames: image-to-video needs a start or an end "
            f"picture, and at least {least} frames for so many"
        )
    video = np.zeros((*request.shape, 3), np.uint8)
    mask = np.ones((*request.shape, 1), np.uint8)
    for pictures, at_start in given:
        if pictures.shape[:1] + pictures.shape[2:] != (rows, *sides, 3):
            raise ValueError(
                f"pictures of shape {pictures.shape} for {rows} videos of {sides[0]}x{sides[1]}: "
                f"give one per seed, resized to that size"
            )
        place = slice(pictures.shape[1]) if at_start else slice(-pictures.shape[1], None)
        video[:, place], mask[:, place] = pictures, 0
    return video, mask


def video_to_video(
    diffusion: Diffusion,
    request: Request,
    *,
    video: Videos,
    mask: Masks | None = None,
    strength: float = 0.7,
    picture_noise: float = SAMPLING_NOISE,
) -> Videos:
    """Return a changed version of `video`, (B, F, H, W, 3) (spec 6.6).

    A `strength` below 1 starts from the noised video, so less of it changes; 1 with a mask is
    inpainting. The video stays where `mask`, (B, F, H, W, 1), is 0. An inpaint model reads these
    pixels; for a T2V model each step restores them. Raises ValueError for a control model.
    """
    request.check(diffusion.config)
    _want_free(diffusion, "video-to-video has none")
    _check_video(request, video, mask)
    if mask is None and strength == 1:
        raise ValueError("strength 1 without a mask keeps nothing of the video: use less or a mask")
    if mask is not None and mask.all():
        mask = None  # nothing is kept: the inpaint condition is then zero, not black pixels
    condition = keep = source = None
    if mask is not None and extra_channels(diffusion):
        condition = inpaint_tokens(diffusion.vae, video, mask, request.seeds, picture_noise)
    elif mask is not None:
        keep = by_rows(keep_tokens, mask)
    if strength < 1 or keep is not None:
        source = Source(encoded(diffusion.vae, video), keep)
    return _generate(diffusion, request, condition, source, strength)


def _check_video(request: Request, video, mask) -> None:
    if len(video) != len(request.seeds):
        raise ValueError(f"{len(video)} videos and {len(request.seeds)} seeds: give a seed each")
    if video.shape != (*request.shape, 3):
        raise ValueError(
            f"a video of shape {video.shape} and a request of {request.shape}: use the same size"
        )
    if mask is not None and mask.shape != (*request.shape, 1):
        raise ValueError(
            f"a mask of shape {mask.shape} for videos of shape {video.shape}: give one value per "
            f"pixel and frame, 1 to generate it"
        )


def control_to_video(
    diffusion: Diffusion,
    request: Request,
    *,
    control: Videos | None = None,
    camera: Rays | None = None,
    reference: Pictures | None = None,
) -> Videos:
    """Return videos that follow a control video or a camera, and look like a picture (spec 7.1).

    `control` is (B, F, H, W, 3), `camera` Pluecker rays (B, F, H, W, 6), `reference` (B, H, W, 3).
    A missing input is zero. As in the reference code, a video of one frame ignores `reference`.
    Raises ValueError for an input that the model does not take.
    """
    request.check(diffusion.config)
    _check_control(diffusion, request, control, camera, reference)
    holds = task_of(diffusion.config.in_channels).holds
    if camera is not None:
        signal = by_rows(camera_tokens, camera)
    elif control is not None:
        signal = encoded(diffusion.vae, control)
    else:
        signal = _no_tokens(request, holds["camera" if "camera" in holds else "control video"])
    if "reference picture" not in holds:
        return _generate(diffusion, request, signal)
    look = _no_tokens(request, LATENT_CHANNELS)
    if reference is not None and request.size[0] > 1:
        first = encoded(diffusion.vae, reference[:, None])
        look[:, : first.shape[1]] = first
    return _generate(diffusion, request, np.concatenate([signal, look], axis=-1))


def _check_control(diffusion: Diffusion, request: Request, control, camera, reference):
    """Raise ValueError for an input that this model does not take, or of a wrong shape."""
    task = task_of(diffusion.config.in_channels)
    if not task.is_control:
        raise ValueError(
            f"a model of {diffusion.config.in_channels} input channels takes no control; use a "
            f"control ({numbers('control')}) or camera ({numbers('camera')}) checkpoint"
        )
    rows, _, *sides = request.shape
    for name, value, shape in (
        ("control", control, (*request.shape, 3)),
        ("camera", camera, (*request.shape, RAY_CHANNELS)),
        ("reference", reference, (rows, *sides, 3)),
    ):
        if value is not None and name not in task.inputs:
            raise ValueError(
                f"{name} is given, and this model takes a {' and a '.join(task.holds)}: "
                f"leave it out"
            )
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} of shape {value.shape}: it must be {shape}")


def long_video(
    diffusion: Diffusion,
    request: Request,
    *,
    segment: int = 49,
    overlap: int = OVERLAP,
    start: Pictures | None = None,
    end: Pictures | None = None,
) -> Videos:
    """Return videos of any length, generated in segments of `segment` frames (spec 6.7).

    Each segment begins with the last `overlap` frames of the previous one, and the shared frames
    are blended. The last segment shares up to 3 more, so that the length fits the request. `start`
    and `end` are those of `image_to_video`. Raises ValueError for a model that takes no pictures.
    """
    frames, *sides = request.size
    request.check(diffusion.config)
    check_size(segment, *sides)
    _want_inpaint(diffusion, "the last frames of a segment")
    if overlap < 1 or segment <= 2 * overlap:
        raise ValueError(
            f"segments of {segment} frames share {overlap}: share 1 frame or more, and use more "
            f"than {2 * overlap} frames"
        )
    videos = None
    for number, (first, stop) in enumerate(segments(frames, segment, overlap)):
        seeds = [_segment_seed(seed, number) for seed in request.seeds]
        part = request._replace(size=(stop - first, *sides), seeds=seeds)
        ends = {"start": start, "end": end if stop == frames else None}
        if videos is not None:
            ends["start"] = videos[:, first:]
        if ends["start"] is None and ends["end"] is None:
            made = text_to_video(diffusion, part)
        else:
            made = image_to_video(diffusion, part, **ends)
        videos = made if videos is None else _joined(videos, made, first)
    return videos


def _joined(videos: Clips, made: Clips, first: int) -> Clips:
    """Return `videos` extended by `made`, which starts at frame `first`, with blended overlap."""
    shared = videos.shape[1] - first
    weight = (np.arange(shared, dtype=np.float32) / shared)[None, :, None, None, None]
    mixed = videos[:, first:] * (1 - weight) + made[:, :shared] * weight
    return np.concatenate([videos[:, :first], mixed.astype(np.uint8), made[:, shared:]], axis=1)


def segments(frames: int, segment: int, overlap: int = OVERLAP) -> list[tuple[int, int]]:
    """Return (first frame, stop) of each segment of a long video; each has 4n+1 frames."""
    parts = [(0, min(segment, frames))]
    while parts[-1][1] < frames:
        first = parts[-1][1] - overlap
        if frames - first <= segment:
            length = (frames - first + 2) // TIME_FACTOR * TIME_FACTOR + 1
            parts.append((frames - length, frames))
        else:
            parts.append((first, first + segment))
    return parts


def _segment_seed(seed: int, number: int) -> int:
    """Return the seed of segment `number`; segment 0 keeps `seed`."""
    return (seed + number * 0x9E3779B9) % 2**32


def extra_channels(diffusion: Diffusion) -> int:
    """Return the number of clean input channels that the model reads beside the noisy ones."""
    return diffusion.config.in_channels - LATENT_CHANNELS


def _want_free(diffusion, why: str) -> None:
    if task_of(diffusion.config.in_channels).is_control:
        raise ValueError(
            f"a model of {diffusion.config.in_channels} input channels needs a control signal, and "
            f"{why}; use a T2V or inpaint checkpoint ({numbers('text_to_video')})"
        )


def _want_inpaint(diffusion, what: str) -> None:
    if "image_to_video" not in task_of(diffusion.config.in_channels).ways:
        raise ValueError(
            f"a model of {diffusion.config.in_channels} input channels cannot take {what}; "
            f"use an inpaint checkpoint ({numbers('image_to_video')}), or text-to-video"
        )


def _no_tokens(request: Request, channels: int) -> np.ndarray:
    """Return zeros in the shape of condition tokens with so many channels."""
    num_tokens = math.prod(grid_of(*request.size))
    return np.zeros((len(request.seeds), num_tokens, channels * PATCH**2), np.float32)


def condition_to_video(
    diffusion: Diffusion, request: Request, *, condition: Tokens | None = None
) -> Videos:
    """Return the videos of a condition that is already encoded, as `denoise_latents` takes it."""
    return _generate(diffusion, request, condition)


def _generate(
    diffusion: Diffusion,
    request: Request,
    condition: Tokens | None = None,
    source: Source | None = None,
    strength: float = 1.0,
) -> Videos:
    """Check the memory for decoding, denoise, warn about rows that are not finite, and decode."""
    rows, frames, height, width = request.shape
    at_once = rows_at_once(rows, height * width)
    shape = at_once, latent_frames(frames), height // SPACE_FACTOR, width // SPACE_FACTOR
    check_fit(
        f"decoding {at_once} x {frames}x{height}x{width}",
        pixels_of,
        diffusion.vae,
        jax.ShapeDtypeStruct((*shape, LATENT_CHANNELS), jnp.float32),
        tile=request.tile,
    )
    latents = denoise_latents(
        diffusion, request, condition=condition, source=source, strength=strength
    )
    for seed, row in zip(request.seeds, latents, strict=True):
        if not np.isfinite(row).all():
            warnings.warn(
                f"the latents of seed {seed} are not finite: the weights hold NaN, or values "
                f"exceed the range of bfloat16; use an earlier checkpoint, or less guidance",
                RuntimeWarning,
                stacklevel=3,
            )
    return decode(diffusion.vae, latents, request.tile)


def denoise_latents(
    diffusion: Diffusion,
    request: Request,
    *,
    condition: Tokens | None = None,
    source: Source | None = None,
    strength: float = 1.0,
) -> Float[np.ndarray, "B T h w 16"]:
    """Return the latents of a request before decoding, normalised, float32.

    `condition` holds the clean input channels of each token, (B, N, 4 x channels) float32 in the
    order of `models.mmdit.patchify`; None stands for zeros. `source` is a video to start from, as
    tokens. `strength`, from 0 to 1, is the share of the steps that start from it; 1 starts from
    noise.

    Rows and tokens are padded so that the current mesh divides them; the padding is removed from
    the result. Raises ValueError for a request or a condition that does not fit the model, and,
    before the first step, if a device has too little memory.
    """
    sampling = request.sampling
    latents = denoise(
        diffusion.model,
        diffusion.process,
        given_of(diffusion, request, condition, source),
        sampling,
        strength=strength,
        calibration=diffusion.calibration if sampling.magcache else None,
        progress=request.progress,
    )
    grid = grid_of(*request.size)
    return unpatchify(np.asarray(latents)[: len(request.seeds), : math.prod(grid)], grid)


def given_of(
    diffusion: Diffusion,
    request: Request,
    condition: Tokens | None = None,
    source: Source | None = None,
) -> Given:
    """Return the inputs of the denoising loop, padded so that the mesh divides rows and tokens.

    Arguments and errors are those of `denoise_latents`.
    """
    request.check(diffusion.config)
    rows, grid = len(request.seeds), grid_of(*request.size)
    num_tokens = math.prod(grid)
    condition = _condition(diffusion, request, condition)
    all_rows = -rows % num_parts("batch") + rows
    length = -num_tokens % num_parts("tokens") + num_tokens

    def fill(x, size):
        padding = (0, all_rows - rows), (0, size - x.shape[1]), (0, 0)
        return np.pad(np.asarray(x), padding)

    def fill_texts(texts):
        repeated = (np.broadcast_to(text, (rows, *text.shape[1:])) for text in texts)
        return tuple(fill(text, text.shape[1]) for text in repeated)

    seeds, width = np.asarray(request.seeds, np.uint32), PATCH**2 * LATENT_CHANNELS
    guided = request.sampling.guidance > 1
    return Given(
        noise=fill(_noise(seeds, (num_tokens, width)), length),
        seeds=np.pad(seeds, (0, all_rows - rows)),
        grid=np.tile(np.asarray(grid, np.int32), (all_rows, 1)),
        lengths=np.full(all_rows, num_tokens, np.int32),
        texts=fill_texts(request.texts),
        negative_texts=fill_texts(request.negative_texts) if guided else None,
        condition=None if condition is None else fill(condition, length),
        source=jax.tree.map(lambda x: fill(x, length), source),
    )


def _condition(diffusion: Diffusion, request: Request, given: Tokens | None) -> Tokens | None:
    """Return the condition, checked: zeros if None is given, None if the model reads none."""
    channels, num_tokens = extra_channels(diffusion), math.prod(grid_of(*request.size))
    wanted = len(request.seeds), num_tokens, channels * PATCH**2
    if given is None:
        return _no_tokens(request, channels) if channels else None
    if given.shape != wanted:
        raise ValueError(
            f"a condition of shape {given.shape}: a model of {diffusion.config.in_channels} input "
            f"channels reads {wanted} for this request"
        )
    return given


@partial(jax.jit, static_argnames="shape")
def _noise(seeds, shape):
    def draw(seed):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), shape)

    return shard(jax.vmap(draw)(seeds), None, None, None)
