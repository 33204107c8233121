"""Encoded examples on disk: ArrayRecord shards, an index, a header.

    SET/shard-00000-KEY.arrayrecord   each record: the safetensors bytes of a dict of arrays
    SET/shard-00000-KEY.npz       the shard's rows of the index, with the keys of its records
    SET/index.npz                 one row per record; a record's id is its row
    SET/header.json               the inputs of the set; key, records and bytes of every shard

Every file is written completely or not at all, so writing resumes at the first missing shard. KEY
is the key of a shard's content (data/contents.py): when a file of the source changes, its shard
gets another name, and the records of files that did not change are copied (`Kept`).
"""

import errno
import json
import os
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import load_file, save

from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.facts import FPS, check_fields
from easyanimate_jax.storage.errors import is_of_the_system
from easyanimate_jax.storage.whole import remove_left, replace, replace_text
from easyanimate_jax.weights.files import DTYPES

VERSION = 1
KEYED = re.compile(r"shard-\d{5,}-[0-9a-f]{32}\.(npz|arrayrecord)")
READERS = 64  # maximum number of open shards
LOOKED_INTO = 256  # sets of at most this many shards have every shard opened and checked
INDEX_TYPES = {
    "clip": str,  # file name in the source folder
    "kind": str,  # "video" or "image"
    "frames": np.int32,  # as encoded, like height and width
    "height": np.int32,
    "width": np.int32,
    "T": np.int32,
    "gh": np.int32,
    "gw": np.int32,
    "tokens": np.int32,
    "source_height": np.int32,
    "source_width": np.int32,
    "num_captions": np.int32,
    "source": str,  # name of the source in a mixture, or ""
}

Texts = tuple[Float[np.ndarray, "_rows _L _width"], ...]


CONTROLS = ("file", "camera", "canny", "soft_edge", "scribble", "lines", "line_art")


@dataclass(frozen=True)
class LatentSet:
    """The clips of one source, encoded under one budget."""

    name: str
    """Name of the set, and of its folder in the config's `prepared`."""

    budget: Budget
    """Token lengths and resolutions to which the clips are cropped."""

    kinds: tuple[str, ...] = ("image", "video")
    """Kinds of files to use: "image", "video" or both."""

    min_side: int = 0
    """Minimum shorter side of a source, in pixels; 0 accepts all sizes."""

    min_quality: float = 0.0
    """Share of a curated table's clips that a clip must beat: 0.9 keeps the best 10 %, 0 all."""

    condition_draws: int = 0
    """Masks and noised references to encode with each clip for I2V (spec 6.1); 0 for none."""

    control: str | tuple[str, ...] = ()
    """Control signals (spec 7.2): "file" (the clip's control file), "camera" (its pose file), names
    of operators that compute a control video from the clip, or "" for none. If there are several,
    training draws one for each row."""

    random_reference: bool = False
    """If true, the reference frame of a control model is random: the first frame in 40 % of the
    clips, otherwise any frame. If false, it is always the first frame (spec 7.2)."""

    pairs: bool = False
    """Use pairs: each clip with the worse one of its row (`worse_file_path`), cropped, cut and
    encoded in the same way. Stages with the objective `DirectPreference` read such a set."""

    pixels: bool = False
    """Store only text states and the clip's location. Training then decodes and encodes the clip,
    with one condition and one control, each time that it draws the clip."""

    fps: int = FPS
    """Frames per second at which videos are read, by their time stamps. The model has no input for
    it, so use one rate for all sets of a model; samples are then written at this rate."""

    reference_rate: bool = False
    """Use every round(fps / 8)-th frame of a video, as the reference does, instead of sampling 8
    frames per second by time. Videos then change their speed: at 12 frames per second to 0.67 of
    it, at 30 frames per second to 0.94."""

    def __post_init__(self):
        check_fields(
            self,
            min_side="[0, inf)",
            min_quality="[0, 1]",
            condition_draws="[0, inf)",
            fps="[1, 120]",
        )
        if self.reference_rate and self.fps != FPS:
            raise ValueError(
                f"set {self.name!r}: reference_rate reads about {FPS} frames a second, and fps is "
                f"{self.fps}: leave one of them out"
            )
        if isinstance(self.control, str):
            object.__setattr__(self, "control", (self.control,) if self.control else ())
        for control in self.control:
            if control not in CONTROLS:
                raise ValueError(
                    f"set {self.name!r}: there is no control {control!r}; use one of "
                    f"{', '.join(CONTROLS)}"
                )
        if "camera" in self.control and len(self.control) > 1:
            raise ValueError(
                f"set {self.name!r}: control {self.control} mixes a camera with videos, and they "
                f"have different channels; give it a set of its own"
            )
        if not self.kinds or not set(self.kinds) <= {"image", "video"}:
            raise ValueError(
                f"set {self.name!r}: kinds {self.kinds} must be of 'image', 'video' or both"
            )


class Origin(NamedTuple):
    """The content that a record was made from: keys of its pixels and of its captions."""

    pixels: str
    captions: str


