"""Encoded examples on disk: ArrayRecord shards, an index, a header.

    SET/shard-00000.arrayrecord   each record: the safetensors bytes of a dict of arrays
    SET/shard-00000.npz           the shard's rows of the index, until the set is complete
    SET/index.npz                 one row per record; a record's id is its row
    SET/header.json               the inputs of the set; records and bytes of every shard

Every file is written completely or not at all, so writing resumes at the first missing shard.
"""

import errno
import json
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Float
from safetensors.numpy import load_file, save

from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.facts import check_fields
from easyanimate_jax.weights.files import DTYPES

VERSION = 1
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

    pixels: bool = False
    """Store only text states and the clip's location. Training then decodes and encodes the clip,
    with one condition and one control, each time that it draws the clip."""

    reference_rate: bool = False
    """Use every round(fps / 8)-th frame of a video, as the reference does, instead of sampling 8
    frames per second by time. Videos then change their speed: at 12 frames per second to 0.67 of
    it, at 30 frames per second to 0.94."""

    def __post_init__(self):
        check_fields(self, min_side="[0, inf)", min_quality="[0, 1]", condition_draws="[0, inf)")
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


class Writer:
    """Write a set shard by shard.

    `identity` holds all inputs that determine the records. Raises ValueError if the folder was
    begun with another identity.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.identity = folder, identity
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "identity.json"
        if path.is_file():
            before = json.loads(path.read_text())
            changed = [k for k in identity | before if identity.get(k) != before.get(k)]
            if changed:
                raise ValueError(
                    f"{folder} was begun with another {', '.join(changed)}; remove the folder, or "
                    f"choose another one, to prepare the set again"
                )
        _replace(path, lambda new: new.write_text(json.dumps(identity, indent=1)))

    def has(self, shard: int) -> bool:
        """Return True if the shard has been written."""
        return _shard_path(self.folder, shard).is_file()

    def write(self, shard: int, records: Sequence[dict[str, np.ndarray]], rows: list[dict]) -> None:
        """Write one shard: its records, and one row of the index for each."""
        path = _shard_path(self.folder, shard)
        for left in self.folder.glob(f"{path.stem}.*.new"):  # from a killed process
            left.unlink()
        columns = {
            name: np.array([row[name] for row in rows], kind) for name, kind in INDEX_TYPES.items()
        }
        _replace(path.with_suffix(".npz"), lambda new: _save_columns(new, columns))
        _replace(path, lambda new: _write_records(new, records))

    def finish(self, num_shards: int) -> None:
        """Join the rows of all shards into the index, then write the header.

        The header is written last: a set without it is not readable.
        """
        parts = [
            _load_columns(_shard_path(self.folder, s).with_suffix(".npz"))
            for s in range(num_shards)
        ]
        for part in parts:  # shards of earlier versions, without mixtures, name no source
            part.setdefault("source", np.full(len(part["clip"]), ""))
        index = {name: np.concatenate([part[name] for part in parts]) for name in INDEX_TYPES}
        header = {
            "version": VERSION,
            **self.identity,
            "records": len(index["clip"]),
            "shards": [len(part["clip"]) for part in parts],
            "bytes": [_shard_path(self.folder, s).stat().st_size for s in range(num_shards)],
        }
        _replace(self.folder / "index.npz", lambda new: _save_columns(new, index))
        _replace(
            self.folder / "header.json", lambda new: new.write_text(json.dumps(header, indent=1))
        )


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
        path = _shard_path(self.folder, shard)
        if not path.is_file():
            raise ValueError(self._damaged(shard, "the file is missing"))
        if size is not None and path.stat().st_size != size:
            raise ValueError(self._damaged(shard, f"{path.stat().st_size} of {size} bytes"))

    def _open(self, shard: int) -> ArrayRecordReader:
        path, count = _shard_path(self.folder, shard), self.header["shards"][shard]
        try:
            path.open("rb").close()  # ArrayRecordReader would hide the reason of a failure
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise ValueError(self._damaged(shard, str(error))) from error
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
            f"{_shard_path(self.folder, shard)} is damaged ({what}); remove it and run "
            f"python -m easyanimate_jax prepare again"
        )


def _most_files() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def write_texts(path: Path, texts: Texts) -> None:
    """Write text states, one array per encoder."""
    content = save({f"text{i}": text for i, text in enumerate(texts)})
    _replace(path, lambda new: new.write_bytes(content))


def read_texts(path: str | os.PathLike) -> Texts:
    """Return text states as float32, one array (rows, L, width) per encoder.

    Raises ValueError if the file is missing.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing; run python -m easyanimate_jax prepare")
    return tuple(text.astype(np.float32) for _, text in sorted(load_file(path).items()))


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.arrayrecord"


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


def _replace(path: Path, write) -> None:
    """Write `path` with `write`, then rename it; other processes may write the same file.

    If writing fails, nothing of it is left, and OSError names `path`.
    """
    new = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.new")
    try:
        write(new)
        os.replace(new, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        new.unlink(missing_ok=True)
