"""Read a clip for encoding: its frames, and the inputs of inpaint and control models.

`prepare` encodes clips once; training on pixels (`runs.visits`) encodes them at every visit. Both
read them here. Letters beyond the legend: P token width.
"""

import copy
import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from easyanimate_jax.data.buckets import Shape
from easyanimate_jax.data.control import (
    Camera,
    control_video,
    pluecker_rays,
    read_camera,
    stretched_camera,
)
from easyanimate_jax.data.decode import decoders
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.data.sources.rows import Clip
from easyanimate_jax.data.times import MARGIN, clip_frames, stride_of
from easyanimate_jax.diffusion.conditioning import (
    camera_condition,
    given_channel,
    noised_reference,
    random_mask,
)
from easyanimate_jax.facts import FPS, to_signed
from easyanimate_jax.models.mmdit import patchify

ASPECT = 0.03  # largest relative difference in aspect of control and clip, from rounded sides
FIRST_REFERENCE = 0.4  # share of random references that are the first frame (spec 7.2)
NO_TASK = 0.9  # share of all-masked draws that become plain T2V (spec 6.1)

Video = Float[np.ndarray, "F H W 3"]


class Job(NamedTuple):
    """A clip to read: its shape after resizing and its position in the file."""

    clip: Clip
    shape: Shape
    start: float  # seconds after the clip's first frame
    stride: int  # take every n-th frame; 0 takes `rate` frames a second by time stamps
    control: tuple[str, ...] = ()
    random_reference: bool = False
    rate: int = FPS  # of the set


class Condition(NamedTuple):
    """The condition of an inpaint model (spec 6.1); a false `flag` removes all of it."""

    given: Video
    mask: Float[np.ndarray, "N 4"]  # in tokens, as the network's input: 1 = given
    flag: bool


class Pixels(NamedTuple):
    """The pixels of a clip to encode, in [-1, 1]."""

    name: str
    video: Video
    conditions: tuple[Condition, ...]
    controls: tuple[Video, ...]
    rays: Float[np.ndarray, "N 24"] | None  # in tokens; a camera has rays, not controls
    reference: Float[np.ndarray, "1 H W 3"] | None
    worse: "Pixels | None" = None  # the worse clip of a pair, with the same draws


def frames_of(latent_set: LatentSet, clip: Clip) -> int:
    """Return how many frames the clip has at the frame rate of the set."""
    rule = latent_set.reference_rate, latent_set.fps
    return int(clip_frames(clip.num_frames, clip.fps, *rule))


def make_job(latent_set: LatentSet, clip: Clip, shape: Shape, rng: np.random.Generator) -> Job:
    """Return the job that reads a clip at a shape, from a random frame on.

    With a control file the start is a multiple of 1 / `fps` s of the set, because the file may have
    only so many frames a second.
    """
    stride, rate, own = 0, clip.fps, latent_set.fps
    if latent_set.reference_rate:
        stride = int(stride_of(clip.fps))
        last = clip.num_frames - 1 - (shape.frames - 1) * stride
    else:
        rate = own if "file" in latent_set.control else rate
        last = int((_seconds(clip) - (shape.frames - 1) / own + MARGIN) * rate)
    start = int(rng.integers(last + 1)) / (rate or 1)
    return Job(clip, shape, start, stride, latent_set.control, latent_set.random_reference, own)


def read_pixels(
    job: Job, conditions: list[np.random.Generator], reference: np.random.Generator
) -> Pixels:
    """Decode a job, and draw one condition from each generator.

    The worse clip of a pair is decoded by the same draws. Raises ValueError for a file that cannot
    be decoded or does not fit its clip.
    """
    worse = None
    if job.clip.worse:
        other = job._replace(clip=dataclasses.replace(job.clip, path=job.clip.worse, worse=None))
        worse = read_pixels(other, *copy.deepcopy((conditions, reference)))
    frames = _read_frames(job)
    video, controls, rays, first = to_signed(frames), (), None, None
    if job.control:
        led = [_read_control(job, control, frames) for control in job.control]
        camera, chosen = "camera" in job.control, 0
        if camera:
            rays = np.asarray(_ray_tokens(led[0]))
        else:
            controls = tuple(map(to_signed, led))
        if job.random_reference and not camera:
            chosen = _reference_frame(reference, len(frames))
        first = video[chosen][None]
    given = tuple(_condition(rng, video) for rng in conditions)
    return Pixels(job.clip.name, video, given, controls, rays, first, worse)