def check_identity(folder: Path, identity: dict) -> None:
    """Raise ValueError if the set in `folder` was begun with another identity."""
    path = folder / "identity.json"
    before = json.loads(path.read_text()) if path.is_file() else identity
    if "jobs" in before:
        raise ValueError(
            f"{folder} was begun by an earlier version, which did not record the content of its "
            f"files: train on it as it is, or prepare again in another folder (--prepared)"
        )
    changed = [k for k in identity | before if identity.get(k) != before.get(k)]
    if changed:
        raise ValueError(
            f"{folder} was begun with another {', '.join(changed)}; remove the folder, or "
            f"choose another one, to prepare the set again"
        )


class Writer:
    """Write a set shard by shard.

    `identity` holds the inputs that all records depend on. Raises ValueError if the folder was
    begun with another identity. `key` is the key of a shard's content; without it a shard is known
    by its number alone.
    """

    def __init__(self, folder: Path, identity: dict):
        check_identity(folder, identity)
        self.folder, self.identity = folder, identity
        folder.mkdir(parents=True, exist_ok=True)
        remove_left(folder)
        replace_text(folder / "identity.json", json.dumps(identity, indent=1))

    def has(self, shard: int, key: str = "") -> bool:
        """Return True if the shard has been written."""
        return _shard_path(self.folder, shard, key).is_file()

    def write(
        self,
        shard: int,
        records: Sequence[dict[str, np.ndarray]],
        rows: list[dict],
        key: str = "",
        origins: Sequence[Origin] = (),
        left_out: Sequence[str] = (),
    ) -> None:
        """Write one shard: its records, and for each a row of the index and its origin.

        `left_out` are lines for the files that gave no record. The set is unfinished from now on.
        """
        path = _shard_path(self.folder, shard, key)
        (self.folder / "header.json").unlink(missing_ok=True)
        columns = {
            name: np.array([row[name] for row in rows], kind) for name, kind in INDEX_TYPES.items()
        }
        for name in Origin._fields:
            columns[name] = np.array([getattr(origin, name) for origin in origins], "S32")
        columns["left_out"] = np.array(left_out, str)
        replace(path.with_suffix(".npz"), lambda new: _save_columns(new, columns))
        replace(path, lambda new: _write_records(new, records))

    def finish(self, num_shards: int, keys: Sequence[str] = (), **more) -> list[str]:
        """Join the rows of all shards into the index, then write the header; `more` goes into it.

        Return the lines for files that were left out. The header is written last: a set without it
        is not readable. Then shards that are out of date are deleted.
        """
        paths = [
            _shard_path(self.folder, shard, keys[shard] if keys else "")
            for shard in range(num_shards)
        ]
        parts = [_load_columns(path.with_suffix(".npz")) for path in paths]
        for part in parts:  # shards of earlier versions, without mixtures, name no source
            part.setdefault("source", np.full(len(part["clip"]), ""))
        index = {name: np.concatenate([part[name] for part in parts]) for name in INDEX_TYPES}
        header = {
            "version": VERSION,
            **self.identity,
            **more,
            "records": len(index["clip"]),
            "shards": [len(part["clip"]) for part in parts],
            "keys": list(keys),
            "bytes": [path.stat().st_size for path in paths],
        }
        replace(self.folder / "index.npz", lambda new: _save_columns(new, index))
        replace_text(self.folder / "header.json", json.dumps(header, indent=1))
        current = {path.stem for path in paths}
        for path in self.folder.iterdir():
            if KEYED.fullmatch(path.name) and path.stem not in current:
                path.unlink(missing_ok=True)
        return [line for part in parts for line in part.get("left_out", np.array([])).tolist()]


class Kept:
    """The records in the shards of a set's folder, current or not, by the key of their pixels."""

    def __init__(self, folder: Path):
        self.places: dict[str, tuple[Path, int, str]] = {}
        self.open: tuple[Path | None, ArrayRecordReader | None] = (None, None)
        for path in sorted(folder.glob("shard-*.npz")):
            try:
                columns = _load_columns(path)
            except (OSError, ValueError, zipfile.BadZipFile):  # damaged: its records are made again
                continue
            pixels, captions = (columns.get(name, np.array([])) for name in Origin._fields)
            for row, found in enumerate(zip(pixels.tolist(), captions.tolist(), strict=True)):
                one, words = (value.decode() for value in found)
                self.places[one] = path.with_suffix(".arrayrecord"), row, words

    def get(self, pixels: str) -> tuple[dict[str, np.ndarray], str] | None:
        """Return (record, key of its captions) of some pixels; None if no readable shard has it."""
        path, row, captions = self.places.get(pixels, (None, 0, ""))
        if path is None or not path.is_file():
            return None
        try:
            if self.open[0] != path:
                self.open = path, ArrayRecordReader(str(path), "readahead_buffer_size:0")
            return _arrays(self.open[1].read([row])[0]), captions
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError):  # damaged
            return None


