"""Write a file completely or not at all, also if several processes write the same one."""

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

LEFT = re.compile(r".+\..+-(\d+)\.new")  # NAME.THREAD.HOST-PID.new
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK}
OLD = 86400.0  # seconds after which a temporary file of another host was left by a killed process


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write `path` by `write(temporary path)`, then rename it.

    A failed `write` leaves nothing. Its OSError names `path`, unless it names what was read.
    """
    new = _temporary(path)
    try:
        write(new)
        os.replace(new, path)
    except OSError as error:
        if error.filename in (None, str(new)):
            error.filename = str(path)
        raise
    finally:
        new.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write `path` as UTF-8 text, completely or not at all."""
    replace(path, lambda new: new.write_text(text, "utf-8"))


def create(path: Path, write: Callable[[BinaryIO], object]) -> bool:
    """Write a file by `write(open file)` if there is none of its name; return whether there was.

    The file and its name are on the disk when this returns.
    """
    new = _temporary(path)
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        made = _link(new, path)
        _sync(path.parent)
        return made
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        new.unlink(missing_ok=True)


def _link(new: Path, path: Path) -> bool:
    """Give a file its name if no other file has it; return whether none had."""
    try:
        os.link(new, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():  # a file system without links: two makers at one moment may both win
            return False
        os.replace(new, path)
    return True


def _temporary(path: Path) -> Path:
    """Return the name under which this thread writes a file."""
    mine = f"{threading.get_ident():x}.{socket.gethostname()}-{os.getpid()}"
    return path.with_name(f"{path.name}.{mine}.new")


def _sync(folder: Path) -> None:
    """Write a folder's names to the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_left(folder: Path) -> None:
    """Delete temporary files of killed processes in a folder; living ones keep theirs."""
    for path in folder.iterdir():
        if LEFT.fullmatch(path.name):
            _remove(path)


def _remove(left: Path) -> None:
    pid = LEFT.fullmatch(left.name)[1]
    try:
        if left.name.endswith(f".{socket.gethostname()}-{pid}.new") and os.path.isdir("/proc"):
            dead = _is_dead(pid)
        else:
            dead = time.time() - left.stat().st_mtime > OLD
        if dead:
            left.unlink()
    except FileNotFoundError:  # its process has just finished
        pass


def _is_dead(pid: str) -> bool:
    """Return True if a process of this host has ended, also if its parent does not know it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True
