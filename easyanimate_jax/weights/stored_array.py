"""An open array of tensorstore, as a tensor that is read on demand, and its fingerprint."""

from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np

from easyanimate_jax.weights.fingerprint import fingerprint_box
from easyanimate_jax.weights.lazy import Tensor


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
