"""Check names that come from data before opening files.

Names come from metadata rows, archive members and file lists. FFmpeg interprets some names as URLs
and scripts, and archives can name files outside themselves. A name must be a path that stays below
its root, and only regular files are opened. A name with a colon, or one that begins with `~`, is
that of a file only if this file exists.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from easyanimate_jax.storage.local import SCHEME, local_path, quoted, shown


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a plain relative path."""
    _check_text(name)
    if "://" in name:
        raise ValueError(f"file name {name!r} is not a relative path; URLs are not read")
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"file name {name!r} leaves the data folder; move the file into it")


def name_fault(name: str) -> str:
    """Return why `name` is not a plain relative path, or ""."""
    try:
        check_name(name)
    except ValueError as error:
        return str(error)
    return ""


def relative_name(root: str | os.PathLike, name: str) -> str:
    """Return the name relative to `root` of an absolute path or `file:` URL below it.

    In a name that no file has, backslashes become slashes, as Windows writes them. Other names are
    returned as they are.
    """
    if "\\" in name and not os.path.lexists(os.path.join(root, name)):
        name = name.replace("\\", "/")
    scheme = SCHEME.match(name)
    if scheme and scheme[1].lower() == "file":
        try:
            name = str(local_path(name))
        except ValueError:  # a file of another machine: `check_name` refuses its name
            return name
    if not name.startswith("/"):
        return name
    real = os.path.realpath(root)
    for base, path in ((os.path.abspath(root), name), (real, name), (real, os.path.realpath(name))):
        if path.startswith(f"{base.rstrip('/')}/"):
            return os.path.relpath(path, base)
    return name


def safe_path(root: str | os.PathLike, name: str, links: str | os.PathLike | None = None) -> Path:
    """Return `root/name`, with all links followed.

    Raises ValueError unless it is inside `root`, or inside `links`, a folder that links may lead
    into.
    """
    _check_text(name)
    name = relative_name(root, name)
    check_name(name)
    path = os.path.join(root, name)
    odd = ":" in name.split("/")[0] or name.startswith("~")
    if odd and not os.path.lexists(path):
        raise ValueError(f"file name {name!r} is no file in {root}; URLs are not read")
    path = Path(os.path.realpath(path))
    allowed = [Path(os.path.realpath(folder)) for folder in (root, links) if folder]
    if not any(folder in path.parents for folder in allowed):
        raise ValueError(
            f"file name {name!r} leaves the data folder {allowed[0]}: it leads to {path}; move the "
            f"file into it, or name a folder that links may lead into (--links)"
        )
    return path


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open the regular file `path` for reading, without ever waiting for a pipe or a device.

    Raises ValueError if it is not a regular file or cannot be opened.
    """
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
