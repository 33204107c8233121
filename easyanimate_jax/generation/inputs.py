"""Check a request against its model, and read its files as arrays of the output size."""

import dataclasses
import json
from typing import NamedTuple

import numpy as np
from PIL import Image

from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import check_size, whole_frames
from easyanimate_jax.data.times import frames_in
from easyanimate_jax.diffusion.tasks import TASKS, numbers, task_of
from easyanimate_jax.facts import CELL, FPS
from easyanimate_jax.generation.arrays import NEW, fitted
from easyanimate_jax.generation.protocols import Files
from easyanimate_jax.generation.request import (
    PIXELS,
    STARTS,
    SampleRequest,
    given,
    option,
    read_times,
)
from easyanimate_jax.storage.stores import place
from easyanimate_jax.weights.defaults import Defaults

INPUTS = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.inputs))


class Model(NamedTuple):
    """The facts about a model by which a request is checked."""

    name: str  # as you named it
    in_channels: int
    frames: int  # this and the next two: the size that it makes by default
    height: int
    width: int
    fps: int = FPS  # of the clips that it was trained on
    defaults: Defaults = Defaults()


def complete(request: SampleRequest, model: Model, files: Files = media) -> SampleRequest:
    """Return the request with its open fields filled: size, rate, steps, guidance and strength.

    `files` reads the given pictures and films: `media` in this process, `Decoders` in others.
    Raises ValueError for a request that this model cannot serve.
    """
    task = task_of(model.in_channels)
    for name in INPUTS:
        if given(request, name) and name not in task.inputs:
            raise ValueError(
                f"{model.name} was trained for {task.title} ({task.in_channels} input channels), "
                f"and --{option(name)} needs {numbers(name)}; leave it out"
            )
    if task.is_control and not any(given(request, name) for name in STARTS):
        wanted = "--camera" if "camera" in task.holds else "--control or --trajectory"
        raise ValueError(f"{model.name} was trained for {task.title}: give {wanted}")
    frames = request.frames or model.frames
    rate = FPS if frames == 1 else model.fps  # a picture has none
    filled = {"fps": request.fps or rate, "frames": frames}
    own = model.defaults.filled(
        request.steps, read_times(request.times), request.guidance, request.shift
    )
    filled |= own | {"times": ",".join(f"{time:.9g}" for time in own["times"]) or None}
    filled |= dict(zip(("height", "width"), _sides(request, model, files), strict=True))
    film = request.video or request.control
    if film and request.frames is None:
        have = film_frames(film, filled["fps"], files)
        filled["frames"] = whole_frames(min(model.frames, have))
    if request.strength is None and request.video:
        filled["strength"] = 1.0 if request.mask else 0.7
    request = dataclasses.replace(request, **filled)
    check_size(request.frames, request.height, request.width)
    if (request.image or request.end_image) and request.frames == 1:
        raise ValueError(
            "the model makes pictures (1 frame), and pictures are given; add --frames 5"
        )
    if request.strength == 1 and request.video and not request.mask:
        raise ValueError("--strength 1 without --mask keeps nothing of the video; use less")
    return request


def _sides(request: SampleRequest, model: Model, files: Files) -> tuple[int, int]:
    """Return height and width: those asked for, of the given picture's shape, or the model's."""
    height, width = request.height, request.width
    if request.size == "model" or (height and width):
        return height or model.height, width or model.width
    shown = next((getattr(request, name) for name in PIXELS if given(request, name)), None)
    if shown is None:
        raise ValueError("--size like needs a picture or a film; give one, or leave it out")
    like = files.probe(place(shown))
    scale = (model.height * model.width / (like.height * like.width)) ** 0.5
    if height or width:
        scale = height / like.height if height else width / like.width
    rows, columns = (max(1, round(side * scale / CELL)) for side in (like.height, like.width))
    return height or rows * CELL, width or columns * CELL


def film_frames(path: str, fps: int = FPS, files: Files = media) -> int:
    """Return the number of frames of a film at `fps` frames a second."""
    return int(frames_in(files.probe(place(path)).seconds, fps))


def read_inputs(request: SampleRequest, files: Files = media) -> dict[str, np.ndarray]:
    """Return the pipeline's arrays for one request, (F, H, W, C) or (H, W, C), at its size.

    `files` is that of `complete`. Raises ValueError for files that do not fit the request.
    """
    inputs = {}
    for name, argument in (("image", "start"), ("end_image", "end"), ("reference", "reference")):
        if given(request, name):
            picture = files.read_image(place(getattr(request, name)))
            inputs[argument] = sized(picture[None], request, Image.Resampling.BICUBIC)[0]
    if request.video:
        inputs["video"] = read_film(request.video, request, files)
    if request.mask:
        inputs["mask"] = read_mask(request, files)
    if request.control:
        inputs["control"] = read_film(request.control, request, files)
        if request.operator:
            from easyanimate_jax.data.control import control_video

            inputs["control"] = control_video(inputs["control"], request.operator)
    if request.trajectory:
        inputs["control"] = read_trajectory(request)
    if request.camera:
        from easyanimate_jax.data.control import pluecker_rays, read_camera, sampled_camera

        camera = sampled_camera(read_camera(request.camera), request.frames, request.fps)
        inputs["camera"] = pluecker_rays(camera, request.height, request.width)
    return inputs


def sized(frames: np.ndarray, request: SampleRequest, how) -> np.ndarray:
    """Return uint8 frames in the request's size, by its `fit`."""
    return fitted(frames, request.height, request.width, how, request.fit)


def read_film(path: str, request: SampleRequest, files: Files = media) -> np.ndarray:
    """Return the first frames of a film at the request's rate, uint8 (F, H, W, 3).

    Raises ValueError for a film with too few frames.
    """
    have = film_frames(path, request.fps, files)
    if have < request.frames:
        raise ValueError(
            f"{path} has {have} frames at {request.fps} a second, and --frames is "
            f"{request.frames}; use --frames {whole_frames(have)}"
        )
    frames = files.read_at(place(path), 0, request.frames, None, fps=request.fps)
    return sized(frames, request, Image.Resampling.BILINEAR)


def read_mask(request: SampleRequest, files: Files = media) -> np.ndarray:
    """Return the mask, uint8 (F, H, W, 1): 1 where its file is white or opaque, else 0.

    A picture applies to all frames. Raises ValueError for a mask of another size than the video, or
    without white.
    """
    mask, video = (files.probe(place(path)) for path in (request.mask, request.video))
    if (mask.height, mask.width) not in (
        (video.height, video.width),
        (request.height, request.width),
    ):
        raise ValueError(
            f"{request.mask} is {mask.height}x{mask.width}, and {request.video} is "
            f"{video.height}x{video.width}; draw the mask on a frame of the video"
        )
    if mask.kind == "video":
        frames = read_film(request.mask, request, files)
    else:
        picture = files.read_image(place(request.mask), mask=True)[None]
        frames = np.repeat(
            sized(picture, request, Image.Resampling.BILINEAR), request.frames, axis=0
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
        told = json.loads(place(request.trajectory).read_bytes())
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
