"""Read the arrays of one item of an orbax checkpoint from its files, without a device."""

import json

from easyanimate_jax.storage.stores import Place, kvstore
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.stored_array import as_tensor, fingerprint_of


def names(item: Place) -> list[str]:
    """Return the names of the arrays. Raises ValueError if the folder is not an item."""
    if not (item / "_METADATA").is_file():
        raise ValueError(f"{item} is no item of an orbax checkpoint: _METADATA is missing")
    keys = json.loads((item / "_METADATA").read_text())["tree_metadata"].values()
    return [".".join(part["key"] for part in key["key_metadata"]) for key in keys]


def tensor(item: Place, name: str) -> Tensor:
    """Return one array as a `Tensor`, which reads only the boxes that are asked for."""
    return as_tensor(lambda: _open(item, name))


def fingerprint_on_disk(item: Place, name: str) -> int:
    """Return the fingerprint of an array's stored bytes; memory holds one chunk at a time."""
    return fingerprint_of(_open(item, name))


def _open(item: Place, name: str):
    import tensorstore

    # A spec, not a URL: the name of a folder may contain "#", "?" or "%".
    store = {"driver": "ocdbt", "base": kvstore(item), "path": name}
    return tensorstore.open({"driver": "zarr", "kvstore": store}).result()
