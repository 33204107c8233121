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
import io
import itertools
import json
from collections.abc import Sequence

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from easyanimate_jax.data.shards import Shards, key_array, shard_name
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.stores import Place

GROUP = 4096  # rows of a group
KEYS = pyarrow.list_(pyarrow.binary(16))
FOLDER, LATEST = "manifests", "manifest.json"
WHOLE = 2**20  # the weight of a full shard


class Manifest:
    """A written manifest: `about` holds its `shards`, the names of the files, and more."""

    def __init__(self, file: Place):
        self.file = file
        self.parquet = pyarrow.parquet.ParquetFile(_opened(file))
        self.about = json.loads(self.parquet.schema_arrow.metadata[b"about"])
        self.shards: list[str] = self.about["shards"]

    def __len__(self) -> int:
        return self.parquet.metadata.num_rows

    def columns(self, names: Sequence[str]) -> pyarrow.Table:
        """Return columns of all rows."""
        return self.parquet.read(list(names))

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


def plan(folder: Place, rows: pyarrow.Table, weights: np.ndarray, about: dict) -> Manifest:
    """Return the manifest that makes what is missing of `rows`, written unless there is one.

    `rows` have the column `keys`, a list per row; the shards are in `folder`/shards. A shard is
    full when the `weights` of its rows reach WHOLE. The manifest becomes the latest.
    """
    keys = rows["keys"].combine_chunks()
    number, name = 0, _digest(rows.combine_chunks(), about)
    while (file := folder / FOLDER / f"{name}-{number}.parquet").is_file():
        number += 1
    shards = Shards(folder / "shards")
    table, notes = shards.tables()
    known = np.isin(key_array(keys.flatten()), key_array(table["key"]))
    for damaged in set(shards.sizes) - set(notes):
        (shards.folder / damaged).unlink(missing_ok=True)
    before = Manifest(folder / FOLDER / f"{name}-{number - 1}.parquet") if number else None
    if before is not None and np.all(known | before.makes()):
        file = before.file
    else:
        stores.create(file, _content(rows, keys, ~known, weights, about))
    stores.replace_text(folder / LATEST, json.dumps({"file": file.name}))
    return Manifest(file)  # of whoever was first


def latest(folder: Place) -> Manifest:
    """Return the manifest that was planned last. Raises ValueError if there is none."""
    file = folder / LATEST
    if not file.is_file():
        raise ValueError(
            f"{folder} has no manifest: run python -m easyanimate_jax prepare with --step plan once"
        )
    return Manifest(folder / FOLDER / json.loads(file.read_text())["file"])


def _content(rows, keys: pyarrow.ListArray, make: np.ndarray, weights, about: dict) -> bytes:
    """Return the file of a manifest that makes the flagged keys."""
    row = np.repeat(np.arange(len(keys)), np.diff(keys.offsets.to_numpy()))
    chosen = np.flatnonzero(np.bincount(row[make], minlength=len(keys)))
    shard = np.full(len(keys), -1, np.int32)
    shard[chosen] = _numbered((np.cumsum(weights[chosen]) - weights[chosen]) // WHOLE)
    flat, of_shard = key_array(keys.flatten())[make], shard[row[make]]
    ends = np.searchsorted(of_shard, np.arange(shard.max(initial=-1) + 2))  # it ascends
    names = [
        shard_name([one.ljust(16, b"\0").hex() for one in flat[first:last]])
        for first, last in itertools.pairwise(ends.tolist())
    ]
    flags = pyarrow.ListArray.from_arrays(keys.offsets, pyarrow.array(make, pyarrow.bool_()))
    table = rows.append_column("make", flags).append_column("shard", pyarrow.array(shard))
    table = table.replace_schema_metadata({"about": json.dumps(about | {"shards": names})})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, row_group_size=GROUP, compression="zstd")
    return sink.getvalue()


def _digest(rows: pyarrow.Table, about: dict) -> str:
    """Return a hash of all values of a table, and of more."""
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12)
    for batch in rows.to_batches(max_chunksize=GROUP):
        digest.update(batch.serialize())
    return digest.hexdigest()


def _numbered(values: np.ndarray) -> np.ndarray:
    """Return for each value how many different ones come before it; the values ascend."""
    return np.cumsum(np.diff(values, prepend=values[:1]) > 0)


def _opened(file: Place):
    return open(file, "rb") if hasattr(file, "__fspath__") else file.open()
