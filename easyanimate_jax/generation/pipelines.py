"""From encoded text, pictures and videos to videos: the pipelines around one denoising program.

Arrays in, arrays out. Every way takes what makes videos, a `LatentDiffusion`, and what is asked of
every way, a `Request`; the rest is its own. Each row draws its noise from a seed of its own, so a
video does not depend on what else is in the batch. A mask is 1 where the video is to be made and 0
where it is given.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from easyanimate_jax.data.buckets import PATCH, check_size, grid_of
from easyanimate_jax.diffusion.conditioning import (
    SAMPLING_NOISE,
    camera_condition,
    inpaint_condition,
    masked_video,
    reference_noise,
    repaint_mask,
)
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.generation.denoising import Given, Sampling, Source, Texts, denoise
from easyanimate_jax.generation.request import STARTS, SampleRequest, given
from easyanimate_jax.memory import check_fit
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig, patchify, unpatchify
from easyanimate_jax.models.vae import SPACE_FACTOR, CausalVAE
from easyanimate_jax.sharding import num_parts, shard

Videos = UInt8[np.ndarray, "B F H W 3"]
Clips = UInt8[np.ndarray, "B _ H W 3"]  # of several lengths
Masks = UInt8[np.ndarray, "_ _ _ _ 1"]
Rays = Float[np.ndarray, "B F H W 6"]
Pictures = UInt8[np.ndarray, "B _ _ 3"] | UInt8[np.ndarray, "B _ _ _ 3"]  # one a row, or several

LATENT_CHANNELS, RAY_CHANNELS = 16, 6
INPAINT_CHANNELS = 17  # a mask and the latents of the given pixels (spec 6)
CAMERA_CHANNELS = RAY_CHANNELS + LATENT_CHANNELS  # with a reference picture
CONTROLLED = {  # what a model takes, by its extra channels
    LATENT_CHANNELS: "a control video",
    2 * LATENT_CHANNELS: "a control video and a reference picture",
    CAMERA_CHANNELS: "a camera and a reference picture",
}
OVERLAP = 4  # frames that a segment of a long video shares with the one before
PIXELS_AT_ONCE = 2**18  # of one frame, in the VAE: a row of 512 x 512, or 64 rows of 64 x 64


class LatentDiffusion(NamedTuple):
    """What makes videos: the transformer, the autoencoder of its latents, the noise process.

    `runs.Resident` stands in its place, with parts that are read when they are asked for: so ways
    keep none of them, and name no type.
    """

    model: MMDiT
    vae: CausalVAE
    process: DDPM | Flow

    @property
    def config(self) -> MMDiTConfig:
        return self.model.config


class Request(NamedTuple):
    """What is asked of every way: a video a row.

    Texts are encoder states, a tuple of one or two (B, L, width) arrays; of the negative ones a
    single row serves all. `progress` is called with the number of each finished evaluation.
    """

    texts: Texts
    negative_texts: Texts
    size: tuple[int, int, int]  # frames, height, width; one frame is a picture
    seeds: Sequence[int]
    sampling: Sampling = Sampling()
    progress: Callable[[int], None] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, F, H, W) of the videos."""
        return len(self.seeds), *self.size


def way_of(request: SampleRequest) -> tuple[Callable[..., Videos], dict, int]:
    """Return the way that a completed request goes: the pipeline, its own options beside the
    arrays of files, and how many times it denoises, one segment after another."""
    noise = {"picture_noise": request.picture_noise}
    if request.video:
        return video_to_video, {"strength": request.strength} | noise, 1
    if any(given(request, name) for name in STARTS):
        return control_to_video, {}, 1
    if request.segment and request.frames > request.segment:
        count = len(segments(request.frames, request.segment))
        return long_video, {"segment": request.segment}, count
    if request.image or request.end_image:
        return image_to_video, noise, 1
    return text_to_video, {}, 1


def text_to_video(diffusion, request: Request) -> Videos:
    """A video per text. An inpaint model is told that nothing is given (spec 6.2)."""
    check_size(*request.size)
    _want_free(diffusion, "text-to-video has none")
    return _generate(diffusion, request)


def image_to_video(
    diffusion,
    request: Request,
    *,
    start: Pictures | None = None,
    end: Pictures | None = None,
    picture_noise: float = SAMPLING_NOISE,
) -> Videos:
    """Videos that begin with `start`, end with `end`, or both; each a picture or several (6.2).

    More `picture_noise` on the given pictures lets the video move more.
    """
    check_size(*request.size)
    _want_inpaint(diffusion, "pictures")
    video, mask = _place(request, start, end)
    condition = _inpaint_tokens(diffusion.vae, video, mask, request.seeds, picture_noise)
    return _generate(diffusion, request, condition)