class Records:
    """A finished set: its `index` columns, its `header`, and its records by id, from any thread.

    A shard is opened when one of its records is read; at most `READERS` shards are open at once.
    Opening a set checks the file size of every shard. In sets of at most `LOOKED_INTO` shards it
    also checks their record counts. Raises ValueError for a set that is missing, unfinished or
    damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / "header.json").is_file():
            raise ValueError(
                f"{folder} holds no finished set; run python -m easyanimate_jax prepare"
            )
        self.header = json.loads((self.folder / "header.json").read_text())
        if self.header["version"] != VERSION:
            raise ValueError(
                f"{folder} has version {self.header['version']}, but this code reads version "
                f"{VERSION}; prepare the set again"
            )
        self.index = _load_columns(self.folder / "index.npz")
        self.ends = np.cumsum(self.header["shards"])
        if len(self) != self.ends[-1]:
            raise ValueError(
                f"{self.folder / 'index.npz'} has {len(self)} rows, and the header counts "
                f"{self.ends[-1]} records; prepare the set again"
            )
        self.readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()  # last used at the end
        self.lock = threading.Lock()
        sizes = self.header.get("bytes", [None] * len(self.ends))
        for shard, size in enumerate(sizes):
            self._look_at(shard, size)
            if len(sizes) <= LOOKED_INTO:
                self._open(shard).close()

    def __len__(self) -> int:
        return len(self.index["clip"])

    def __reduce__(self):  # a process opens its own readers
        return Records, (self.folder,)

    def __getitem__(self, record: int) -> dict[str, np.ndarray]:
        shard = int(np.searchsorted(self.ends, record, side="right"))
        first = self.ends[shard] - self.header["shards"][shard]
        try:
            return _arrays(self._reader(shard).read([int(record - first)])[0])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(self._damaged(shard, f"record {record}: {error}")) from error

    def _reader(self, shard: int) -> ArrayRecordReader:
        """Return the shard's reader.

        A reader removed here closes once no other thread uses it.
        """
        with self.lock:
            if shard not in self.readers:
                self.readers[shard] = self._open(shard)
                if len(self.readers) > READERS:
                    self.readers.popitem(last=False)
            self.readers.move_to_end(shard)
            return self.readers[shard]

    def _look_at(self, shard: int, size: int | None) -> None:
        path = self._path(shard)
        if not path.is_file():
            raise ValueError(self._damaged(shard, "the file is missing"))
        if size is not None and path.stat().st_size != size:
            raise ValueError(self._damaged(shard, f"{path.stat().st_size} of {size} bytes"))

    def _open(self, shard: int) -> ArrayRecordReader:
        path, count = self._path(shard), self.header["shards"][shard]
        try:
            path.open("rb").close()  # ArrayRecordReader would hide the reason of a failure
        except OSError as error:
            if not is_of_the_system(error):
                raise ValueError(self._damaged(shard, str(error))) from error
            if error.errno != errno.EMFILE:
                raise
            raise OSError(
                errno.EMFILE,
                f"{path} cannot be opened: this process may open no more files; raise "
                f"`ulimit -n` (now {_most_files()})",
            ) from error
        # A damaged file opens without an error and reports 0 records.
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
        if reader.num_records() != count:
            raise ValueError(self._damaged(shard, f"{reader.num_records()} of {count} records"))
        return reader

    def _damaged(self, shard: int, what: str) -> str:
        return (
            f"{self._path(shard)} is damaged ({what}); remove it and run "
            f"python -m easyanimate_jax prepare again"
        )

    def _path(self, shard: int) -> Path:
        keys = self.header.get("keys")  # sets of earlier versions have none
        return _shard_path(self.folder, shard, keys[shard] if keys else "")


def _most_files() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def write_texts(path: Path, texts: Texts, key: str = "") -> None:
    """Write text states, one array per encoder, and the key of their prompts."""
    content = save({f"text{i}": text for i, text in enumerate(texts)}, {"key": key})
    replace(path, lambda new: new.write_bytes(content))


def texts_key(path: str | os.PathLike) -> str:
    """Return the key of the prompts of text states; "" for a file of an earlier version."""
    with safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get("key", "")


def read_texts(path: str | os.PathLike) -> Texts:
    """Return text states as float32, one array (rows, L, width) per encoder.

    Raises ValueError if the file is missing.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing; run python -m easyanimate_jax prepare")
    return tuple(text.astype(np.float32) for _, text in sorted(load_file(path).items()))


def _shard_path(folder: Path, shard: int, key: str) -> Path:
    return folder / f"shard-{shard:05d}{f'-{key}' if key else ''}.arrayrecord"


def _write_records(path: Path, records: Sequence[dict[str, np.ndarray]]) -> None:
    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(save(record))
        writer.close()
    except RuntimeError as error:  # of a full disk, too
        raise OSError(errno.EIO, f"cannot be written ({error})") from error


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a record as views into its safetensors bytes, without copying."""
    start = 8 + int.from_bytes(content[:8], "little")
    body, arrays = memoryview(content)[start:], {}
    for name, field in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = field["data_offsets"]
            values = np.frombuffer(body[begin:end], DTYPES[field["dtype"]])
            arrays[name] = values.reshape(field["shape"])
    return arrays


def _save_columns(path: Path, columns: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # np.savez would append .npz to a name
        np.savez(file, **columns)


def _load_columns(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as columns:
        return dict(columns)
