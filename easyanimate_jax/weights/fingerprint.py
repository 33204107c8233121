"""A 32-bit fingerprint of an array's bits, sensitive to values and positions.

The bits of each element are mixed with its position and summed mod 2^32. Addition is associative,
so the fingerprint does not depend on how the array is split (over devices, processes, or boxes read
from a file). Mixing is a bijection, so a change of one element always changes the fingerprint; a
change of several elements goes undetected with probability 2^-32. It detects accidents, not
forgery. Positions repeat after 2^32 elements.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped, UInt32

GOLDEN = np.uint32(0x9E3779B9)  # 2^32 / the golden ratio, odd: spreads neighbouring positions
FACTORS = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # the finalizer of MurmurHash3
ELEMENTS = 2**18  # mixed at a time on the host: they fit in the processor's cache


@jax.jit
def fingerprint(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Return the fingerprint of an array on any mesh, a uint32 scalar.

    XLA compiles it once per shape and sharding, not once per array.
    """
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        along = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position += along * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = lax.bitcast_convert_type(bits, _word(x.dtype)).astype(jnp.uint32)
    return jnp.sum(_mix(bits ^ _mix(position * GOLDEN)), dtype=jnp.uint32)


def fingerprint_box(box: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """Return the share of a box in the fingerprint of an array of `shape`.

    The box begins at `start`. Sum the shares of all boxes mod 2^32 to get the fingerprint.
    """
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    words = np.ascontiguousarray(box).view(_word(box.dtype))  # a scalar becomes one row
    if not shape:
        start, strides = (0,), [1]
    rows = max(1, ELEMENTS * len(words) // max(1, words.size))
    total = 0
    for first in range(0, len(words), rows):
        part = words[first : first + rows]
        position = np.zeros(part.shape, np.uint32)
        for axis, (size, stride) in enumerate(zip(part.shape, strides, strict=True)):
            begin = start[axis] + (first if axis == 0 else 0)
            along = (np.arange(begin, begin + size, dtype=np.uint64) * stride).astype(np.uint32)
            position += along.reshape([-1 if a == axis else 1 for a in range(part.ndim)])
        mixed = _mix(part.astype(np.uint32) ^ _mix(position * GOLDEN))
        total += int(mixed.sum(dtype=np.uint64))
    return total % 2**32


def _mix(h):
    h = h ^ (h >> 16)
    h = h * FACTORS[0]
    h = h ^ (h >> 13)
    h = h * FACTORS[1]
    return h ^ (h >> 16)


def _word(dtype) -> np.dtype:
    """Return the unsigned integer dtype of the same size. Raises ValueError above 4 bytes."""
    size = np.dtype(dtype).itemsize
    if size > 4:
        raise ValueError(f"{dtype} has no fingerprint; use a dtype of 1, 2 or 4 bytes a value")
    return np.dtype(f"u{size}")
