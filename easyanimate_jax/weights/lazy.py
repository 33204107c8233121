"""An array that is not there yet: shape, dtype, and a way to read any box of it.

Weights are converted by stacking, permuting and renaming such arrays; bytes move only when a box
of the result is read, so a model of any size goes from one layout to another a layer at a time.
"""

from collections.abc import Callable, Sequence

import cv2
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

Box = tuple[slice, ...]  # a start and a stop for every dimension


class Tensor:
    """`read_box` gets a complete box and returns an array of its shape; it may be a view."""

    def __init__(
        self, shape: Sequence[int], dtype: DTypeLike, read_box: Callable[[Box], np.ndarray]
    ):
        self.shape, self.dtype, self._read_box = tuple(shape), np.dtype(dtype), read_box

    @classmethod
    def of(cls, array) -> "Tensor":
        """An array of numpy or JAX; of the latter only what is read comes to the host."""
        whole = tuple(slice(0, size) for size in array.shape)
        read = lambda box: np.asarray(array if box == whole else array[box])  # noqa: E731
        return cls(array.shape, array.dtype, read)

    def read(self, index: Sequence[slice] = ()) -> np.ndarray:
        """The values, or the box that `index` names by slices of its leading dimensions."""
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        bounds = (s.indices(size) for s, size in zip(index, self.shape, strict=True))
        return self._read_box(tuple(slice(start, stop) for start, stop, _ in bounds))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def astype(self, dtype: DTypeLike) -> "Tensor":
        """With each value rounded to `dtype`; whole numbers stay what they are."""
        if self.dtype == dtype or not is_float(self.dtype):
            return self
        return Tensor(self.shape, dtype, lambda box: _cast(self._read_box(box), dtype))

    def transpose(self, order: Sequence[int]) -> "Tensor":
        """numpy's transpose."""

        def read(box):
            theirs = [slice(None)] * len(order)
            for axis, part in zip(order, box, strict=True):
                theirs[axis] = part
            return self._read_box(tuple(theirs)).transpose(order)

        return Tensor([self.shape[axis] for axis in order], self.dtype, read)

    def reshape(self, shape: Sequence[int]) -> "Tensor":
        """numpy's reshape. Reads all of it at once, so it is meant for what is small."""
        return Tensor(shape, self.dtype, lambda box: self.read().reshape(shape)[box])

    def layer(self, index: int) -> "Tensor":
        """One of the leading dimension."""
        return Tensor(
            self.shape[1:],
            self.dtype,
            lambda box: self._read_box((slice(index, index + 1), *box))[0, ...],
        )

    def resize_rows(self, rows: int) -> "Tensor":
        """The first `rows` rows; where there are fewer, zeros follow."""

        def read(box):
            start, stop = box[0].start, box[0].stop
            there = slice(min(start, self.shape[0]), min(stop, self.shape[0]))
            known = self._read_box((there, *box[1:]))
            zeros = np.zeros((stop - start - len(known), *known.shape[1:]), self.dtype)
            return np.concatenate([known, zeros])

        return Tensor((rows, *self.shape[1:]), self.dtype, read)


def stack(layers: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape and dtype along a new leading dimension; read one after the other."""
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


BITS = {1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.float64}  # by bytes, as OpenCV knows them


def dense(array: np.ndarray) -> np.ndarray:
    """The array in C order, copied only where it is not.

    OpenCV transposes a matrix by blocks that stay in the cache, many times as fast as numpy.
    """
    if array.flags.c_contiguous:
        return array
    bits = array.view(BITS[array.itemsize])
    columns = bits.strides == (bits.itemsize, bits.strides[-1])
    moved = cv2.transpose(bits.T) if columns else np.ascontiguousarray(bits)
    return moved.view(array.dtype)


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype is one of numpy's floats or of the short ones that JAX adds."""
    return dtype.kind == "f" or dtype in SHORT_FLOATS


SHORT_FLOATS = [
    np.dtype(d) for d in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
]


def all_finite(array: np.ndarray) -> bool:
    """No NaN and no infinity; looks at the bits of bfloat16, which numpy tests slowly."""
    if not is_float(array.dtype):
        return True
    if array.dtype != ml_dtypes.bfloat16:
        return bool(np.isfinite(array).all())
    bits = dense(array).reshape(-1)
    step = 2**19  # stays in the cache
    return all(_finite_bfloat16(bits[i : i + step]) for i in range(0, bits.size, step))


def _finite_bfloat16(values: np.ndarray) -> bool:
    """Whether no exponent is all ones: such numbers, taken as integers, are the largest signed ones
    where they are positive and the largest unsigned ones where they are negative."""
    return bool(values.view(np.int16).max() < 0x7F80 and values.view(np.uint16).max() < 0xFF80)


def _cast(array: np.ndarray, dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is reported by name
        return array.astype(dtype)
