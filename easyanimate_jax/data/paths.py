"""Check names that come from data before opening files.

Names come from metadata rows, archive members and file lists. FFmpeg interprets some names as URLs
and scripts, and archives can name files outside themselves. A name must be a path that stays below
its root, and only regular files are opened. A name with a colon, or one that begins with `~`, is
that of a file only if this file exists.

A root may lie in a store. Then a name is a key below that of the root. A store has no links.
"""

import itertools
import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from easyanimate_jax.storage.local import SCHEME, quoted, shown
from easyanimate_jax.storage.ranges import LARGEST
from easyanimate_jax.storage.stores import Place, Remote, place, read_ranges


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a plain relative path."""
    _check_text(name)
    if "://" in name:
        raise ValueError(f"file name {name!r} is not a relative path below its folder; correct it")
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"file name {name!r} leaves the data folder; move the file into it")


def name_fault(name: str) -> str:
    """Return why `name` is not a plain relative path, or ""."""
    try:
        check_name(name)
    except ValueError as error:
        return str(error)
    return ""


def relative_name(root: Place, name: str) -> str:
    """Return the name relative to `root` of an absolute path or URL below it.

    In a name that no file has, backslashes become slashes, as Windows writes them. Other names are
    returned as they are.
    """
    if "\\" in name and not is_there(root, name):
        name = name.replace("\\", "/")
    try:
        named = place(name) if SCHEME.match(name) else Path(name)
    except ValueError:  # of another scheme, or of another machine: `check_name` refuses it
        return name
    if isinstance(root, Remote):
        below = isinstance(named, Remote) and f"{named}".startswith(f"{root}".rstrip("/") + "/")
        return named.key[len(root.key) :].lstrip("/") if below else name
    if isinstance(named, Remote):
        return name
    if SCHEME.match(name):
        name = str(named)
    if not name.startswith("/"):
        return name
    real = os.path.realpath(root)
    for base, path in ((os.path.abspath(root), name), (real, name), (real, os.path.realpath(name))):
        if path.startswith(f"{base.rstrip('/')}/"):
            return os.path.relpath(path, base)
    return name


def is_there(root: Place, name: str) -> bool:
    """Return True if a file, or a link, has this name below `root`."""
    if isinstance(root, Remote):
        return (root / name).is_file()
    return os.path.lexists(os.path.join(root, name))


def safe_path(root: Place, name: str, links: str | os.PathLike | None = None) -> Place:
    """Return `root/name`, with all links followed.

    Raises ValueError unless it is inside `root`, or inside `links`, a folder that links may lead
    into. In a store nothing is asked for: the object may be missing.
    """
    _check_text(name)
    name = relative_name(root, name)
    check_name(name)
    if isinstance(root, Remote):
        return root / name
    path = os.path.join(root, name)
    odd = ":" in name.split("/")[0] or name.startswith("~")
    if odd and not os.path.lexists(path):
        raise ValueError(f"file name {name!r} is no file in {root}; correct it")
    path = Path(os.path.realpath(path))
    allowed = [Path(os.path.realpath(folder)) for folder in (root, links) if folder]
    if not any(folder in path.parents for folder in allowed):
        raise ValueError(
            f"file name {name!r} leaves the data folder {allowed[0]}: it leads to {path}; move the "
            f"file into it, or name a folder that links may lead into (--links)"
        )
    return path


def beside(folder: Place, text: str) -> Place:
    """Return the place that `text` names: a URL, an absolute path, or one relative to `folder`.

    Raises ValueError as `place` does, and for a relative path that leaves its bucket.
    """
    named = place(text)
    if isinstance(named, Remote) or isinstance(folder, Path):
        return named if isinstance(named, Remote) else folder / named
    if named.is_absolute():
        return named
    inside = posixpath.normpath(posixpath.join(folder.key, named.as_posix()))
    if inside.split("/")[0] == "..":
        raise ValueError(f"{quoted(text)} leaves the bucket of {folder}; give its whole URL")
    return Remote(folder.scheme, folder.bucket, "") / inside


@contextmanager
def open_regular(path: Place) -> Iterator[BinaryIO]:
    """Yield a regular file or an object, open for reading; close it at the end.

    Raises ValueError if it is missing, cannot be opened, or is not a regular file. Raises OSError
    if its store fails, now or in a read, whatever a decoder made of that read.
    """
    if isinstance(path, Path):
        with _open_local(path) as file:
            yield file
        return
    try:
        file = path.open()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {error.strerror}; correct its name, or upload it") from error
    with file:
        try:
            yield file
        finally:
            if file.raw.error:
                raise file.raw.error


def read_part(path: Place, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file. Raises ValueError if it has fewer, and as `open_regular`."""
    if isinstance(path, Remote):
        try:
            edges = [*range(offset, offset + size, LARGEST), offset + size]
            return b"".join(read_ranges(path, [part])[0] for part in itertools.pairwise(edges))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
    with _open_local(path) as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise ValueError(f"{path} ends before byte {offset + size:,}; replace it")
    return content


def _open_local(path: Path) -> BinaryIO:
    """Open a regular file, without ever waiting for a pipe or a device."""
    try:
        # Links are resolved first; a link that replaces the file afterwards is refused.
        # Windows has no links and pipes of this kind, and reads text unless told otherwise.
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
            flags |= getattr(os, name, 0)
        handle = os.open(os.path.realpath(path), flags)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")


def _check_text(name: str) -> None:
    if not name or "\0" in name:
        raise ValueError(f"file name {name!r} is not a relative path; correct it")
    if shown(name) != name:
        raise ValueError(f"file name {quoted(name)} is not UTF-8; rename the file")