def _place(request: Request, start, end) -> tuple[Videos, Masks]:
    """The pictures at their places in empty videos, and the mask of the rest."""
    rows, frames, *sides = request.shape
    given = [
        (pictures if pictures.ndim == 5 else pictures[:, None], at_start)
        for pictures, at_start in ((start, True), (end, False))
        if pictures is not None
    ]
    count = sum(pictures.shape[1] for pictures, _ in given)
    if not given or count >= frames:
        raise ValueError(
            f"{count} pictures and {frames} frames: image-to-video wants a start or an end "
            f"picture, and at least {_frames_above(count)} frames for so many"
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


def _frames_above(count: int) -> int:
    """The smallest possible number of frames above `count`."""
    return max(5, count // 4 * 4 + (1 if count % 4 == 0 else 5))


def video_to_video(
    diffusion,
    request: Request,
    *,
    video: Videos,
    mask: Masks | None = None,
    strength: float = 0.7,
    picture_noise: float = SAMPLING_NOISE,
) -> Videos:
    """`video` made anew (spec 6.6); with a strength of 1 and a mask this is inpainting.

    A strength below 1 starts from the noised video, so that less of it changes. Where `mask` is 0
    the video stays: an inpaint model sees it there, and a T2V model has it put back at each step.
    """
    check_size(*request.size)
    _want_free(diffusion, "video-to-video has none")
    _check_video(request, video, mask)
    if mask is None and strength == 1:
        raise ValueError("strength 1 without a mask keeps nothing of the video: give less, or mask")
    if mask is not None and mask.all():
        mask = None  # nothing is given: the inpaint model's condition is zero, not of black pixels
    condition = keep = source = None
    if mask is not None and extra_channels(diffusion):
        condition = _inpaint_tokens(diffusion.vae, video, mask, request.seeds, picture_noise)
    elif mask is not None:
        keep = _by_rows(_keep_tokens, mask)
    if strength < 1 or keep is not None:
        source = Source(_encoded(diffusion, video), keep)
    return _generate(diffusion, request, condition, source, strength)


def _check_video(request: Request, video, mask) -> None:
    if len(video) != len(request.seeds):
        raise ValueError(f"{len(video)} videos and {len(request.seeds)} seeds: give a seed each")
    if video.shape != (*request.shape, 3):
        raise ValueError(
            f"a video of shape {video.shape} and a request of {request.shape}: ask for its own size"
        )
    if mask is not None and mask.shape != (*request.shape, 1):
        raise ValueError(
            f"a mask of shape {mask.shape} for videos of shape {video.shape}: give one value per "
            f"pixel and frame, 1 to make it anew"
        )


def control_to_video(
    diffusion,
    request: Request,
    *,
    control: Videos | None = None,
    camera: Rays | None = None,
    reference: Pictures | None = None,
) -> Videos:
    """Videos that follow a control video or a camera, with a picture to look like (spec 7.1).

    What is not given is zero. As in the reference, a video of one frame has no reference picture.
    """
    check_size(*request.size)
    _check_control(diffusion, request, control, camera, reference)
    extra = extra_channels(diffusion)
    if camera is not None:
        signal = _by_rows(_camera_tokens, camera)
    elif control is not None:
        signal = _encoded(diffusion, control)
    else:
        signal = _no_tokens(request, RAY_CHANNELS if extra == CAMERA_CHANNELS else LATENT_CHANNELS)
    if extra == LATENT_CHANNELS:
        return _generate(diffusion, request, signal)
    look = _no_tokens(request, LATENT_CHANNELS)
    if reference is not None and request.size[0] > 1:
        first = _encoded(diffusion, reference[:, None])
        look[:, : first.shape[1]] = first
    return _generate(diffusion, request, np.concatenate([signal, look], axis=-1))


def _check_control(diffusion, request: Request, control, camera, reference):
    """Refuse what this model does not take, or takes in another shape."""
    extra = extra_channels(diffusion)
    if extra not in CONTROLLED:
        raise ValueError(
            f"a model of {diffusion.config.in_channels} input channels takes no control; use a "
            f"control (32 or 48) or camera (38) checkpoint"
        )
    rows, _, *sides = request.shape
    for name, value, takers, shape in (
        ("control", control, (LATENT_CHANNELS, 2 * LATENT_CHANNELS), (*request.shape, 3)),
        ("camera", camera, (CAMERA_CHANNELS,), (*request.shape, RAY_CHANNELS)),
        ("reference", reference, (2 * LATENT_CHANNELS, CAMERA_CHANNELS), (rows, *sides, 3)),
    ):
        if value is not None and extra not in takers:
            raise ValueError(
                f"{name} is given, and this model takes {CONTROLLED[extra]}: leave it out"
            )
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} of shape {value.shape}: it must be {shape}")


def long_video(
    diffusion,
    request: Request,
    *,
    segment: int = 49,
    start: Pictures | None = None,
    end: Pictures | None = None,
) -> Videos:
    """Videos of any length, in segments that begin with the last frames of the one before (6.7).

    The shared frames are blended. The last segment shares up to three more, so that the video has
    the length that was asked for.
    """
    frames, *sides = request.size
    check_size(*request.size)
    check_size(segment, *sides)
    _want_inpaint(diffusion, "the last frames of a segment")
    if segment <= 2 * OVERLAP:
        raise ValueError(f"segments of {segment} frames share {OVERLAP}: use 9 frames or more")
    videos = None
    for number, (first, stop) in enumerate(segments(frames, segment)):
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
    """Frame 0 of `made` is frame `first` of `videos`; the frames of both are blended."""
    shared = videos.shape[1] - first
    weight = (np.arange(shared, dtype=np.float32) / shared)[None, :, None, None, None]
    mixed = videos[:, first:] * (1 - weight) + made[:, :shared] * weight
    return np.concatenate([videos[:, :first], mixed.astype(np.uint8), made[:, shared:]], axis=1)


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


def extra_channels(diffusion) -> int:
    """Clean channels that the model takes beside the noisy ones."""
    return diffusion.config.in_channels - diffusion.config.out_channels


def _want_free(diffusion, why: str) -> None:
    if extra_channels(diffusion) not in (0, INPAINT_CHANNELS):
        raise ValueError(
            f"a model of {diffusion.config.in_channels} input channels wants a control signal, and "
            f"{why}; use a T2V (16) or inpaint (33) checkpoint"
        )


def _want_inpaint(diffusion, what: str) -> None:
    if extra_channels(diffusion) != INPAINT_CHANNELS:
        raise ValueError(
            f"a model of {diffusion.config.in_channels} input channels cannot take {what}; "
            f"use an inpaint checkpoint (33), or text-to-video"
        )


def _no_tokens(request: Request, channels: int) -> np.ndarray:
    """Zeros, as condition tokens of so many channels."""
    num_tokens = math.prod(grid_of(*request.size))
    return np.zeros((len(request.seeds), num_tokens, channels * PATCH**2), np.float32)


def decode(vae: CausalVAE, latents: Float[np.ndarray, "B T h w C"]) -> Videos:
    """Latents -> 8-bit videos, some rows at a time; truncated, not rounded, as in the reference."""
    return _by_rows(partial(_pixels, vae), latents, pixels_per_cell=64)


def _generate(diffusion, request: Request, condition=None, source=None, strength=1.0) -> Videos:
    """Denoise, say which rows failed, decode. What decoding takes is looked at first."""
    rows, frames, height, width = request.shape
    at_once = _rows_at_once(rows, height * width)
    shape = at_once, (frames + 3) // 4, height // SPACE_FACTOR, width // SPACE_FACTOR
    check_fit(
        f"decoding {at_once} x {frames}x{height}x{width}",
        _pixels,
        diffusion.vae,
        jax.ShapeDtypeStruct((*shape, LATENT_CHANNELS), jnp.float32),
    )
    latents = make_latents(diffusion, request, condition, source, strength)
    for seed, row in zip(request.seeds, latents, strict=True):
        if not np.isfinite(row).all():
            warnings.warn(
                f"the latents of seed {seed} are not finite: the weights hold NaN, or the numbers "
                f"leave bfloat16; use an earlier checkpoint, or less guidance",
                RuntimeWarning,
                stacklevel=3,
            )
    return decode(diffusion.vae, latents)


def make_latents(
    diffusion, request: Request, condition=None, source=None, strength=1.0
) -> Float[np.ndarray, "B T h w C"]:
    """Rows and tokens are filled up to what the mesh divides, denoised, and cut again."""
    rows, grid = len(request.seeds), grid_of(*request.size)
    num_tokens = math.prod(grid)
    if any(len(text) != rows for text in request.texts):
        counts = [len(text) for text in request.texts]
        raise ValueError(f"{counts} rows of text and {rows} seeds: give a seed each")
    if condition is None and extra_channels(diffusion):
        condition = _no_tokens(request, extra_channels(diffusion))
    all_rows = -rows % num_parts("batch") + rows
    length = -num_tokens % num_parts("tokens") + num_tokens

    def fill(x, size):
        padding = (0, all_rows - rows), (0, size - x.shape[1]), (0, 0)
        return jnp.pad(jnp.asarray(x), padding)

    def fill_texts(texts):
        repeated = (jnp.broadcast_to(text, (rows, *text.shape[1:])) for text in texts)
        return tuple(fill(text, text.shape[1]) for text in repeated)

    seeds, width = np.asarray(request.seeds, np.uint32), PATCH**2 * diffusion.config.out_channels
    guided = request.sampling.guidance > 1
    given = Given(
        noise=fill(_noise(seeds, (num_tokens, width)), length),
        seeds=jnp.pad(jnp.asarray(seeds), (0, all_rows - rows)),
        grid=jnp.tile(jnp.asarray(grid, jnp.int32), (all_rows, 1)),
        lengths=jnp.full(all_rows, num_tokens, jnp.int32),
        texts=fill_texts(request.texts),
        negative_texts=fill_texts(request.negative_texts) if guided else None,
        condition=None if condition is None else fill(condition, length),
        source=jax.tree.map(lambda x: fill(x, length), source),
    )
    latents = denoise(
        diffusion.model,
        diffusion.process,
        given,
        request.sampling,
        strength=strength,
        progress=request.progress,
    )
    return np.asarray(unpatchify(latents[:rows, :num_tokens], grid))


@partial(jax.jit, static_argnames="shape")
def _noise(seeds, shape):
    def draw(seed):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), shape)

    return jax.vmap(draw)(seeds)


