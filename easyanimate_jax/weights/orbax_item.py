"""Read the arrays of one item of an orbax checkpoint from its files, without a device."""

import json
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from easyanimate_jax.weights.fingerprint import fingerprint_box
from easyanimate_jax.weights.lazy import Tensor


def names(item: Path) -> list[str]:
    """Return the names of the arrays. Raises ValueError if the folder is not an item."""
    if not (item / "_METADATA").is_file():
        raise ValueError(f"{item} is no item of an orbax checkpoint: _METADATA is missing")
    keys = json.loads((item / "_METADATA").read_text())["tree_metadata"].values()
    return [".".join(part["key"] for part in key["key_metadata"]) for key in keys]


def tensor(item: Path, name: str) -> Tensor:
    """Return one array as a `Tensor`, which reads only the boxes that are asked for."""
    array = cache(lambda: _open(item, name))
    shape, dtype = array().shape, array().dtype.numpy_dtype
    return Tensor(shape, dtype, lambda box: np.asarray(array()[box].read().result()))


def fingerprint_on_disk(item: Path, name: str) -> int:
    """Return the fingerprint of an array's stored bytes; memory holds one chunk at a time."""
    array = _open(item, name)
    if 0 in array.shape:
        return 0
    chunk = array.chunk_layout.read_chunk.shape or ()  # None for a scalar
    starts = product(*(range(0, n, step) for n, step in zip(array.shape, chunk, strict=True)))
    total = 0
    for start in starts:
        ends = (min(a + c, n) for a, c, n in zip(start, chunk, array.shape, strict=True))
        box = tuple(slice(a, b) for a, b in zip(start, ends, strict=True))
        total += fingerprint_box(np.asarray(array[box].read().result()), start, array.shape)
    return total % 2**32


def _open(item: Path, name: str):
    import tensorstore

    # A spec, not a URL: the name of a folder may contain "#", "?" or "%".
    folder = {"driver": "file", "path": f"{item.absolute()}/"}
    store = {"driver": "ocdbt", "base": folder, "path": name}
    return tensorstore.open({"driver": "zarr", "kvstore": store}).result()
