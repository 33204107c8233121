"""The index of a prepared set: a row per record, with the places of its entries in the shards.

    SET/index.parquet    INDEX_TYPES, and per record lists of file, begin, size and checksum

Numbers are numpy arrays; names and words are decoded when they are asked for. An index of many rows
is turned once per host into an Arrow file that all its processes map into memory, so that a host
holds it once and a process starts in seconds.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from easyanimate_jax.data.shards import Spot
from easyanimate_jax.storage import stores, whole
from easyanimate_jax.storage.stores import Place

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
SPOTS = {
    "file": pyarrow.uint32(),  # number in the list of shards
    "begin": pyarrow.uint64(),
    "size": pyarrow.uint32(),
    "checksum": pyarrow.uint32(),
}
WORDS = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())  # few different ones
GROUP = 2**16  # rows of a group in the file
MAPPED = 2**20  # an index of more rows is mapped into memory from a file of this host


class Names:
    """A column of text; values are decoded when they are asked for."""

    def __init__(self, column: pyarrow.ChunkedArray | pyarrow.Array):
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __getitem__(self, at):
        """Return the text at a number, or the column of those at numbers, a mask or a slice."""
        if isinstance(at, int | np.integer):
            return self.column[int(at)].as_py()
        if isinstance(at, slice):
            at = np.arange(len(self))[at]
        at = np.asarray(at)
        return Names(self.column.take(np.flatnonzero(at) if at.dtype == bool else at))

    def __eq__(self, other) -> np.ndarray:
        found = pyarrow.compute.equal(self.column, pyarrow.array([other])[0])
        return found.to_numpy(zero_copy_only=False)

    def tolist(self) -> list[str]:
        return self.column.to_pylist()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.tolist(), dtype or str)


Column = np.ndarray | Names | pyarrow.Array | pyarrow.ChunkedArray


class Index(Mapping):
    """The columns of an index by name, and the places of its entries.

    Raises ValueError for a file that is no index.
    """

    def __init__(self, table: pyarrow.Table):
        self.table = table.unify_dictionaries()
        self.about = json.loads(table.schema.metadata[b"about"])
        self.columns = {}
        for name, kind in INDEX_TYPES.items():
            column = self.table[name]
            self.columns[name] = Names(column) if kind is str else _numbers(column)
        lists = {name: _one(self.table[name]) for name in SPOTS}
        self.spots = {name: _numbers(column.flatten()) for name, column in lists.items()}
        self.first = _numbers(lists["file"].offsets)
        self.first = self.first - self.first[0]

    def __len__(self) -> int:
        return len(self.columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __getitem__(self, name: str) -> np.ndarray | Names:
        return self.columns[name]

    def spot(self, record: int, number: int) -> Spot:
        """Return the place of an entry of a record."""
        at = int(self.first[record]) + number
        file, *rest = (int(column[at]) for column in self.spots.values())
        return Spot(self.about["files"][file][0], *rest)


def write_index(
    target: Place,
    columns: Mapping[str, Column],
    spots: dict[str, np.ndarray],
    counts: np.ndarray,
    about: dict,
) -> None:
    """Write an index; `counts` are the entries of each record, whose places follow each other.

    `about` holds the `files`, (name, bytes) of each shard, and JSON values of the set.
    """
    arrays = {name: _column(name, columns[name]) for name in INDEX_TYPES}
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(counts)]), pyarrow.int64())
    for name, kind in SPOTS.items():
        values = pyarrow.array(spots[name], kind)
        arrays[name] = pyarrow.LargeListArray.from_arrays(offsets, values)
    table = pyarrow.table(arrays).replace_schema_metadata({"about": json.dumps(about)})

    def write(new: Path) -> None:
        with open(new, "wb") as file:  # Arrow would take some names for URLs
            pyarrow.parquet.write_table(table, file, row_group_size=GROUP, compression="zstd")

    stores.replace(target, write)


def read_index(source: Place, cache: Path | None) -> Index:
    """Return an index. One of many rows is mapped from a file in `cache`, made if it is missing.

    Raises ValueError for a file that is damaged, FileNotFoundError if there is none.
    """
    with _opened(source) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            if parquet.metadata.num_rows <= MAPPED or cache is None:
                return Index(parquet.read(use_threads=False))
            metadata = parquet.metadata.metadata[b"about"]
            name = hashlib.blake2b(metadata, digest_size=16).hexdigest()
            target = cache / "indices" / f"{name}.arrow"
            if not target.is_file():
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                whole.replace(target, lambda new: _convert(parquet, new))
        except (pyarrow.ArrowInvalid, KeyError) as error:
            raise ValueError(f"{source} is damaged ({error}); prepare the set again") from error
    mapped = pyarrow.memory_map(os.fspath(target))
    return Index(pyarrow.ipc.open_file(mapped).read_all())


def _convert(parquet: pyarrow.parquet.ParquetFile, target: Path) -> None:
    """Write a Parquet file as an Arrow file with one chunk a column."""
    table = parquet.read(use_threads=False).unify_dictionaries().combine_chunks()
    with (
        pyarrow.OSFile(os.fspath(target), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def _opened(source: Place):
    return source.open() if not isinstance(source, Path) else open(source, "rb")


def _one(column: pyarrow.ChunkedArray) -> pyarrow.Array:
    """Return a column as one array, without copying if it is one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _numbers(column: pyarrow.ChunkedArray | pyarrow.Array) -> np.ndarray:
    return column.to_numpy() if isinstance(column, pyarrow.ChunkedArray) else np.asarray(column)


def _column(name: str, values) -> pyarrow.Array | pyarrow.ChunkedArray:
    """Return a column of the index in the type of its file."""
    kind = INDEX_TYPES[name]
    if kind is not str:
        return pyarrow.array(values, pyarrow.from_numpy_dtype(kind))
    known = isinstance(values, pyarrow.Array | pyarrow.ChunkedArray)
    texts = values if known else pyarrow.array(values, pyarrow.string())
    return texts.cast(WORDS if name in ("kind", "source") else pyarrow.large_string())