def _inpaint_tokens(vae, video, mask, seeds, noise) -> np.ndarray:
    """The inpaint condition of 8-bit videos as tokens."""
    seeds, strengths = np.asarray(seeds, np.uint32), np.full(len(seeds), noise, np.float32)
    return _encode(_picture_tokens, vae, video, mask, seeds, strengths)


@jax.jit
def _picture_tokens(vae, video, mask, seeds, strengths):
    """The inpaint condition: the given pixels slightly noised, the posterior's mode."""

    def blur(seed, video, strength):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return reference_noise(key, video[None], strength[None])[0]

    mask = mask.astype(jnp.float32)
    video = jax.vmap(blur)(seeds, masked_video(_values(video), mask), strengths)
    mean, _ = vae.chunked_encode(_spread(video, SPACE_FACTOR))
    return _whole(patchify(inpaint_condition(mask, vae.normalize(mean))))


def _encoded(diffusion, video: Clips) -> np.ndarray:
    return _encode(_video_tokens, diffusion.vae, video)


@jax.jit
def _video_tokens(vae, video):
    """The posterior's mode."""
    mean, _ = vae.chunked_encode(_spread(_values(video), SPACE_FACTOR))
    return _whole(patchify(vae.normalize(mean)))


def _encode(program, vae, *arrays: np.ndarray) -> np.ndarray:
    """`program(vae, ...)` by rows, after a look at what it takes."""
    rows, frames, height, width, _ = arrays[0].shape
    at_once = _rows_at_once(rows, height * width)
    shapes = (jax.ShapeDtypeStruct((at_once, *x.shape[1:]), x.dtype) for x in arrays)
    check_fit(f"encoding {at_once} x {frames}x{height}x{width}", program, vae, *shapes)
    return _by_rows(partial(program, vae), *arrays)


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
    video = vae.chunked_decode(_spread(vae.denormalize(latents), 1))
    return _whole((jnp.clip(video / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8))


def _spread(x, cell: int):
    """Rows of cells, or columns, over all devices of the mesh where they divide.

    XLA follows from there through the whole network: borders are exchanged in front of every
    convolution, and sums of norms added up.
    """
    axes = [None] * x.ndim
    for dim in (2, 3):
        if x.shape[dim] // cell % num_parts("picture") == 0:
            axes[dim] = "picture"
            break
    return shard(x, *axes)


def _whole(x):
    """On every device, so that any host can read it."""
    return shard(x, *[None] * x.ndim)


def _by_rows(function, *arrays: np.ndarray, pixels_per_cell: int = 1) -> np.ndarray:
    """`function` over equal groups of rows, the last one filled up: one compiled program."""
    rows, _, height, width, _ = arrays[0].shape
    size = _rows_at_once(rows, height * width * pixels_per_cell)
    parts = []
    for first in range(0, rows, size):
        index = np.minimum(np.arange(first, first + size), rows - 1)
        parts.append(np.asarray(function(*(x[index] for x in arrays))))
    return np.concatenate(parts)[:rows]


def _rows_at_once(rows: int, pixels: int) -> int:
    """How many rows the VAE takes at once, of so many pixels a frame."""
    groups = math.ceil(rows * pixels / PIXELS_AT_ONCE)
    return math.ceil(rows / min(groups, rows))
