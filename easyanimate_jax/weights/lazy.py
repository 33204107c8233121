"""An array that is not in memory yet: its shape, its dtype, and a way to read any box of it.

A conversion stacks, permutes and renames such arrays. Bytes are read only when a box of the result
is read, so a model of any size is converted one layer at a time.
"""

from collections.abc import Callable, Sequence

import cv2
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

Box = tuple[slice, ...]  # a start and a stop for every dimension


class Tensor:
    """An array that is read on demand, a box at a time.

    `read_box` receives a complete box and returns an array of its shape, which may be a view.
    """

    def __init__(
        self, shape: Sequence[int], dtype: DTypeLike, read_box: Callable[[Box], np.ndarray]
    ):
        self.shape, self.dtype, self._read_box = tuple(shape), np.dtype(dtype), read_box

    @classmethod
    def of(cls, array) -> "Tensor":
        """Wrap an array of numpy or JAX; only the parts that are read are copied to the host."""
        whole = tuple(slice(0, size) for size in array.shape)
        read = lambda box: np.asarray(array if box == whole else array[box])  # noqa: E731
        return cls(array.shape, array.dtype, read)

    def read(self, index: Sequence[slice] = ()) -> np.ndarray:
        """Return all values, or the box given by slices of the leading dimensions in `index`."""
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        bounds = (s.indices(size) for s, size in zip(index, self.shape, strict=True))
        return self._read_box(tuple(slice(start, stop) for start, stop, _ in bounds))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def astype(self, dtype: DTypeLike) -> "Tensor":
        """Round floating-point values to `dtype`; a tensor of integers is returned unchanged."""
        if self.dtype == dtype or not is_float(self.dtype):
            return self
        return Tensor(self.shape, dtype, lambda box: _cast(self._read_box(box), dtype))

    def transpose(self, order: Sequence[int]) -> "Tensor":
        """Permute the dimensions as `numpy.transpose` does."""

        def read(box):
            theirs = [slice(None)] * len(order)
            for axis, part in zip(order, box, strict=True):
                theirs[axis] = part
            return self._read_box(tuple(theirs)).transpose(order)

        return Tensor([self.shape[axis] for axis in order], self.dtype, read)

    def reshape(self, shape: Sequence[int]) -> "Tensor":
        """Change the shape as `numpy.reshape` does. Every read loads the whole tensor."""
        return Tensor(shape, self.dtype, lambda box: self.read().reshape(shape)[box])

    def layer(self, index: int) -> "Tensor":
        """Return one entry of the leading dimension."""
        return Tensor(
            self.shape[1:],
            self.dtype,
            lambda box: self._read_box((slice(index, index + 1), *box))[0, ...],
        )

    def resize_rows(self, rows: int) -> "Tensor":
        """Return the first `rows` rows, padded with zeros if there are fewer."""

        def read(box):
            start, stop = box[0].start, box[0].stop
            there = slice(min(start, self.shape[0]), min(stop, self.shape[0]))
            known = self._read_box((there, *box[1:]))
            zeros = np.zeros((stop - start - len(known), *known.shape[1:]), self.dtype)
            return np.concatenate([known, zeros])

        return Tensor((rows, *self.shape[1:]), self.dtype, read)


def stack(layers: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one shape and dtype along a new leading dimension; they are read in turn."""
    first = layers[0]

    def read(box):
        wanted = layers[box[0]]
        if len(wanted) == 1:
            return wanted[0].read(box[1:])[None]
        whole = np.empty((len(wanted), *(s.stop - s.start for s in box[1:])), first.dtype)
        for i, layer in enumerate(wanted):
            whole[i, ...] = dense(layer.read(box[1:]))
        return whole

    return Tensor((len(layers), *first.shape), first.dtype, read)


BITS = {1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.float64}  # bytes -> a dtype of OpenCV


def dense(array: np.ndarray) -> np.ndarray:
    """Return the array in C order; it is copied only if it is not contiguous.

    OpenCV transposes a matrix in blocks that fit in the cache, many times as fast as numpy.
    """
    if array.flags.c_contiguous:
        return array
    bits = array.view(BITS[array.itemsize])
    columns = bits.strides == (bits.itemsize, bits.strides[-1])
    moved = cv2.transpose(bits.T) if columns else np.ascontiguousarray(bits)
    return moved.view(array.dtype)


def is_float(dtype: np.dtype) -> bool:
    """Return True for numpy's floating-point dtypes and the short ones that JAX adds."""
    return dtype.kind == "f" or dtype in SHORT_FLOATS


SHORT_FLOATS = [
    np.dtype(d) for d in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
]


def all_finite(array: np.ndarray) -> bool:
    """Return True if the array has no NaN and no infinity.

    numpy tests bfloat16 slowly, so this function tests its bits.
    """
    if not is_float(array.dtype):
        return True
    if array.dtype != ml_dtypes.bfloat16:
        return bool(np.isfinite(array).all())
    bits = dense(array).reshape(-1)
    step = 2**19  # values; they fit in the cache
    return all(_finite_bfloat16(bits[i : i + step]) for i in range(0, bits.size, step))


def _finite_bfloat16(values: np.ndarray) -> bool:
    """Return True if no exponent is all ones.

    Read as integers, such positive numbers are the largest signed values, and such negative numbers
    are the largest unsigned values.
    """
    return bool(values.view(np.int16).max() < 0x7F80 and values.view(np.uint16).max() < 0xFF80)


def _cast(array: np.ndarray, dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # `files.checked` reports the infinities by name
        return array.astype(dtype)
