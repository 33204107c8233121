"""Arrays in an object store, one zarr array each, for the stores to which orbax cannot write.

A chunk is what one device holds of an array, or an even part of it. The process that holds a chunk
first (of the copies of a replicated one) writes it, and process 0 also writes the metadata of every
array. So no process waits for another, and `load` reads the arrays onto any mesh.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from easyanimate_jax.storage.stores import Remote, kvstore, list_names
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.stored_array import as_tensor, fingerprint_of, load_like

CHUNK = 2**28  # bytes of a chunk, at most


class Held(NamedTuple):
    """The part of an array that this process writes: boxes and their values on the host."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    parts: list[tuple[tuple[slice, ...], np.ndarray]]


def names(item: Remote) -> list[str]:
    """Return the names of the arrays. Raises ValueError if there are none."""
    found = list_names(item)
    if not found:
        raise ValueError(f"{item} holds no arrays")
    return found


def tensor(item: Remote, name: str) -> Tensor:
    """Return one array as a `Tensor`, which reads only the boxes that are asked for."""
    return as_tensor(lambda: _open(item, name).result())


def fingerprint_on_disk(item: Remote, name: str) -> int:
    """Return the fingerprint of an array's stored bytes; memory holds one chunk at a time."""
    return fingerprint_of(_open(item, name).result())


def on_host(named: Mapping[str, jax.Array]) -> dict[str, Held]:
    """Return copies of what this process has to write; later changes do not touch them."""
    for array in named.values():
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                shard.data.copy_to_host_async()
    return {name: _held(array) for name, array in named.items()}


def write(item: Remote, held: Mapping[str, Held], *, metadata: bool) -> None:
    """Write arrays; `metadata` is True in one process. Raises the error of the first that fails."""
    opened = {name: _create(item, name, one, metadata) for name, one in held.items()}
    written = []
    for name, one in held.items():
        array = opened[name].result()
        for box, values in one.parts:
            written.append(array[box].write(values, can_reference_source_data_indefinitely=True))
    for future in written:
        future.result()


def load(item: Remote, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Return arrays with the shapes and shardings of `like`; each process reads its own part.

    Raises ValueError if an array is missing, has another shape, or does not decode.
    """
    return load_like(partial(_open, item), like)


def _held(array: jax.Array) -> Held:
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    # On a CPU an array's values are the device's own memory, which the next step may use again.
    parts = [(shard.index, np.array(shard.data, copy=True)) for shard in shards]
    chunk = _chunk(array.sharding.shard_shape(array.shape), array.dtype.itemsize)
    return Held(array.shape, np.dtype(array.dtype), chunk, parts)


def _chunk(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the shape of a shard, or of the largest even part of it that is small enough."""
    chunk = [max(1, size) for size in shard]
    while int(np.prod(chunk, dtype=np.int64)) * itemsize > CHUNK:
        axis = int(np.argmax(chunk))
        divisors = (n for n in range(2, chunk[axis] + 1) if chunk[axis] % n == 0)
        chunk[axis] //= next(divisors)
    return tuple(chunk)


def _create(item: Remote, name: str, held: Held, metadata: bool):
    """Return the future of an array to write; without `metadata`, another process creates it."""
    import tensorstore

    kind = held.dtype.name if held.dtype.kind == "V" else held.dtype.str  # bfloat16 has no other
    spec = _spec(item, name) | {
        "metadata": {
            "zarr_format": 2,
            "shape": held.shape,
            "chunks": held.chunk,
            "dtype": kind,
            "compressor": None,  # weights do not become smaller
            "fill_value": None,
            "filters": None,
            "order": "C",
        },
        "store_data_equal_to_fill_value": True,
    }
    how = {"create": True} if metadata else {"open": True, "assume_metadata": True}
    return tensorstore.open(spec, **how)


def _open(item: Remote, name: str, context=None):
    """Return the future of an array to read; a chunk that is missing is an error."""
    import tensorstore

    spec = _spec(item, name) | {"fill_missing_data_reads": False}
    return tensorstore.open(spec, read=True, open=True, context=context)


def _spec(item: Remote, name: str) -> dict:
    return {"driver": "zarr", "kvstore": kvstore(item / name)}
