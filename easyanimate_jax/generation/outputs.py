"""The output folder: numbered samples, each with a JSON sidecar that reproduces it.

A number is free if no file or folder name begins with it. Each file is written under a temporary
name and then renamed; the sidecar comes last. Existing files are never replaced.
"""

import hashlib
import json
import os
import re
import shlex
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from easyanimate_jax.data import media
from easyanimate_jax.facts import FPS
from easyanimate_jax.generation.request import (
    FILES,
    LINE_KEYS,
    SAMPLING,
    Asked,
    SampleRequest,
    given,
    option,
)
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.weights.pretrained import lasting_name

NUMBERED = re.compile(r"\.?([0-9]{8,})(?![0-9])")  # ASCII digits only: "²³" is no number
VERSIONS = ("jax", "flax", "numpy", "easyanimate_jax")


class Origin(NamedTuple):
    """The model that a sample comes from."""

    path: Place  # a run or a folder, as you named it
    options: Mapping[str, object]  # options that choose the weights, by their names
    prints: Mapping[str, str] = {}  # hashes of the weights: of a LoRA by its name, of parts by path
    training: Mapping | None = None  # a run's record of its training


def options_of(request: SampleRequest, origin: Origin) -> dict:
    """Return the set options of a request, by their names on the command line."""
    names = (*LINE_KEYS, *SAMPLING, "picture_noise", "fit")
    options = {option(name): getattr(request, name) for name in names if given(request, name)}
    return options | dict(origin.options)


def identity(asked: Asked, origin: Origin) -> str:
    """Return a hash of the request and its model, which finds samples that already exist.

    Files of the request and weights count by their content.
    """
    options = options_of(asked.request, origin) | _hashes(asked.request) | dict(origin.prints)
    parts = [lasting_name(origin.path), asked.line, options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def finished(folder: Place) -> set[str]:
    """Return the identities of the samples in `folder`; other JSON files are ignored."""
    found = set()
    for path in (folder / name for name in stores.list_names(folder)):
        if path.suffix != ".json" or not NUMBERED.fullmatch(path.stem):
            continue
        try:
            sidecar = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(sidecar, dict) and isinstance(sidecar.get("identity"), str):
            found.add(sidecar["identity"])
    return found


def record(asked: Asked, origin: Origin, output: Place, seconds: float) -> dict:
    """Return the sidecar of a sample: its command, seed, options, model and versions."""
    import jax

    options, words = options_of(asked.request, origin), []
    for name, value in (options | {"output": str(output)}).items():
        if isinstance(value, list):  # an option that is repeated
            words += [f"--{name}={one}" for one in value]
            continue
        several = isinstance(value, tuple)
        words += [f"--{name}", *map(str, value)] if several else [f"--{name}={value}"]
    return {
        "command": shlex.join(["python", "sample.py", str(origin.path), *words]),
        "seed": asked.request.seed,
        "options": options,
        "files_sha256": _hashes(asked.request),
        "weights_blake2b": dict(origin.prints),
        "model": lasting_name(origin.path),
        "identity": identity(asked, origin),
        "seconds": round(seconds, 2),
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in VERSIONS},
        "training": origin.training and dict(origin.training),
    }


def write(
    folder: Place,
    frames: UInt8[np.ndarray, "F H W 3"],
    sidecar: dict,
    *,
    fps: int = FPS,
    gif: bool = False,
) -> Place:
    """Write a video, contact sheet and sidecar under the next free number; return the video's path.

    The video has `fps` frames a second. A single frame becomes a picture without a contact sheet.
    `gif` adds a GIF of a video.
    """
    stem, lock = _reserve(folder)
    try:
        return write_as(stem, folder, frames, sidecar, fps=fps, gif=gif)
    finally:
        lock.unlink()


def write_as(
    stem: str,
    folder: Place,
    frames: UInt8[np.ndarray, "F H W 3"],
    sidecar: dict,
    *,
    fps: int = FPS,
    gif: bool = False,
) -> Place:
    """Write the files of `write` under names that begin with `stem`; return the video's path.

    The sidecar comes last. If a file cannot be written, those before it stay.
    """
    part = folder / f".{stem}.part"

    def place(name: str, fill: Callable[[Path], None]) -> Place:
        if isinstance(folder, Path):
            fill(part)
            os.replace(part, folder / name)
        else:
            stores.replace(folder / name, fill)
        return folder / name

    name = f"{stem}{'.png' if len(frames) == 1 else '.mp4'}"
    sidecar = {"file": name, **sidecar}
    comment = f"settings: {stem}.json"
    text = json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n"
    try:
        if len(frames) == 1:
            path = place(name, lambda p: media.write_png(p, frames[0]))
        else:
            path = place(name, lambda p: media.write_video(p, frames, fps=fps, comment=comment))
            sheet = media.contact_sheet(frames[None])
            place(f"{stem}_sheet.png", lambda p: media.write_png(p, sheet))
            if gif:
                place(f"{stem}.gif", lambda p: media.write_gif(p, frames, fps=fps))
        place(f"{stem}.json", lambda p: p.write_text(text, encoding="utf-8"))
    finally:
        if isinstance(part, Path):
            part.unlink(missing_ok=True)
    return path


def _hashes(request: SampleRequest) -> dict[str, str]:
    """Return the hash of each file of a request, by the name of its option."""
    paths = {option(name): getattr(request, name) for name in FILES if given(request, name)}
    files = {name: stores.place(path) for name, path in paths.items()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def _reserve(folder: Place) -> tuple[str, Place]:
    """Return the next free number and a lock file that reserves it against other commands."""
    while True:
        stem = f"{max(_taken(folder), default=0) + 1:08d}"
        lock = folder / f".{stem}.lock"
        if not _made(lock):
            continue  # another command reserved it first
        if _taken(folder).count(int(stem)) <= 1:  # a network file system may list late
            return stem, lock
        lock.unlink()


def _made(lock: Place) -> bool:
    """Make a lock file; return whether there was none."""
    if not isinstance(lock, Path):
        return stores.create(lock, uuid.uuid4().bytes)
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _taken(folder: Place) -> list[int]:
    """Return the numbers that names in the folder begin with."""
    found = (NUMBERED.match(name) for name in stores.list_names(folder))
    return [int(match[1]) for match in found if match]