def _seconds(clip: Clip) -> float:
    """Return the seconds from the clip's first frame to its last; 0 without a frame rate."""
    return (clip.num_frames - 1) / clip.fps if clip.fps else 0.0


def _read_frames(job: Job) -> UInt8[np.ndarray, "F H W 3"]:
    clip, count, size = job.clip, job.shape[0], job.shape[1:]
    if clip.kind == "image":
        return decoders().read_still(clip.path, size)
    if job.stride:
        return decoders().read_clip(clip.path, _number(job), count, job.stride, size)
    span = clip.first, clip.first + clip.num_frames
    return decoders().read_at(clip.path, job.start, count, size, *span, fps=job.rate)


def _number(job: Job) -> int:
    """Return the index in the file of the first frame of a job with a stride."""
    return job.clip.first + round(job.start * job.clip.fps)


def _read_control(job: Job, control: str, frames: UInt8[np.ndarray, "F H W 3"]) -> np.ndarray:
    """Return the control at the times of the clip's frames, cropped like them; or a camera's rays.

    See spec 7.2. Raises ValueError for a control file that does not fit its clip.
    """
    if control not in ("file", "camera"):
        return control_video(frames, control)
    clip, path, (count, height, width) = job.clip, job.clip.control, job.shape
    if path is None:
        raise ValueError(f"{clip.name} has no control_file_path, and the set needs one; add it")
    if control == "camera":
        camera = stretched_camera(read_camera(path), clip.num_frames)  # the poses are the clip's
        step = job.stride or clip.fps / job.rate
        chosen = np.rint(job.start * clip.fps + step * np.arange(count)).astype(int)
        return pluecker_rays(Camera(*(x[chosen] for x in camera)), height, width)
    size, probe = (height, width), decoders().probe(path)
    if abs(probe.height * clip.width / (probe.width * clip.height) - 1) > ASPECT:
        raise ValueError(
            f"{path} is {probe.height}x{probe.width}, and {clip.name} {clip.height}x{clip.width}: "
            f"the control has another aspect; make it from the uncropped clip"
        )
    if probe.kind == "image":
        return np.repeat(decoders().read_still(path, size), count, axis=0)
    before = decoders().read_seconds(clip.path)[clip.first] if clip.first else 0.0
    longer = probe.seconds - before - _seconds(clip)
    frame = 1 / job.rate + MARGIN
    if longer < -frame or (longer > frame and not clip.first):
        raise ValueError(
            f"{path} lasts {probe.seconds:.2f} s from its first frame to its last, and {clip.name} "
            f"{_seconds(clip):.2f} s; give the control the frames, or the frame rate, of the clip"
        )
    if job.stride:
        return decoders().read_clip(path, _number(job), count, job.stride, size)
    return decoders().read_at(path, before + job.start, count, size, fps=job.rate)


def _condition(rng: np.random.Generator, video: Video) -> Condition:
    mask = random_mask(rng, *video.shape[:3])
    flag = not (mask.all() and rng.random() < NO_TASK)
    given = noised_reference(rng, video, mask)
    return Condition(given, np.asarray(_mask_tokens(mask)), flag)


def _reference_frame(rng: np.random.Generator, frames: int) -> int:
    """Return the index of a random frame; it is the first with probability `FIRST_REFERENCE`."""
    if frames == 1 or rng.random() < FIRST_REFERENCE:
        return 0
    return int(rng.integers(1, frames))


@jax.jit
def _mask_tokens(mask: Float[Array, "F H W 1"]) -> Float[Array, "N 4"]:
    return patchify(given_channel(mask[None]))[0]


@jax.jit
def _ray_tokens(rays: Float[Array, "F H W 6"]) -> Float[Array, "N 24"]:
    return patchify(camera_condition(rays[None]))[0]
