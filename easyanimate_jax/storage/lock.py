"""A lock on a folder: one process writes it at a time, or several that share its work in parts.

It is a kernel lock on a file in the folder, so the kernel releases it when its process ends. The
file names the holder. On a file system without locks, the holder touches the file every few seconds
instead, and a file that was touched in the last 60 seconds is held.

Between hosts, the lock needs a file system that shares kernel locks: NFS with its lock service,
Lustre mounted with `flock`, GPFS. Where locks are local to a host, it protects only one host.

In an object store the lock is an object, which is created if there is none. Its holder renews it,
and one that was not renewed for 60 seconds is taken over.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from io import TextIOWrapper
from pathlib import Path
from types import SimpleNamespace

from easyanimate_jax.storage.errors import AnotherRunError
from easyanimate_jax.storage.stores import Place, Remote, create, read_tagged, replace_if

PATIENCE = 10.0  # seconds to wait for a killed process to end
FRESH, BEAT = 60.0, 5.0  # seconds; only on file systems without locks
RENEW = 15.0  # seconds; a store takes about one write a second to a name
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
        self.file.write(json.dumps(_myself()))
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
        where, holder = str(self.folder), _holder(path)
        if others:
            where = f"{self.folder}, shared in another number of parts ({path.name}),"
        elif self.parts > 1:
            where = f"part {self.part} of {self.parts} of {self.folder}"
        return _in_use(where, holder, self.option)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


class StoreLock:
    """A context manager that locks a folder of a store for this process.

    Raises ValueError if another process holds it, as `FolderLock` does; a holder that was killed
    on another host is known after 60 seconds. `check` tells whether the lock is still held.
    """

    def __init__(self, folder: Remote, *, option: str, wait: float | None = None):
        self.folder, self.option, self.path = folder, option, folder / "lock"
        self.wait = RENEW + PATIENCE if wait is None else wait
        self.mine = _myself() | {"id": uuid.uuid4().hex, "processes": _processes()}
        self.taken_by: dict | None = None
        self.ended = threading.Event()

    def __enter__(self) -> "StoreLock":
        end, first = time.monotonic() + self.wait, self._read()[0]
        self.tag = self._take()
        while self.tag is None:
            body = self._read()[0]
            # A holder that renews the lock lives. One that does not is dead after a minute.
            if time.monotonic() > end and body not in (first, b""):
                raise ValueError(_in_use(str(self.folder), _read_json(body), self.option))
            time.sleep(0.5)
            self.tag = self._take()
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        with contextlib.suppress(OSError):  # else it is free in a minute
            if _read_json(self._read()[0]).get("id") == self.mine["id"]:
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise AnotherRunError if another process has taken the lock over."""
        if self.taken_by is not None:
            raise AnotherRunError(
                f"{self.folder} was taken over by {_who(self.taken_by)}, because this process did "
                f"not renew {self.path} for {FRESH:.0f} s: end one of the two ({self.option})"
            )

    def _take(self) -> dict | None:
        """Return the tag of the lock if this process holds it now; None if another does."""
        if create(self.path, self._body()):
            return self._read()[1]
        body, tag = self._read()
        holder = _read_json(body)
        old = time.time() - holder.get("time", 0.0) > FRESH
        if body and not old and not _is_dead(holder):
            return None
        return replace_if(self.path, self._body(), tag) if body else None

    def _body(self) -> bytes:
        return json.dumps(self.mine | {"time": time.time()}).encode()

    def _read(self) -> tuple[bytes, dict]:
        """Return content and tag of the object; nothing if it is gone."""
        try:
            return read_tagged(self.path)
        except FileNotFoundError:
            return b"", {}

    def _renew(self) -> None:
        while not self.ended.wait(RENEW):
            with contextlib.suppress(OSError):  # the store does not answer: the next time may do
                new = replace_if(self.path, self._body(), self.tag)
                if new is None:
                    self.taken_by = _read_json(self._read()[0])
                    return
                self.tag = new


def _is_dead(holder: dict) -> bool:
    """Return True if the holder was a process of this machine that has ended."""
    here = holder.get("processes") and holder["processes"] == _processes()
    return bool(here) and not os.path.isdir(f"/proc/{holder['pid']}")


def _processes() -> str:
    """Return what names this machine and its numbering of processes; "" where nothing does."""
    try:
        space = os.readlink("/proc/self/ns/pid")
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {space}"
    except OSError:
        return ""


def part_lock(folder: Place, option: str, part: tuple[int, int]):
    """Return the lock of a part of the work in a folder.

    In a store it is none: what two makers of a part write is equal, and is created once.
    """
    if isinstance(folder, Path):
        return FolderLock(folder, option=option, part=part)
    return contextlib.nullcontext(SimpleNamespace(begun=False))


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
        return _read_json(path.read_bytes())
    except OSError:  # gone
        return {}


def _read_json(body: bytes) -> dict:
    try:
        return json.loads(body)
    except ValueError:  # empty, or cut short by a kill
        return {}


def _myself() -> dict:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _who(holder: dict) -> str:
    if not holder:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


def _in_use(where: str, holder: dict, option: str) -> str:
    return (
        f"{where} is in use by {_who(holder)}: wait until it ends, stop it, or name another folder "
        f"({option})"
    )
