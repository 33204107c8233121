"""The one guard of names that come from data: metadata rows, archive members, file lists.

FFmpeg takes names for URLs and scripts, archives name files outside themselves: a name is a
relative path below its root or it is refused, and what is opened is a regular file.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is a plain relative path."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"file name {name!r} is not Unicode; rename the file") from error
    if not name or "\0" in name or ":" in name.split("/")[0]:
        raise ValueError(f"file name {name!r} is not a relative path; URLs are not read")
    if name.startswith(("/", "\\", "~")) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"file name {name!r} leaves the data folder; move the file into it")


def safe_path(root: str | os.PathLike, name: str) -> Path:
    """`root/name`, refused unless it stays inside `root` after links are followed."""
    check_name(name)
    path, root = Path(os.path.realpath(os.path.join(root, name))), Path(os.path.realpath(root))
    if root not in path.parents:
        raise ValueError(f"file name {name!r} leaves the data folder {root}; move the file into it")
    return path


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """The regular file `path` for reading; never waits for a pipe or a device."""
    try:
        # Links are resolved first: a link put there since then is refused.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(os.path.realpath(path), flags)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")
