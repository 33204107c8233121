"""Check a request against its checkpoint, and read its files as arrays of the output size."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image

from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import check_size, whole_frames
from easyanimate_jax.data.times import frames_in
from easyanimate_jax.diffusion.tasks import TASKS, numbers, task_of
from easyanimate_jax.facts import FPS
from easyanimate_jax.generation.arrays import NEW, resized
from easyanimate_jax.generation.request import STARTS, SampleRequest, given, option

INPUTS = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.inputs))


def complete(request: SampleRequest, meta: dict, checkpoint: Path) -> SampleRequest:
    """Return the request with its open fields filled: the size from the run, and the strength.

    `meta` is the checkpoint's record of its training. Raises ValueError for a request that this
    checkpoint cannot serve.
    """
    samples, task = meta["config"]["samples"], task_of(meta["in_channels"])
    for name in INPUTS:
        if given(request, name) and name not in task.inputs:
            raise ValueError(
                f"{checkpoint} was trained for {task.title} ({task.in_channels} input channels), "
                f"and --{option(name)} needs {numbers(name)}; leave it out"
            )
    if task.is_control and not any(given(request, name) for name in STARTS):
        wanted = "--camera" if "camera" in task.holds else "--control or --trajectory"
        raise ValueError(f"{checkpoint} was trained for {task.title}: give {wanted}")
    filled = {n: samples[n] for n in ("height", "width", "frames") if not given(request, n)}
    film = request.video or request.control
    if film and request.frames is None:
        filled["frames"] = whole_frames(min(samples["frames"], film_frames(film)))
    if request.strength is None and request.video:
        filled["strength"] = 1.0 if request.mask else 0.7
    request = dataclasses.replace(request, **filled)
    check_size(request.frames, request.height, request.width)
    if (request.image or request.end_image) and request.frames == 1:
        raise ValueError("the run makes pictures (1 frame), and pictures are given; add --frames 5")
    if request.strength == 1 and request.video and not request.mask:
        raise ValueError("--strength 1 without --mask keeps nothing of the video; use less")
    return request


def film_frames(path: str) -> int:
    """Return the number of frames of a film at 8 frames a second."""
    return int(frames_in(media.probe(Path(path)).seconds))


def read_inputs(request: SampleRequest) -> dict[str, np.ndarray]:
    """Return the pipeline's arrays for one request, (F, H, W, C) or (H, W, C), at its size.

    Raises ValueError for files that do not fit the request.
    """
    inputs = {}
    for name, argument in (("image", "start"), ("end_image", "end"), ("reference", "reference")):
        if given(request, name):
            picture = media.read_image(Path(getattr(request, name)))
            inputs[argument] = stretch(picture[None], request, Image.Resampling.BICUBIC)[0]
    if request.video:
        inputs["video"] = read_film(request.video, request)
    if request.mask:
        inputs["mask"] = read_mask(request)
    if request.control:
        inputs["control"] = read_film(request.control, request)
        if request.operator:
            from easyanimate_jax.data.control import control_video

            inputs["control"] = control_video(inputs["control"], request.operator)
    if request.trajectory:
        inputs["control"] = read_trajectory(request)
    if request.camera:
        from easyanimate_jax.data.control import pluecker_rays, read_camera, sampled_camera

        camera = sampled_camera(read_camera(request.camera), request.frames)
        inputs["camera"] = pluecker_rays(camera, request.height, request.width)
    return inputs


def stretch(frames: np.ndarray, request: SampleRequest, how) -> np.ndarray:
    """Return uint8 frames stretched to the request's size, as in the reference."""
    return resized(frames, request.height, request.width, how)


def read_film(path: str, request: SampleRequest) -> np.ndarray:
    """Return the first frames of a film at 8 frames a second, uint8 (F, H, W, 3).

    Raises ValueError for a film with too few frames.
    """
    have = film_frames(path)
    if have < request.frames:
        raise ValueError(
            f"{path} has {have} frames at {FPS} a second, and --frames is {request.frames}; use "
            f"--frames {whole_frames(have)}"
        )
    frames = media.read_at(Path(path), 0, request.frames)
    return stretch(frames, request, Image.Resampling.BILINEAR)


def read_mask(request: SampleRequest) -> np.ndarray:
    """Return the mask, uint8 (F, H, W, 1): 1 where its file is white or opaque, else 0.

    A picture applies to all frames. Raises ValueError for a mask of another size than the video, or
    without white.
    """
    mask, video = (media.probe(Path(path)) for path in (request.mask, request.video))
    if (mask.height, mask.width) not in (
        (video.height, video.width),
        (request.height, request.width),
    ):
        raise ValueError(
            f"{request.mask} is {mask.height}x{mask.width}, and {request.video} is "
            f"{video.height}x{video.width}; draw the mask on a frame of the video"
        )
    if mask.kind == "video":
        frames = read_film(request.mask, request)
    else:
        picture = media.read_image(Path(request.mask), mask=True)[None]
        frames = np.repeat(
            stretch(picture, request, Image.Resampling.BILINEAR), request.frames, axis=0
        )
    new = (frames.mean(axis=-1, keepdims=True) >= NEW).astype(np.uint8)
    if not new.any():
        raise ValueError(f"{request.mask} is white nowhere; paint the part to generate white")
    return new


def read_trajectory(request: SampleRequest) -> np.ndarray:
    """Return the control video of a JSON file of paths, uint8 (F, H, W, 3).

    Raises ValueError for a file that is not a list of paths of finite [x, y] pixels.
    """
    from easyanimate_jax.data.control import trajectory_video

    try:
        told = json.loads(Path(request.trajectory).read_bytes())
        # The brackets around a single path are easily forgotten.
        paths = [np.array(path, float) for path in ([told] if np.ndim(told[0][0]) == 0 else told)]
        usable = all(p.ndim == 2 and p.shape[1] == 2 and np.isfinite(p).all() for p in paths)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        usable = False
    if not usable:
        raise ValueError(
            f"{request.trajectory} is no JSON list of paths; write it as [[[10, 20], [50, 20]]]"
        )
    size = request.frames, request.height, request.width
    video = trajectory_video(paths, *size, request.spot)
    if not video.any():
        raise ValueError(
            f"{request.trajectory} has no point inside the video, which is {request.height} pixels "
            f"high and {request.width} wide; give [x, y] in its pixels"
        )
    return video
