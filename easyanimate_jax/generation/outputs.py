"""Samples in their folder: numbered, with a sidecar to make each again, and known when made."""

import argparse
import hashlib
import json
import shlex
from importlib.metadata import version
from pathlib import Path

import numpy as np

from easyanimate_jax.data import media
from easyanimate_jax.facts import FPS
from easyanimate_jax.generation.options import FILES, given, option, options_of


def identity(a: argparse.Namespace, step: int) -> str:
    """Equal for equal lines of a prompt file: they are not made twice."""
    parts = [str(a.checkpoint.absolute()), step, a.line, options_of(a)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def finished(folder: Path) -> set[str]:
    """The identities of the samples in `folder`; the sidecar is written last."""
    sidecars = (p for p in folder.glob("*.json") if p.stem.isdigit())
    return {json.loads(p.read_text(encoding="utf-8")).get("identity") for p in sidecars}


def record(a: argparse.Namespace, step: int, meta: dict, seconds: float) -> dict:
    """Everything needed to make the sample again."""
    import jax

    options, words = options_of(a), []
    for name, value in (options | {"output": str(a.output)}).items():
        several = isinstance(value, list | tuple)
        words += [f"--{name}", *map(str, value)] if several else [f"--{name}={value}"]
    files = {option(name): Path(getattr(a, name)) for name in FILES if given(a, name)}
    return {
        "command": shlex.join(["python", "sample.py", str(a.checkpoint), *words]),
        "options": options,
        "files_sha256": {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items()},
        "checkpoint": str(a.checkpoint.absolute()),
        "identity": identity(a, step),
        "step": step,
        "seconds": round(seconds, 2),
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "flax", "numpy", "easyanimate_jax")},
        **meta,
    }


def write(a: argparse.Namespace, frames: np.ndarray, sidecar: dict) -> Path:
    """The next free number's video or picture, contact sheet and sidecar."""
    taken = [int(p.stem) for p in a.output.glob("*.json") if p.stem.isdigit()]
    stem = f"{max(taken, default=0) + 1:08d}"
    path = a.output / f"{stem}{'.png' if len(frames) == 1 else '.mp4'}"
    sidecar = {"file": path.name, **sidecar}
    text = json.dumps(sidecar, indent=1, ensure_ascii=False)
    if len(frames) == 1:
        media.write_png(path, frames[0])
    else:
        media.write_video(path, frames, comment=f"settings: {stem}.json {sidecar['identity']}")
        media.write_png(a.output / f"{stem}_sheet.png", media.contact_sheet(frames[None]))
        if a.gif:
            media.write_gif(a.output / f"{stem}.gif", frames, fps=FPS)
    (a.output / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    return path
