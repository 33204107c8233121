"""A lock on a run folder: only one process, or one group of processes, uses it at a time.

It is a kernel lock on the file `lock`, so the kernel releases it when its process ends. The file
names the holder. On a file system without locks the heartbeat of the holder is used instead: if
another process wrote a heartbeat in the last 60 seconds, the folder is in use.
"""

import contextlib
import json
import os
import shutil
import socket
import time
from pathlib import Path

PATIENCE = 10.0  # seconds to wait for a killed process to end
FRESH = 60.0  # seconds: a process with a younger heartbeat is alive


class RunLock:
    """A context manager that locks a run folder for this process.

    Raises ValueError if another process still holds the lock after `wait` seconds; the message
    names its host, process id and start time. After an error, a folder that did not exist before is
    removed, unless `begun` was set.
    """

    def __init__(self, folder: Path, *, wait: float = PATIENCE):
        self.folder, self.path, self.wait = folder, folder / "lock", wait
        self.begun = folder.exists()

    def __enter__(self) -> "RunLock":
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.file = self.path.open("a+")
        end = time.monotonic() + self.wait
        while not self._locked():
            if time.monotonic() > end:
                refusal = self._refusal()
                self.file.close()
                raise ValueError(refusal)
            time.sleep(0.2)
        self.file.truncate(0)
        self.file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()} | _now()))
        self.file.flush()
        return self

    def __exit__(self, kind, *_) -> None:
        self.file.truncate(0)
        self.file.close()
        if kind and not self.begun:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _locked(self) -> bool:
        try:
            import fcntl
        except ImportError:  # Windows
            return not self._beating()
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return not self._beating()
        return True

    def _beating(self) -> bool:
        """Return whether the holder named in the file has a fresh heartbeat."""
        holder = self._holder()
        if not holder or (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid()):
            return False
        beats = (self.folder / "heartbeats").glob("*.json")
        with contextlib.suppress(OSError):
            return any(time.time() - beat.stat().st_mtime < FRESH for beat in beats)
        return False

    def _holder(self) -> dict:
        self.file.seek(0)
        try:
            return json.loads(self.file.read())
        except ValueError:  # empty, or cut short by a kill
            return {}

    def _refusal(self) -> str:
        holder = self._holder()
        who = "another process"
        if holder:
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        return (
            f"{self.folder} is in use by {who}: wait until it ends, stop it, or give this "
            f"run another folder (--run)"
        )


def _now() -> dict:
    return {"since": time.strftime("%Y-%m-%d %H:%M:%S")}
