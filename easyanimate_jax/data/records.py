"""Encoded examples on disk: ArrayRecord shards, an index, a header.

    SET/shard-00000.arrayrecord   each record the safetensors bytes of a dict of arrays
    SET/shard-00000.npz           the shard's rows of the index, until all shards are there
    SET/index.npz                 one row per record; a record's id is its row
    SET/header.json               what the set was made from; records and bytes of every shard

Every file appears whole or not at all, so writing resumes at the first missing shard.
"""

import errno
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Float
from safetensors.numpy import load_file, save, save_file

from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.facts import check_fields
from easyanimate_jax.weights.files import DTYPES

VERSION = 1
READERS = 64  # shards that are open at once
LOOKED_INTO = 256  # shards of a set that are opened one by one to see whether they are whole
INDEX_TYPES = {
    "clip": str,  # file name in the source folder
    "kind": str,  # "video" or "image"
    "frames": np.int32,  # as encoded; so are height and width
    "height": np.int32,
    "width": np.int32,
    "T": np.int32,
    "gh": np.int32,
    "gw": np.int32,
    "tokens": np.int32,
    "source_height": np.int32,
    "source_width": np.int32,
    "num_captions": np.int32,
    "source": str,  # its name in a mixture, or ""
}

Texts = tuple[Float[np.ndarray, "_rows _L _width"], ...]


CONTROLS = ("file", "camera", "canny", "soft_edge", "scribble", "lines", "line_art")


@dataclass(frozen=True)
class LatentSet:
    """Clips of one source encoded under one budget."""

    name: str
    """Name of the set and of its folder below the config's `prepared`."""

    budget: Budget
    """Token lengths and resolutions that the clips are cut to."""

    kinds: tuple[str, ...] = ("image", "video")
    """Kinds of files that are taken: "image", "video" or both."""

    min_side: int = 0
    """Least shorter side of a source, in pixels; 0 takes all sizes."""

    min_quality: float = 0.0
    """Share of a curated table's clips that a clip must beat: 0.9 takes the best tenth, 0 all."""

    condition_draws: int = 0
    """Masks and noised references that are encoded with each clip for I2V (spec 6.1); 0 is none."""

    control: str | tuple[str, ...] = ()
    """What leads a control model (spec 7.2): "file" (the clip's control file), "camera" (its pose
    file), names of operators that draw the clip, or "" for none. Of several, training draws one for
    each row."""

    random_reference: bool = False
    """Take any frame as the reference of a control model, the first in 40 % of the clips; else
    always the first (spec 7.2)."""

    pixels: bool = False
    """Keep text states and the clip's place only; training then decodes and encodes the clip, one
    condition and one control at every visit."""

    reference_rate: bool = False
    """Take every round(fps / 8)-th frame of a film, as the reference does, instead of 8 frames a
    second by time: a film of 12 frames a second then plays at 0.67 of its speed, one of 30 at
    0.94."""

    def __post_init__(self):
        check_fields(self, min_side="[0, inf)", min_quality="[0, 1]", condition_draws="[0, inf)")
        if isinstance(self.control, str):
            object.__setattr__(self, "control", (self.control,) if self.control else ())
        for control in self.control:
            if control not in CONTROLS:
                raise ValueError(
                    f"set {self.name!r}: there is no control {control!r}; choose of "
                    f"{', '.join(CONTROLS)}"
                )
        if "camera" in self.control and len(self.control) > 1:
            raise ValueError(
                f"set {self.name!r}: control {self.control}: a camera has other channels than "
                f"videos; give it a set of its own"
            )
        if not self.kinds or not set(self.kinds) <= {"image", "video"}:
            raise ValueError(f"set {self.name!r}: kinds {self.kinds} must be of 'image', 'video'")


class Writer:
    """Writes a set shard by shard. `identity` is what the records are a function of."""

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
                    f"choose another one, to prepare anew"
                )
        _replace(path, lambda new: new.write_text(json.dumps(identity, indent=1)))

    def has(self, shard: int) -> bool:
        return _shard_path(self.folder, shard).is_file()

    def write(self, shard: int, records: Sequence[dict[str, np.ndarray]], rows: list[dict]) -> None:
        """One shard: its records and, for each, a row of the index."""
        path = _shard_path(self.folder, shard)
        for left in self.folder.glob(f"{path.stem}.*.new"):  # by a process that was killed
            left.unlink()
        columns = {
            name: np.array([row[name] for row in rows], kind) for name, kind in INDEX_TYPES.items()
        }
        _replace(path.with_suffix(".npz"), lambda new: _save_columns(new, columns))
        _replace(path, lambda new: _write_records(new, records))

    def finish(self, num_shards: int) -> None:
        """Join the shards' rows into the index. The header, last, makes it readable."""
        parts = [
            _load_columns(_shard_path(self.folder, s).with_suffix(".npz"))
            for s in range(num_shards)
        ]
        for part in parts:  # shards of before there were mixtures name no source
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
    """A finished set: `index` columns, `header`, and records by id, from any thread.

    Shards are opened when a record of theirs is asked for, and at most `READERS` of them at once.
    When a set is opened every shard is looked at: its size, and of at most `LOOKED_INTO` shards
    also how many records they hold.
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
                f"{folder} is of version {self.header['version']}, this code reads {VERSION}; "
                f"prepare the set again"
            )
        self.index = _load_columns(self.folder / "index.npz")
        self.ends = np.cumsum(self.header["shards"])
        if len(self) != self.ends[-1]:
            raise ValueError(
                f"{self.folder / 'index.npz'} has {len(self)} rows, and the header counts "
                f"{self.ends[-1]} records; prepare the set again"
            )
        self.readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()  # the latest used last
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
        """Return the shard's reader. One that others still read from closes behind them."""
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
            path.open("rb").close()  # the reader hides why a file does not open
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise ValueError(self._damaged(shard, str(error))) from error
            raise OSError(
                errno.EMFILE,
                f"{path} cannot be opened: this process may hold no more files; raise "
                f"`ulimit -n` (now {_most_files()})",
            ) from error
        # A damaged file opens without complaint and counts no records.
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
    """Text states, one array per encoder."""
    _replace(path, lambda new: save_file({f"text{i}": t for i, t in enumerate(texts)}, new))


def read_texts(path: str | os.PathLike) -> Texts:
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing; run python -m easyanimate_jax prepare")
    return tuple(text.astype(np.float32) for _, text in sorted(load_file(path).items()))


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.arrayrecord"


def _write_records(path: Path, records: Sequence[dict[str, np.ndarray]]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(save(record))
    writer.close()


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    """The safetensors bytes of a record, as views into them: nothing is copied."""
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
    """`path` as `write` makes it, in one rename; other processes may be making it too."""
    new = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.new")
    write(new)
    os.replace(new, path)
