"""Store a clip's location as bytes of a record: training opens its file without reading the source.

File names are relative to one root, a folder that contains all files of a set. They are checked
again when they are read (data/paths.py).
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from easyanimate_jax.data.media import Cell, Example, File, Member
from easyanimate_jax.data.paths import safe_path
from easyanimate_jax.data.sources import tfds
from easyanimate_jax.data.sources.rows import Clip
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.stores import Place, Remote


def root_of(clips: Iterable[Clip]) -> Place | None:
    """Return the deepest folder that contains all files of the clips; None if there is none.

    Files of several buckets, or of disks and stores, have none.
    """
    files = {f for clip in clips for f in (_on_disk(clip.path), clip.control, clip.worse) if f}
    return common(
        [f.parent if isinstance(f, Remote) else Path(os.path.realpath(f)).parent for f in files]
    )


def common(folders: Sequence[Place | None]) -> Place | None:
    """Return the deepest folder that contains all of some folders; None if there is none."""
    if None in folders:
        return None
    buckets = {(f.scheme, f.bucket) if isinstance(f, Remote) else None for f in folders}
    if buckets == {None}:
        return Path(os.path.commonpath(set(map(str, folders))))
    if len(buckets) > 1:
        return None
    return Remote(*buckets.pop(), os.path.commonpath({f"/{f.key}" for f in folders}).lstrip("/"))


def to_bytes(clip: Clip, root: Place | None) -> UInt8[np.ndarray, "_bytes"]:
    """Return the clip as JSON bytes, without its captions; without a root, files are absolute."""
    place = {name: getattr(clip, name) for name in _FIELDS}
    file = clip.path
    place["path"] = {"file": _below(_on_disk(file), root)}
    if not isinstance(file, Place):
        shown = {name: value for name, value in file._asdict().items() if name in _SHOWN}
        place["path"] |= shown
    place["control"] = clip.control and _below(clip.control, root)
    worse = place.pop("worse")  # absent without one, as in sets of earlier versions
    place |= {"worse": _below(worse, root)} if worse else {}
    return np.frombuffer(json.dumps(place, ensure_ascii=False).encode(), np.uint8)


def from_bytes(content: UInt8[np.ndarray, "_bytes"], root: Place | None) -> Clip:
    """Return the clip, without captions. Raises ValueError for a file that is not below `root`."""
    place = json.loads(bytes(content))
    path = dict(place.pop("path"))
    file: File = _found(root, path.pop("file"))
    if "offset" in path:
        file = Member(file, **path)
    elif "field" in path:
        file = tfds.example(file, **path)
    elif "leaf" in path:
        file = Cell(file, **path)
    beside = {name: place.pop(name, None) for name in ("control", "worse")}
    beside = {name: _found(root, path) if path else None for name, path in beside.items()}
    return Clip(path=file, captions=(), **beside, **place)


FILES = ("file", "control", "worse")  # fields of the JSON that hold names of files
_FIELDS = [field.name for field in dataclasses.fields(Clip) if field.name != "captions"]
_SHOWN = ("offset", "size", "index", "field", "leaf", "group", "row", "name")


def _on_disk(file: File) -> Place:
    """Return the file, or the archive, table or data set that contains it."""
    if isinstance(file, Member):
        return file.archive
    if isinstance(file, Cell):
        return file.table
    return file.folder if isinstance(file, Example) else file


def _found(root: Place | None, name: str) -> Place:
    return stores.place(name) if root is None else safe_path(root, name)


def _below(path: Place, root: Place | None) -> str:
    if root is None:
        return os.path.realpath(path) if isinstance(path, Path) else str(path)
    if isinstance(root, Remote):
        return f"./{path.key[len(root.key) :].lstrip('/')}"
    return f"./{os.path.relpath(os.path.realpath(path), root)}"
