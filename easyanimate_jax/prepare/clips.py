"""A clip as it is encoded: its frames at its shape, and what an inpaint or control model is given.

What `prepare` encodes once and training encodes anew at every visit (`prepare.visits`) is read
here. Letters beyond the legend: P token width.
"""

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

ASPECT = 0.03  # by which the shape of a control may differ from its clip's: rounded sides
FIRST_REFERENCE = 0.4  # share of random references that are the first frame (spec 7.2)
NO_TASK = 0.9  # share of all-masked draws that become plain T2V (spec 6.1)

Video = Float[np.ndarray, "F H W 3"]


class Job(NamedTuple):
    """A clip, the shape it becomes, and where in the file it is read."""

    clip: Clip
    shape: Shape
    start: float  # seconds after the clip's first frame
    stride: int  # every how many frames one is taken; 0 for `FPS` a second by time stamps
    control: tuple[str, ...] = ()
    random_reference: bool = False


class Condition(NamedTuple):
    """What an inpaint model is given of a clip (spec 6.1); a flag of 0 takes all of it away."""

    given: Video
    mask: Float[np.ndarray, "N 4"]  # in tokens, as the network sees it: 1 where given
    flag: bool


class Pixels(NamedTuple):
    """What is encoded of a clip, in [-1, 1]."""

    name: str
    video: Video
    conditions: tuple[Condition, ...]
    controls: tuple[Video, ...]
    rays: Float[np.ndarray, "N 24"] | None  # in tokens; a camera's, in the place of controls
    reference: Float[np.ndarray, "1 H W 3"] | None


def frames_of(latent_set: LatentSet, clip: Clip) -> int:
    """Return how many frames at the training rate the clip offers to the set."""
    return int(clip_frames(clip.num_frames, clip.fps, latent_set.reference_rate))


def make_job(latent_set: LatentSet, clip: Clip, shape: Shape, rng: np.random.Generator) -> Job:
    """Return the clip at a shape, from a random frame on.

    A control file may be thinned to `FPS` a second: beside one, clips begin where it has frames.
    """
    stride, rate = 0, clip.fps
    if latent_set.reference_rate:
        stride = int(stride_of(clip.fps))
        last = clip.num_frames - 1 - (shape.frames - 1) * stride
    else:
        rate = FPS if "file" in latent_set.control else rate
        last = int((_seconds(clip) - (shape.frames - 1) / FPS + MARGIN) * rate)
    start = int(rng.integers(last + 1)) / (rate or 1)
    return Job(clip, shape, start, stride, latent_set.control, latent_set.random_reference)


def read_pixels(
    job: Job, conditions: list[np.random.Generator], reference: np.random.Generator
) -> Pixels:
    """Decode a job, and draw a condition of each generator. ValueError for a file that is bad."""
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
    return Pixels(job.clip.name, video, given, controls, rays, first)


def _seconds(clip: Clip) -> float:
    """From the clip's first frame to its last."""
    return (clip.num_frames - 1) / clip.fps if clip.fps else 0.0


def _read_frames(job: Job) -> UInt8[np.ndarray, "F H W 3"]:
    clip, count, size = job.clip, job.shape[0], job.shape[1:]
    if clip.kind == "image":
        return decoders().read_image(clip.path, size)
    if job.stride:
        return decoders().read_clip(clip.path, _number(job), count, job.stride, size)
    return decoders().read_at(
        clip.path, job.start, count, size, clip.first, clip.first + clip.num_frames
    )


def _number(job: Job) -> int:
    """The frame of the file that a job with a stride begins with."""
    return job.clip.first + round(job.start * job.clip.fps)


def _read_control(job: Job, control: str, frames: UInt8[np.ndarray, "F H W 3"]) -> np.ndarray:
    """The control at the same times, cut as the clip was (spec 7.2), or the rays."""
    if control not in ("file", "camera"):
        return control_video(frames, control)
    clip, path, (count, height, width) = job.clip, job.clip.control, job.shape
    if path is None:
        raise ValueError(f"{clip.name} has no control_file_path, and the set wants one")
    if control == "camera":
        camera = stretched_camera(read_camera(path), clip.num_frames)  # the poses are the clip's
        step = job.stride or clip.fps / FPS
        chosen = np.rint(job.start * clip.fps + step * np.arange(count)).astype(int)
        return pluecker_rays(Camera(*(x[chosen] for x in camera)), height, width)
    size, probe = (height, width), decoders().probe(path)
    if abs(probe.height * clip.width / (probe.width * clip.height) - 1) > ASPECT:
        raise ValueError(
            f"{path} is {probe.height}x{probe.width}, and {clip.name} {clip.height}x{clip.width}: "
            f"the control has another aspect; make it of the uncropped clip"
        )
    if probe.kind == "image":
        return np.repeat(decoders().read_image(path, size), count, axis=0)
    before = decoders().read_seconds(clip.path)[clip.first] if clip.first else 0.0
    longer = probe.seconds - before - _seconds(clip)
    if longer < -1 / FPS - MARGIN or (longer > 1 / FPS + MARGIN and not clip.first):
        raise ValueError(
            f"{path} lasts {probe.seconds:.2f} s from its first frame to its last, and {clip.name} "
            f"{_seconds(clip):.2f} s; give the control the frames, or the frame rate, of the clip"
        )
    if job.stride:
        return decoders().read_clip(path, _number(job), count, job.stride, size)
    return decoders().read_at(path, before + job.start, count, size)


def _condition(rng: np.random.Generator, video: Video) -> Condition:
    mask = random_mask(rng, *video.shape[:3])
    flag = not (mask.all() and rng.random() < NO_TASK)
    given = noised_reference(rng, video, mask)
    return Condition(given, np.asarray(_mask_tokens(mask)), flag)


def _reference_frame(rng: np.random.Generator, frames: int) -> int:
    """Any frame, the first in `FIRST_REFERENCE` of all cases."""
    if frames == 1 or rng.random() < FIRST_REFERENCE:
        return 0
    return int(rng.integers(1, frames))


@jax.jit
def _mask_tokens(mask: Float[Array, "F H W 1"]) -> Float[Array, "N 4"]:
    return patchify(given_channel(mask[None]))[0]


@jax.jit
def _ray_tokens(rays: Float[Array, "F H W 6"]) -> Float[Array, "N 24"]:
    return patchify(camera_condition(rays[None]))[0]
