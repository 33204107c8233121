"""Read an object of a store by ranges, as a seekable file.

A film is read in a few places: its head, its index, and the frames that are wanted. So a read asks
for little at first, and for twice as much each time that it goes on where the last one ended. What
was read is kept, because decoders come back to the head and to the index.
"""

import errno
import io
from collections.abc import Callable
from typing import NamedTuple

FIRST, MOST = 2**18, 2**23  # bytes of a request: the first of a place, and of a long read
LARGEST = 2**26  # bytes of a request; clients give up an answer after 30 s
KEPT = 2**25  # bytes in memory of an open object
BUFFER = 2**16  # bytes that Python's own buffer takes out of them at a time


class Part(NamedTuple):
    """A range of an object, and the properties that every answer of a store states."""

    content: bytes
    size: int  # bytes of the whole object
    tag: str  # the store's ETag


class Ranges(io.RawIOBase):
    """An object as a file. `fetch(begin, end)` is one request; it may return less at the end.

    The first request is made at once, and raises FileNotFoundError. Reading raises OSError if the
    object is overwritten meanwhile. `error` is the last error of `fetch`: who reads through a
    decoder asks for it, because decoders turn an error of their file into one of their own.
    """

    mode = "rb"

    def __init__(self, name: str, fetch: Callable[[int, int], Part]):
        self.name, self.fetch, self.error = name, fetch, None
        self.at, self.ahead = 0, FIRST
        first = fetch(0, FIRST)
        self.size, self.tag = first.size, first.tag
        self.parts = [(0, memoryview(first.content))]

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, and return it."""
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer) -> int:
        """Read what one request gives, at most; return the number of bytes."""
        part = self._here(len(buffer))[: len(buffer)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)

    def readall(self) -> bytes:
        """Return the rest of the object, with one request."""
        pieces = []
        while piece := self._here(self.size - self.at):
            pieces.append(bytes(piece))
            self.at += len(piece)
        return b"".join(pieces)

    def _here(self, wanted: int) -> memoryview:
        """Return the bytes from the position on that are in memory, after a request if none are."""
        for begin, part in reversed(self.parts):
            if begin <= self.at < begin + len(part):
                return part[self.at - begin :]
        if self.at >= self.size:
            return memoryview(b"")
        goes_on = any(begin + len(part) == self.at for begin, part in self.parts)
        self.ahead = min(2 * self.ahead, MOST) if goes_on else FIRST
        end = min(self.at + max(min(wanted, LARGEST), self.ahead), self.size)
        try:
            read = self.fetch(self.at, end)
            if (read.size, read.tag) != (self.size, self.tag):
                told = "the object was overwritten while it was read; run the same command again"
                raise OSError(errno.ESTALE, told, self.name)
        except OSError as error:
            self.error = error
            raise
        self.parts.append((self.at, memoryview(read.content)))
        while len(self.parts) > 1 and sum(len(part) for _, part in self.parts) > KEPT:
            del self.parts[0]
        return self.parts[-1][1]
