"""Shards: arrays in one file, each found by the key of its content; on a disk or in a store.

    NAME.shard      the bytes of the entries, one after the other; then a table, its size, MAGIC

An entry is the safetensors bytes of a dict of arrays. The table is a Parquet file with the key,
place and checksum of every entry, and what the maker notes beside it. A shard is created whole and
only if there is none, so of two makers one wins, and what it has stored is never overwritten.
Entries are read by ranges, many at once, without opening the shard.
"""

import io
import json
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from safetensors.numpy import save

from easyanimate_jax.data.contents import key
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.weights.files import DTYPES

MAGIC = b"EAJSHRD2"
END = 8 + len(MAGIC)  # bytes: the table's size, and MAGIC
TAIL = 2**17  # bytes read at once from the end of a shard: most tables are in them
TABLES = 64  # tables read at the same time
SCHEMA = pyarrow.schema(
    {
        "key": pyarrow.binary(16),
        "begin": pyarrow.uint64(),
        "size": pyarrow.uint32(),
        "checksum": pyarrow.uint32(),
    }
)
SUFFIX = ".shard"

Arrays = dict[str, np.ndarray]


class Spot(NamedTuple):
    """The place of an entry."""

    file: str  # relative to the folder of shards
    begin: int
    size: int  # bytes
    checksum: int


def shard_name(keys: Sequence[str]) -> str:
    """Return the name of the shard of these entries, below a folder with at most 256 folders."""
    name = key(list(keys))
    return f"{name[:2]}/{name}{SUFFIX}"


def write_shard(target: Place, entries: Iterable[tuple[str, Arrays]], notes: dict) -> None:
    """Create a shard of (key, arrays) in this order, unless it exists; `notes` are JSON values."""

    def write(file: BinaryIO) -> None:
        rows, begin = [], 0
        for entry, arrays in entries:
            content = save(arrays)
            file.write(content)
            rows.append((bytes.fromhex(entry), begin, len(content), zlib.crc32(content)))
            begin += len(content)
        columns = zip(*rows, strict=True) if rows else [()] * len(SCHEMA)
        table = pyarrow.table(list(map(list, columns)), schema=SCHEMA)
        sink = io.BytesIO()
        pyarrow.parquet.write_table(
            table.replace_schema_metadata({"notes": json.dumps(notes)}), sink, compression="zstd"
        )
        file.write(sink.getvalue() + len(sink.getvalue()).to_bytes(8, "little") + MAGIC)

    stores.create_file(target, write)


class Shards:
    """The shards below a folder, by their names; `sizes` are those of one listing, in bytes."""

    def __init__(self, folder: Place):
        self.folder = folder
        found = [f for f in stores.list_files(folder) if f.name.endswith(SUFFIX)]
        self.sizes = {f.name: f.size for f in sorted(found)}

    def tables(self, names: Iterable[str] | None = None) -> tuple[pyarrow.Table, dict[str, dict]]:
        """Return the entries of all shards, or of some, with a column `file`, and their notes.

        `file` counts the names in their order. Shards that are damaged are left out.
        """
        names = list(self.sizes if names is None else names)
        with ThreadPoolExecutor(TABLES) as pool:
            found = list(pool.map(self._table, names))
        parts, notes = [], {}
        for number, (name, table) in enumerate(zip(names, found, strict=True)):
            if table is not None:
                notes[name] = json.loads(table.schema.metadata[b"notes"])
                files = pyarrow.array(np.full(len(table), number, np.uint32))
                parts.append(table.replace_schema_metadata(None).append_column("file", files))
        empty = SCHEMA.empty_table().append_column("file", pyarrow.array([], pyarrow.uint32()))
        return pyarrow.concat_tables([empty, *parts]), notes

    def _table(self, name: str) -> pyarrow.Table | None:
        try:
            return read_table(self.folder / name, self.sizes[name])
        except (ValueError, FileNotFoundError):  # its entries are made again
            return None


def read_table(shard: Place, size: int) -> pyarrow.Table:
    """Return the table of a shard of `size` bytes; its metadata holds the notes.

    Raises ValueError for a file that is no whole shard.
    """
    first = max(0, size - TAIL)
    (tail,) = stores.read_ranges(shard, [(first, size)])
    length = int.from_bytes(tail[-END : -len(MAGIC)], "little")
    if not tail.endswith(MAGIC) or length + END > size:
        raise ValueError(f"{shard} is damaged: it does not end as a shard does")
    if length + END > len(tail):
        (tail,) = stores.read_ranges(shard, [(size - END - length, size)])
    try:
        return pyarrow.parquet.read_table(io.BytesIO(tail[-END - length : -END]))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{shard} is damaged: {error}") from error


def read_entry(folder: Place, spot: Spot) -> Arrays:
    """Return the arrays of an entry as views of its bytes, without copying.

    Raises ValueError for bytes that are not those that were written, and FileNotFoundError.
    """
    (content,) = stores.read_ranges(folder / spot.file, [(spot.begin, spot.begin + spot.size)])
    if zlib.crc32(content) != spot.checksum:
        raise ValueError(f"{folder / spot.file} is damaged at byte {spot.begin:,}")
    start = 8 + int.from_bytes(content[:8], "little")
    body, arrays = memoryview(content)[start:], {}
    for name, field in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = field["data_offsets"]
            values = np.frombuffer(body[begin:end], DTYPES[field["dtype"]])
            arrays[name] = values.reshape(field["shape"])
    return arrays


def key_array(column: pyarrow.ChunkedArray | pyarrow.Array) -> np.ndarray:
    """Return a column of keys as an array of S16, without decoding."""
    chunks = column.chunks if isinstance(column, pyarrow.ChunkedArray) else [column]
    parts = [np.frombuffer(c.buffers()[1], "S16", len(c), 16 * c.offset) for c in chunks if len(c)]
    return np.concatenate([np.zeros(0, "S16"), *parts])
