"""A request beside its checkpoint: what it may ask there, and its files as arrays of its size."""

import argparse
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
from easyanimate_jax.generation.options import STARTS, given, option

INPUTS = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.inputs))


def complete(a: argparse.Namespace, meta: dict) -> None:
    """Fill in the run's own size, and refuse what this checkpoint cannot do."""
    samples, task = meta["config"]["samples"], task_of(meta["in_channels"])
    for name in INPUTS:
        if given(a, name) and name not in task.inputs:
            raise ValueError(
                f"{a.checkpoint} was trained for {task.title} ({task.in_channels} input channels), "
                f"and --{option(name)} needs {numbers(name)}; leave it out"
            )
    if task.is_control and not any(given(a, name) for name in STARTS):
        wanted = "--camera" if "camera" in task.holds else "--control or --trajectory"
        raise ValueError(f"{a.checkpoint} was trained for {task.title}: give {wanted}")
    film = a.video or a.control
    if film and a.frames is None:
        a.frames = whole_frames(min(samples["frames"], film_frames(film)))
    for name in ("height", "width", "frames"):
        if getattr(a, name) is None:
            setattr(a, name, samples[name])
    check_size(a.frames, a.height, a.width)
    if (a.image or a.end_image) and a.frames == 1:
        raise ValueError("the run makes pictures (1 frame), and pictures are given; add --frames 5")
    if a.strength is None and a.video:
        a.strength = 1.0 if a.mask else 0.7
    if a.strength == 1 and a.video and not a.mask:
        raise ValueError("--strength 1 without --mask keeps nothing of the video; use less")


def film_frames(path: str) -> int:
    """How many frames at 8 a second a film has."""
    return int(frames_in(media.probe(Path(path)).seconds))


def read_inputs(a: argparse.Namespace) -> dict[str, np.ndarray]:
    """The pipeline's arrays for one request, (F, H, W, C) or (H, W, C), at the request's size."""
    inputs = {}
    for name, argument in (("image", "start"), ("end_image", "end"), ("reference", "reference")):
        if given(a, name):
            picture = media.read_image(Path(getattr(a, name)))
            inputs[argument] = stretch(picture[None], a, Image.Resampling.BICUBIC)[0]
    if a.video:
        inputs["video"] = read_film(a.video, a)
    if a.mask:
        inputs["mask"] = read_mask(a)
    if a.control:
        inputs["control"] = read_film(a.control, a)
        if a.operator:
            from easyanimate_jax.data.control import control_video

            inputs["control"] = control_video(inputs["control"], a.operator)
    if a.trajectory:
        inputs["control"] = read_trajectory(a)
    if a.camera:
        from easyanimate_jax.data.control import pluecker_rays, read_camera, sampled_camera

        camera = sampled_camera(read_camera(a.camera), a.frames)
        inputs["camera"] = pluecker_rays(camera, a.height, a.width)
    return inputs


def stretch(frames: np.ndarray, a: argparse.Namespace, how) -> np.ndarray:
    """Resized to the request's size without regard to the aspect, as the reference does."""
    return resized(frames, a.height, a.width, how)


def read_film(path: str, a: argparse.Namespace) -> np.ndarray:
    """The first frames of a film at 8 a second."""
    have = film_frames(path)
    if have < a.frames:
        raise ValueError(
            f"{path} has {have} frames at {FPS} a second, and {a.frames} are asked for; use "
            f"--frames {whole_frames(have)}"
        )
    frames = media.read_at(Path(path), 0, a.frames)
    return stretch(frames, a, Image.Resampling.BILINEAR)


def read_mask(a: argparse.Namespace) -> np.ndarray:
    """1 where it is white, or where its alpha channel is; a picture holds for all frames."""
    mask, video = (media.probe(Path(path)) for path in (a.mask, a.video))
    if (mask.height, mask.width) not in ((video.height, video.width), (a.height, a.width)):
        raise ValueError(
            f"{a.mask} is {mask.height}x{mask.width}, and {a.video} is "
            f"{video.height}x{video.width}; draw the mask on a frame of the video"
        )
    if mask.kind == "video":
        frames = read_film(a.mask, a)
    else:
        picture = media.read_image(Path(a.mask), mask=True)[None]
        frames = np.repeat(stretch(picture, a, Image.Resampling.BILINEAR), a.frames, axis=0)
    new = (frames.mean(axis=-1, keepdims=True) >= NEW).astype(np.uint8)
    if not new.any():
        raise ValueError(f"{a.mask} is white nowhere, so nothing would be made anew")
    return new


def read_trajectory(a: argparse.Namespace) -> np.ndarray:
    from easyanimate_jax.data.control import trajectory_video

    try:
        paths = [
            np.array(path, float).reshape(-1, 2)
            for path in json.loads(Path(a.trajectory).read_text())
        ]
        usable = bool(paths) and all(len(p) and np.isfinite(p).all() for p in paths)
    except (ValueError, TypeError, RecursionError):
        usable = False
    if not usable:
        raise ValueError(f"{a.trajectory} is no JSON list of paths, as [[[10, 20], [50, 20]]]")
    return trajectory_video(paths, a.frames, a.height, a.width, a.spot)
