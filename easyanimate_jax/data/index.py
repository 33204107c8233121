"""The index of a prepared set: a row per record, with the places of its entries in the shards.

    SET/index.parquet    INDEX_TYPES, and per record lists of file, begin, size and checksum

Numbers are numpy arrays; names and words are decoded when they are asked for. An index of many rows
is turned once per host into files that all its processes map into memory, so that a host holds it
once and a process starts in seconds.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from easyanimate_jax.data.names import Names, file_hashes
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


Column = np.ndarray | Names | pyarrow.Array | pyarrow.ChunkedArray


class Index(Mapping):
    """The columns of an index by name, and the places of its entries.

    Beside INDEX_TYPES there is the column "held" (data/held_out.py: file_hashes).
    """

    def __init__(self, columns: dict, spots: dict[str, np.ndarray], first: np.ndarray, about: dict):
        self.columns, self.spots, self.first, self.about = columns, spots, first, about

    def __len__(self) -> int:
        return len(self.columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __getitem__(self, name: str) -> np.ndarray | Names:
        return self.columns[name]

    def spot(self, record: int, number: int) -> Spot:
        """Return the place of an entry of a record."""
        at = int(self.first[record]) + number
        file, *rest = (int(self.spots[name][at]) for name in SPOTS)
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
    arrays["held"] = pyarrow.array(file_hashes(Names(arrays["clip"])))
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
    """Return an index. One of many rows is mapped from files in `cache`, made if they are missing.

    Raises ValueError for a file that is damaged, FileNotFoundError if there is none.
    """
    with _opened(source) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            about = parquet.schema_arrow.metadata[b"about"]
            if parquet.metadata.num_rows <= MAPPED or cache is None:
                return _of_table(parquet.read(use_threads=False), json.loads(about))
            name = hashlib.blake2b(about, digest_size=16).hexdigest()
            target = cache / "indices" / name
            if not (target / "index.json").is_file():
                target.mkdir(mode=0o700, parents=True, exist_ok=True)
                _convert(parquet, target, json.loads(about))
        except (pyarrow.ArrowInvalid, KeyError) as error:
            raise ValueError(f"{source} is damaged ({error}); prepare the set again") from error
    return _of_files(target)


def _of_table(table: pyarrow.Table, about: dict) -> Index:
    table = table.unify_dictionaries()
    columns = {"held": table["held"].to_numpy()}
    for name, kind in INDEX_TYPES.items():
        columns[name] = Names(table[name]) if kind is str else table[name].to_numpy()
    lists = {name: _one(table[name]) for name in SPOTS}
    spots = {name: column.flatten().to_numpy() for name, column in lists.items()}
    first = lists["file"].offsets.to_numpy()
    return Index(columns, spots, first - first[0], about)


def _convert(parquet: pyarrow.parquet.ParquetFile, target: Path, about: dict) -> None:
    """Write the columns of a Parquet file as files that can be mapped, a group at a time.

    NAME.npy holds numbers, the numbers of words, or the ends of texts, whose bytes are NAME.bin.
    Processes that convert at the same time write the same; index.json is last.
    """
    words, ends = {"kind": {}, "source": {}}, {"clip": 0, "first": 0}
    with contextlib.ExitStack() as stack:

        def writer(name: str) -> BinaryIO:
            path = target / f"{name}.{os.getpid()}"
            stack.callback(os.replace, path, target / name)
            return stack.enter_context(open(path, "wb"))

        files = {name: writer(name) for name in (*INDEX_TYPES, *SPOTS, "held", "first", "clip.bin")}
        for name in ends:
            files[name].write(bytes(8))
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group)
            for name in (*INDEX_TYPES, "held"):
                column = _one(table[name])
                if name in words:
                    own = [words[name].setdefault(w, len(words[name])) for w in _words(column)]
                    files[name].write(np.array(own, np.int32)[column.indices].tobytes())
                elif name == "clip":
                    _, ends_of, content = column.buffers()
                    offsets = np.frombuffer(ends_of, np.int64, len(column) + 1, 8 * column.offset)
                    files["clip.bin"].write(content[offsets[0] : offsets[-1]])
                    files[name].write((offsets[1:] - offsets[0] + ends[name]).tobytes())
                    ends[name] += int(offsets[-1] - offsets[0])
                else:
                    files[name].write(column.to_numpy().tobytes())
            lists = {name: _one(table[name]) for name in SPOTS}
            for name, column in lists.items():
                files[name].write(column.flatten().to_numpy().tobytes())
            offsets = np.asarray(lists["file"].offsets)
            files["first"].write((offsets[1:] - offsets[0] + ends["first"]).tobytes())
            ends["first"] += int(offsets[-1] - offsets[0])
    told = {"about": about, "words": {name: list(known) for name, known in words.items()}}
    whole.replace_text(target / "index.json", json.dumps(told))


def _of_files(folder: Path) -> Index:
    """Return the index that `_convert` wrote, mapped into memory."""
    told = json.loads((folder / "index.json").read_text("utf-8"))

    def mapped(name: str, kind) -> np.ndarray:
        return np.memmap(folder / name, kind, "r")

    columns = {"held": mapped("held", np.uint64)}
    for name, kind in INDEX_TYPES.items():
        if name in told["words"]:
            words = pyarrow.array(told["words"][name], pyarrow.string())
            codes = pyarrow.array(mapped(name, np.int32))
            columns[name] = Names(pyarrow.DictionaryArray.from_arrays(codes, words))
        elif name == "clip":
            parts = (mapped(name, np.int64), mapped("clip.bin", np.uint8))
            buffers = [None, *map(pyarrow.py_buffer, parts)]
            rows = len(columns["held"])
            columns[name] = Names(pyarrow.Array.from_buffers(pyarrow.large_string(), rows, buffers))
        else:
            columns[name] = mapped(name, kind)
    spots = {name: mapped(name, kind.to_pandas_dtype()) for name, kind in SPOTS.items()}
    return Index(columns, spots, mapped("first", np.int64), told["about"])


def _opened(source: Place):
    return source.open() if not isinstance(source, Path) else open(source, "rb")


def _one(column: pyarrow.ChunkedArray) -> pyarrow.Array:
    """Return a column as one array, without copying if it is one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _words(column: pyarrow.DictionaryArray) -> list[str]:
    return column.dictionary.to_pylist()


def _column(name: str, values) -> pyarrow.Array | pyarrow.ChunkedArray:
    """Return a column of the index in the type of its file."""
    kind = INDEX_TYPES[name]
    if kind is not str:
        return pyarrow.array(values, pyarrow.from_numpy_dtype(kind))
    known = isinstance(values, pyarrow.Array | pyarrow.ChunkedArray)
    texts = values if known else pyarrow.array(values, pyarrow.string())
    return texts.cast(WORDS if name in ("kind", "source") else pyarrow.large_string())
