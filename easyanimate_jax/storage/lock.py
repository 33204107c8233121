"""A lock on a folder: one process writes it at a time, or several that share its work in parts.

It is a kernel lock on a file in the folder, so the kernel releases it when its process ends. The
file names the holder. On a file system without locks, the holder touches the file every few seconds
instead, and a file that was touched in the last 60 seconds is held.

Between hosts, the lock needs a file system that shares kernel locks: NFS with its lock service,
Lustre mounted with `flock`, GPFS. Where locks are local to a host, it protects only one host.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import threading
import time
from io import TextIOWrapper
from pathlib import Path

PATIENCE = 10.0  # seconds to wait for a killed process to end
FRESH, BEAT = 60.0, 5.0  # seconds; only on file systems without locks
NAMES = re.compile(r"lock(?:-(\d+)-of-(\d+))?")


class FolderLock:
    """A context manager that locks a folder, or part (k, n) of its work, for this process.

    Processes with different parts of the same n work at the same time. Raises ValueError if another
    process still holds the folder or the part after `wait` seconds; the message names its host,
    process id and start time, and `option`, which chooses the folder. A new folder gets `mode`.
    After an error, a folder that did not exist before is removed, unless `begun` was set.
    """

    def __init__(
        self,
        folder: Path,
        *,
        option: str,
        part: tuple[int, int] = (0, 1),
        mode: int = 0o777,
        wait: float | None = None,
    ):
        self.folder, self.option, self.mode = folder, option, mode
        self.wait = PATIENCE if wait is None else wait
        self.part, self.parts = part
        several = f"-{self.part}-of-{self.parts}" if self.parts > 1 else ""
        self.path = folder / f"lock{several}"
        self.begun = folder.exists()
        self.ended = threading.Event()

    def __enter__(self) -> "FolderLock":
        self.folder.mkdir(parents=True, exist_ok=True, mode=self.mode)
        end = time.monotonic() + self.wait
        while (taken := self._take()) is None:
            if time.monotonic() > end:
                raise ValueError(self._refusal())
            time.sleep(0.2)
        self.file, kernel = taken
        self.file.truncate(0)
        self.file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()} | _now()))
        self.file.flush()
        if not kernel:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind, *_) -> None:
        self.ended.set()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.file.close()
        if kind and not self.begun and self.parts == 1:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif kind and not self.begun:
            with contextlib.suppress(OSError):  # other parts have begun: it is not empty
                self.folder.rmdir()

    def look(self) -> None:
        """Raise ValueError if another process holds the folder or the part."""
        if self.folder.is_dir():
            with self:
                pass

    def _take(self) -> tuple[TextIOWrapper, bool] | None:
        """Return the locked file, and whether the kernel locked it; None if others hold it."""
        taken = _lock(self.path)
        if taken is not None and self._others():
            self.path.unlink()
            taken[0].close()
            return None
        return taken

    def _others(self) -> list[Path]:
        """Return the held locks that exclude this one: those of another number of parts."""
        found = []
        for name in os.listdir(self.folder):
            match = NAMES.fullmatch(name)
            if match and int(match[2] or 1) != self.parts:
                with contextlib.suppress(FileNotFoundError):  # its holder has just ended
                    other = _lock(self.folder / name, "r+")
                    if other is None:
                        found.append(self.folder / name)
                    else:
                        other[0].close()
        return found

    def _refusal(self) -> str:
        others = self._others()
        path = others[0] if others else self.path
        holder, who = _holder(path), "another process"
        if holder:
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        where = str(self.folder)
        if others:
            where = f"{self.folder}, shared in another number of parts ({path.name}),"
        elif self.parts > 1:
            where = f"part {self.part} of {self.parts} of {self.folder}"
        return (
            f"{where} is in use by {who}: wait until it ends, stop it, or name another folder "
            f"({self.option})"
        )

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _lock(path: Path, mode: str = "a+") -> tuple[TextIOWrapper, bool] | None:
    """Return the open, locked file and whether the kernel locked it; None if another holds it."""
    file = open(path, mode)  # noqa: SIM115 the caller closes it
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        held, kernel = not current, True
    except (BlockingIOError, FileNotFoundError):  # held, or removed by its last holder
        held, kernel = True, True
    except (ImportError, OSError):  # Windows, or a file system without locks
        held, kernel = _is_fresh(path), False
    if held:
        file.close()
        return None
    return file, kernel


def _is_fresh(path: Path) -> bool:
    """Return whether another process named in the file has touched it in the last `FRESH` s."""
    holder = _holder(path)
    if not holder or (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid()):
        return False
    return time.time() - path.stat().st_mtime < FRESH


def _holder(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # gone, empty, or cut short by a kill
        return {}


def _now() -> dict:
    return {"since": time.strftime("%Y-%m-%d %H:%M:%S")}
