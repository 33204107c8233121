"""Open arrays of tensorstore: read on demand, onto the devices of a mesh, or for a fingerprint."""

from collections import deque
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product

import jax
import numpy as np

from easyanimate_jax.weights.fingerprint import fingerprint_box
from easyanimate_jax.weights.lazy import Tensor

CACHE = 2**28  # bytes of chunks to keep, for devices that read different parts of one
AHEAD = 8  # arrays that are read at once


def as_tensor(open_array: Callable) -> Tensor:
    """Return the array that `open_array()` opens as a `Tensor`, which reads only boxes."""
    array = cache(open_array)
    shape, dtype = array().shape, array().dtype.numpy_dtype
    return Tensor(shape, dtype, lambda box: np.asarray(array()[box].read().result()))


def fingerprint_of(array) -> int:
    """Return the fingerprint of an array's stored bytes; memory holds one chunk at a time."""
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


def load_like(
    open_array: Callable, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Return arrays with the shapes and shardings of `like`, by their names.

    `open_array(name, context)` returns the future of an open array. Each process reads what its
    devices need. Raises ValueError if an array is missing, has another shape, or does not decode.
    """
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE}})
    opened = {name: open_array(name, context) for name in like}
    loaded, ahead = {}, deque()
    for name, leaf in like.items():
        ahead.append((name, _start(opened[name].result(), leaf)))
        if len(ahead) > AHEAD:
            first, finish = ahead.popleft()
            loaded[first] = finish()
    return loaded | {name: finish() for name, finish in ahead}


def _start(array, leaf: jax.ShapeDtypeStruct) -> Callable[[], jax.Array]:
    """Start to read an array; return the function that waits and puts it onto the devices."""
    if array.shape != leaf.shape:
        raise ValueError(f"shape {array.shape} for {leaf.shape}")
    boxes = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    keys = {device: str(box) for device, box in boxes.items()}
    reads = {keys[device]: box for device, box in boxes.items()}
    reads = {key: array[box].read() for key, box in reads.items()}

    def finish() -> jax.Array:
        parts = [jax.device_put(reads[key].result(), device) for device, key in keys.items()]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)

    return finish
