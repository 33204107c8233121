"""Check names that come from data before opening files.

Names come from metadata rows, archive members and file lists. FFmpeg interprets some names as URLs
and scripts, and archives can name files outside themselves. A name must be a relative path that
stays below its root, and only regular files are opened.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a plain relative path."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"file name {name!r} is not Unicode; rename the file") from error
    if not name or "\0" in name or ":" in name.split("/")[0]:
        raise ValueError(f"file name {name!r} is not a relative path; URLs are not read")
    if name.startswith(("/", "\\", "~")) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"file name {name!r} leaves the data folder; move the file into it")


def name_fault(name: str) -> str:
    """Return why `name` is not a plain relative path, or ""."""
    try:
        check_name(name)
    except ValueError as error:
        return str(error)
    return ""


def safe_path(root: str | os.PathLike, name: str) -> Path:
    """Return `root/name`. Raises ValueError unless it is inside `root` after links are followed."""
    check_name(name)
    path, root = Path(os.path.realpath(os.path.join(root, name))), Path(os.path.realpath(root))
    if root not in path.parents:
        raise ValueError(f"file name {name!r} leaves the data folder {root}; move the file into it")
    return path


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open the regular file `path` for reading, without ever waiting for a pipe or a device.

    Raises ValueError if it is not a regular file or cannot be opened.
    """
    try:
        # Links are resolved first; a link that replaces the file afterwards is refused.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(os.path.realpath(path), flags)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")
