"""The key of content: whatever is kept is found by its bytes and settings, not by a name or a date.

`key` is the identity of everything that `prepare` and `curate` keep. `Contents` hashes files for
it. An object of a store is not read for it: it counts by its ETag, which changes with its content.
"""

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from easyanimate_jax.data.media import Cell, File, Member
from easyanimate_jax.data.paths import open_regular
from easyanimate_jax.storage.errors import raise_if_of_the_system
from easyanimate_jax.storage.local import cache_folder
from easyanimate_jax.storage.stores import Place, Remote

PIECE = 2**22  # bytes read at a time
MD5 = re.compile(r"[0-9a-f]{32}(-\d+)?")  # with the number of parts of an upload


def key(*parts) -> str:
    """Return a hash of JSON values, 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Contents:
    """Hashes of files, which the JSON-lines file `path` keeps for processes that come later.

    A file is read again if its size, its times or its inode differ from those in `path`. So a file
    is read once, and a replaced one is noticed whatever its name, size and date. An object of a
    store is asked for once in the life of a `Contents`, if no listing told its ETag.
    """

    def __init__(self, path: Path):
        self.path, self.known, self.position, self.stamps = path, {}, 0, {}
        self.lock = threading.Lock()

    def __call__(self, file: File) -> str:
        """Return a hash of the file's bytes, or of the reason why it cannot be read.

        Raises OSError if its disk or its store does not answer.
        """
        try:
            if isinstance(file, Place):
                return self._hash(file, [0, None], _pieces)
            if isinstance(file, Member):
                place = [file.offset, file.size]
                return self._hash(file.archive, place, lambda opened: _pieces(opened, *place))
            if isinstance(file, Cell):
                place = [file.leaf, file.group, file.row]
                return self._hash(file.table, place, lambda opened: [file.read()])
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()
        except (OSError, ValueError) as error:
            raise_if_of_the_system(error)
            return f"unreadable: {error}"

    def _hash(self, path: Place, place: list, read: Callable) -> str:
        """Return the hash of what `read(opened file)` yields: the bytes at a place of a file."""
        if isinstance(path, Remote):
            return key("store", self._stamp(path), place)
        with open_regular(path) as file:
            stat = _stat(file)
            name = json.dumps([os.path.abspath(path), *place])
            with self.lock:
                if self.known.get(name, [None])[0] != stat:
                    self._read()  # lines that other processes wrote meanwhile
                known = self.known.get(name)
            if known and known[0] == stat:
                return known[1]
            digest = hashlib.blake2b(digest_size=16)
            for piece in read(file):
                digest.update(piece)
            if _stat(file) == stat:  # else it is being written
                self._add(name, stat, digest.hexdigest())
        return digest.hexdigest()

    def _stamp(self, remote: Remote) -> list:
        """Return what tells the contents of objects apart.

        An ETag that is an MD5 of the bytes, or of those of the parts of an upload, is equal for
        copies. Another one may be a time, so it says nothing about other objects.
        """
        if remote not in self.stamps:
            self.stamps[remote] = remote.stamp()
        stamp = self.stamps[remote]
        if stamp is None:
            raise ValueError(f"there is no {remote}")
        return [*stamp] if MD5.fullmatch(stamp.tag) else [*stamp, str(remote)]

    def _read(self) -> None:
        """Read the lines that the file got since the last call."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):  # another process is writing it
                    break
                self.position += len(line)
                try:
                    name, stat, digest = json.loads(line)
                    self.known[name] = stat, digest
                except (ValueError, TypeError):  # lines of two hosts, mixed
                    continue

    def _add(self, name: str, stat: list[int], digest: str) -> None:
        line = json.dumps([name, stat, digest]).encode() + b"\n"
        with self.lock, self.path.open("ab", buffering=0) as file:
            self.known[name] = stat, digest
            file.write(line)


def kept_contents(output: Place) -> Contents:
    """Return the `Contents` that an output folder keeps; for one in a store, this host keeps it."""
    folder = output if isinstance(output, Path) else cache_folder() or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    return Contents(folder / "contents.jsonl")


def _pieces(file: BinaryIO, offset: int = 0, size: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of an open file from `offset` on: `size` of them, or all."""
    file.seek(offset)
    left = os.fstat(file.fileno()).st_size - offset if size is None else size
    while left > 0 and (piece := file.read(min(PIECE, left))):
        yield piece
        left -= len(piece)


def _stat(file) -> list[int]:
    found = os.fstat(file.fileno())
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
