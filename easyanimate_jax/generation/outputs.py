"""Samples in their folder: numbered, with a sidecar to make each again, and known when made.

A number is free when no file or folder of any ending begins with it. Files appear whole, under a
temporary name first, and the sidecar is the last; nothing that lies in the folder is replaced.
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable
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

NUMBERED = re.compile(r"\.?([0-9]{8,})(?![0-9])")  # ASCII digits: "²³" is no number
VERSIONS = ("jax", "flax", "numpy", "easyanimate_jax")


class Origin(NamedTuple):
    """What a sample comes from."""

    checkpoint: Path  # the run folder, as it was given
    step: int
    weights: str  # "full" or "int8"
    training: dict  # what the checkpoint says of its training


def options_of(request: SampleRequest, origin: Origin) -> dict:
    """Return everything that a request says, by the names of the command line."""
    names = (*LINE_KEYS, *SAMPLING, "picture_noise")
    options = {option(name): getattr(request, name) for name in names if given(request, name)}
    return options | {"weights": origin.weights}


def identity(asked: Asked, origin: Origin) -> str:
    """Return a hash, equal for equal lines of a prompt file: they are not made twice."""
    options = options_of(asked.request, origin)
    parts = [str(origin.checkpoint.absolute()), origin.step, asked.line, options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def finished(folder: Path) -> set[str]:
    """Return the identities of the samples in `folder`; other JSON files there say nothing."""
    found = set()
    for path in folder.glob("*.json"):
        if not NUMBERED.fullmatch(path.stem):
            continue
        try:
            sidecar = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(sidecar, dict) and isinstance(sidecar.get("identity"), str):
            found.add(sidecar["identity"])
    return found


def record(asked: Asked, origin: Origin, output: Path, seconds: float) -> dict:
    """Return everything needed to make the sample again; of the training under `training`."""
    import jax

    options, words = options_of(asked.request, origin), []
    for name, value in (options | {"output": str(output)}).items():
        several = isinstance(value, list | tuple)
        words += [f"--{name}", *map(str, value)] if several else [f"--{name}={value}"]
    paths = {n: Path(getattr(asked.request, n)) for n in FILES if given(asked.request, n)}
    return {
        "command": shlex.join(["python", "sample.py", str(origin.checkpoint), *words]),
        "seed": asked.request.seed,
        "options": options,
        "files_sha256": {
            option(name): hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in paths.items()
        },
        "checkpoint": str(origin.checkpoint.absolute()),
        "identity": identity(asked, origin),
        "step": origin.step,
        "seconds": round(seconds, 2),
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in VERSIONS},
        "training": origin.training,
    }


def write(
    folder: Path, frames: UInt8[np.ndarray, "F H W 3"], sidecar: dict, *, gif: bool = False
) -> Path:
    """Write the next free number's video or picture, contact sheet and sidecar.

    Returns the path of the video, or of the picture where there is one frame.
    """
    stem, lock = _reserve(folder)
    part = lock.with_suffix(".part")

    def place(name: str, fill: Callable[[Path], None]) -> Path:
        fill(part)
        os.replace(part, folder / name)
        return folder / name

    name = f"{stem}{'.png' if len(frames) == 1 else '.mp4'}"
    sidecar = {"file": name, **sidecar}
    comment = f"settings: {stem}.json {sidecar['identity']}"
    text = json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n"
    try:
        if len(frames) == 1:
            path = place(name, lambda p: media.write_png(p, frames[0]))
        else:
            path = place(name, lambda p: media.write_video(p, frames, fps=FPS, comment=comment))
            sheet = media.contact_sheet(frames[None])
            place(f"{stem}_sheet.png", lambda p: media.write_png(p, sheet))
            if gif:
                place(f"{stem}.gif", lambda p: media.write_gif(p, frames, fps=FPS))
        place(f"{stem}.json", lambda p: p.write_text(text, encoding="utf-8"))
    finally:
        part.unlink(missing_ok=True)
        lock.unlink()
    return path


def _reserve(folder: Path) -> tuple[str, Path]:
    """Return the next free number and the file that keeps other commands from taking it."""
    while True:
        stem = f"{max(_taken(folder), default=0) + 1:08d}"
        lock = folder / f".{stem}.lock"
        try:
            lock.touch(exist_ok=False)
        except FileExistsError:
            continue  # another command came first
        if _taken(folder).count(int(stem)) <= 1:  # a listing may be late
            return stem, lock
        lock.unlink()


def _taken(folder: Path) -> list[int]:
    """Return the number that each name of the folder begins with."""
    found = (NUMBERED.match(name) for name in os.listdir(folder))
    return [int(match[1]) for match in found if match]
