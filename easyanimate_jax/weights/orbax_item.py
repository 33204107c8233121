"""Read the arrays of one item of an orbax checkpoint from its files.

Only the list of arrays and their bytes are read, not what orbax keeps beside them.
"""

import json
from collections.abc import Mapping
from functools import partial

import jax

from easyanimate_jax.storage.stores import Place, kvstore
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.stored_array import as_tensor, fingerprint_of, load_like


def names(item: Place) -> list[str]:
    """Return the names of the arrays. Raises ValueError if the folder is not an item."""
    if not (item / "_METADATA").is_file():
        raise ValueError(f"{item} is no item of an orbax checkpoint: _METADATA is missing")
    keys = json.loads((item / "_METADATA").read_text())["tree_metadata"].values()
    return [".".join(part["key"] for part in key["key_metadata"]) for key in keys]


def tensor(item: Place, name: str) -> Tensor:
    """Return one array as a `Tensor`, which reads only the boxes that are asked for."""
    return as_tensor(lambda: _open(item, name).result())


def fingerprint_on_disk(item: Place, name: str) -> int:
    """Return the fingerprint of an array's stored bytes; memory holds one chunk at a time."""
    return fingerprint_of(_open(item, name).result())


def load(item: Place, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Return arrays with the shapes and shardings of `like`; each process reads its own part.

    Raises ValueError if an array is missing, has another shape, or does not decode.
    """
    return load_like(partial(_open, item), like)


def _open(item: Place, name: str, context=None):
    """Return the future of an array to read."""
    import tensorstore

    # A spec, not a URL: the name of a folder may contain "#", "?" or "%".
    store = {"driver": "ocdbt", "base": kvstore(item), "path": name}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, context=context)
