"""The manifest of a set: what its records are, and which shards make what is missing.

    SET/manifests/BASE-0.parquet        a row per clip, sorted by shape; shards are runs of rows
    OUT/texts/manifests/BASE-0.parquet  a row per caption of all sets
    .../manifest.json                   the name of the latest

A manifest is written once by whoever plans first, and all processes that make its shards read it.
They read only the groups of rows of their own shards, so they start in seconds whatever its size.
BASE is the key of what the set holds. If entries get lost, the same set is planned again, under the
next number.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from easyanimate_jax.data.shards import Shards, key_array, shard_name
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.stores import Place

GROUP = 4096  # rows of a group
CHUNK = 2**16  # rows that are read at a time
KEYS = pyarrow.list_(pyarrow.binary(16))
FOLDER, LATEST = "manifests", "manifest.json"
WHOLE = 2**20  # the weight of a full shard


class Manifest:
    """A written manifest: `about` holds its `shards`, the names of the files, and more."""

    def __init__(self, file: Place):
        self.file = file
        self.parquet = pyarrow.parquet.ParquetFile(_opened(file))
        self.about = json.loads(self.parquet.metadata.metadata[b"about"])
        self.shards: list[str] = self.about["shards"]

    def __len__(self) -> int:
        return self.parquet.metadata.num_rows

    def columns(self, names: Sequence[str]) -> pyarrow.Table:
        """Return columns of all rows."""
        return self.parquet.read(list(names))

    def chunks(self, names: Sequence[str]) -> Iterator[pyarrow.Table]:
        """Yield columns of some rows at a time, each column in one piece."""
        for batch in self.parquet.iter_batches(CHUNK, columns=list(names)):
            yield pyarrow.Table.from_batches([batch])

    def makes(self) -> np.ndarray:
        """Return for the keys of all rows whether a shard of this manifest makes them."""
        flags = self.parquet.read(["make"])["make"].combine_chunks().flatten()
        return flags.to_numpy(zero_copy_only=False).astype(bool)

    def rows(self, shard: int) -> list[dict]:
        """Return the rows of a shard; only their groups are read."""
        metadata, parts = self.parquet.metadata, []
        leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        at = leaves.index("shard")
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(at).statistics
            if statistics.min <= shard <= statistics.max:
                part = self.parquet.read_row_group(group)
                parts.append(part.filter(pyarrow.compute.equal(part["shard"], shard)))
        return [row for part in parts for row in part.to_pylist()]


def plan(
    folder: Place,
    tables: Callable[[], Iterator[pyarrow.Table]],
    weights: Callable[[pyarrow.Table], np.ndarray],
    about: dict,
) -> None:
    """Write the manifest that makes what is missing of rows, unless there is one; it is the latest.

    `tables` yields the rows, in order and in chunks, as often as it is called. They have the column
    `keys`, a list per row; the shards are in `folder`/shards. A shard is full when the `weights` of
    its rows reach WHOLE.
    """
    shards = Shards(folder / "shards")
    table, notes = shards.tables()
    for damaged in set(shards.sizes) - set(notes):
        (shards.folder / damaged).unlink(missing_ok=True)
    have = np.sort(key_array(table["key"]))
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12)
    known, counts, heavy = [], [], []
    for rows in tables():
        for batch in rows.to_batches():
            digest.update(batch.serialize())
        keys = rows["keys"].combine_chunks()
        known.append(_among(have, key_array(keys.flatten())))
        counts.append(np.diff(keys.offsets.to_numpy()))
        heavy.append(weights(rows))
    known, counts, heavy = map(np.concatenate, (known, counts, heavy))
    number, name = 0, digest.hexdigest()
    while (file := folder / FOLDER / f"{name}-{number}.parquet").is_file():
        number += 1
    before = Manifest(folder / FOLDER / f"{name}-{number - 1}.parquet") if number else None
    if before is not None and np.all(known | before.makes()):
        file = before.file
    else:
        shard = _shards(~known, counts, heavy)
        # Of several writers of one name the first has it.
        stores.create_file(file, lambda opened: _write(opened, tables(), ~known, shard, about))
    stores.replace_text(folder / LATEST, json.dumps({"file": file.name}))


def latest(folder: Place) -> Manifest:
    """Return the manifest that was planned last. Raises ValueError if there is none."""
    file = folder / LATEST
    if not file.is_file():
        raise ValueError(
            f"{folder} has no manifest: run python -m easyanimate_jax prepare with --step plan once"
        )
    return Manifest(folder / FOLDER / json.loads(file.read_text())["file"])


def _shards(make: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the shard of each row, -1 for a row of which nothing is made."""
    row = np.repeat(np.arange(len(counts)), counts)
    chosen = np.flatnonzero(np.bincount(row[make], minlength=len(counts)))
    shard = np.full(len(counts), -1, np.int32)
    shard[chosen] = _numbered((np.cumsum(weights[chosen]) - weights[chosen]) // WHOLE)
    return shard


def _write(
    file: BinaryIO,
    tables: Iterator[pyarrow.Table],
    make: np.ndarray,
    shard: np.ndarray,
    about: dict,
) -> None:
    """Write the file of a manifest; `make` flags the keys that its shards make."""
    names, keys, writer, at, row = [], [], None, 0, 0
    for rows in tables:
        lists = rows["keys"].combine_chunks()
        flags, own = make[at : at + len(lists.flatten())], shard[row : row + len(rows)]
        at, row = at + len(flags), row + len(rows)
        told = pyarrow.ListArray.from_arrays(lists.offsets, pyarrow.array(flags, pyarrow.bool_()))
        rows = rows.append_column("make", told).append_column("shard", pyarrow.array(own))
        if writer is None:
            writer = pyarrow.parquet.ParquetWriter(file, rows.schema, compression="zstd")
        writer.write_table(rows, row_group_size=GROUP)
        of_key = np.repeat(own, np.diff(lists.offsets.to_numpy()))[flags]
        for number, one in zip(of_key.tolist(), key_array(lists.flatten())[flags], strict=True):
            if number > len(names):  # the first key of the next shard
                names.append(shard_name(keys))
                keys = []
            keys.append(one.ljust(16, b"\0").hex())
    names += [shard_name(keys)] if keys else []
    writer.add_key_value_metadata({"about": json.dumps(about | {"shards": names})})
    writer.close()


def _among(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return which keys are among the known ones, which are sorted."""
    if not len(known):
        return np.zeros(len(keys), bool)
    return known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys


def _numbered(values: np.ndarray) -> np.ndarray:
    """Return for each value how many different ones come before it; the values ascend."""
    return np.cumsum(np.diff(values, prepend=values[:1]) > 0)


def _opened(file: Place):
    return open(file, "rb") if hasattr(file, "__fspath__") else file.open()
