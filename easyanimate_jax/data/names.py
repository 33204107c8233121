"""Columns of text, and what follows from the names of clips alone."""

import hashlib
import re
from collections.abc import Iterator

import numpy as np
import pyarrow
import pyarrow.compute

CHUNK = 2**18  # names in memory at a time
SPAN = re.compile(rb"#\d+-\d+$")  # of a clip in a curated film, as `curate` names it


class Names:
    """A column of text; values are decoded when they are asked for."""

    def __init__(self, column: pyarrow.ChunkedArray | pyarrow.Array):
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __getitem__(self, at):
        """Return the text at a number, or the column of those at numbers, a mask or a slice."""
        if isinstance(at, int | np.integer):
            return self.column[int(at)].as_py()
        if isinstance(at, slice):
            at = np.arange(len(self))[at]
        at = np.asarray(at)
        return Names(self.column.take(np.flatnonzero(at) if at.dtype == bool else at))

    def __eq__(self, other) -> np.ndarray:
        found = pyarrow.compute.equal(self.column, pyarrow.array([other])[0])
        return found.to_numpy(zero_copy_only=False)

    def tolist(self) -> list[str]:
        return self.column.to_pylist()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.tolist(), dtype or str)


def file_hashes(clips: Names | np.ndarray) -> np.ndarray:
    """Return a hash of the name of each clip's file, uint64, equal for all spans of a film."""
    found = np.empty(len(clips), np.uint64)
    for first in range(0, len(clips), CHUNK):
        part = clips[first : first + CHUNK].tolist()
        found[first : first + CHUNK] = [name_hash(SPAN.sub(b"", as_bytes(n))) for n in part]
    return found


def name_hash(name: bytes) -> int:
    """Return a hash of a name, of 64 bits."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, person=b"held out").digest(), "big")


def as_bytes(name: str | bytes) -> bytes:
    """Return a name as UTF-8."""
    return name if isinstance(name, bytes) else name.encode()
