"""One process (or one group of them) at a time in a run folder.

The lock is the kernel's, on the file `lock`, so it is gone with the process that held it, however
that ended. The file says who holds it. Where a file system has no locks, the heartbeat of the
holder counts instead: a beat of the last minute, of another process, is a run that goes on.
"""

import contextlib
import json
import os
import shutil
import socket
import time
from pathlib import Path

PATIENCE = 10.0  # seconds for a killed process to be gone
FRESH = 60.0  # seconds: a heartbeat younger than this is of a process that lives


class RunLock:
    """A context manager that holds a folder for this process, and refuses a second one.

    Raises ValueError that names the holder's host, process and start. `wait` is how long a holder
    that is about to end is waited for, in seconds. A folder that was not there before goes away
    again with an error, unless `begun` was set.
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
                self.file.close()
                raise ValueError(self._refusal())
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
        """Return whether the holder that the file names has a heartbeat that is fresh."""
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
            f"{self.folder} is in use by {who}: wait for its end, stop it, or give this run "
            f"another folder (--run)"
        )


def _now() -> dict:
    return {"since": time.strftime("%Y-%m-%d %H:%M:%S")}
