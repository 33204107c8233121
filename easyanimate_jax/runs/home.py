"""The folder of a run while it trains: its lock, and its small files.

A run on a disk is its folder. A run in a store has a local folder for its small files, such as the
metrics, and each process keeps there what is its own: process 0 everything, the others the files
with their number. Checkpoints go to the store directly.
"""

import re
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax

from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.storage.lock import FolderLock, StoreLock
from easyanimate_jax.storage.mirror import Mirror, work_folder
from easyanimate_jax.storage.stores import Remote, place

# Process 0 goes on with these, and every process goes on with the last and with its own files.
GROWING = re.compile(r"[^/]+\.jsonl?")
RETURNS = "divergence.jsonl"


@runtime_checkable
class Home(Protocol):
    """A context manager that holds the run's folder; set `begun` once the run has started."""

    begun: bool

    def keep(self) -> None:
        """Bring all small files to where they stay, in any thread.

        Raises AnotherRunError if another process has taken the folder over.
        """


def open_home(config: TrainConfig) -> Home:
    """Return the home of a run, for this process."""
    run, process = place(config.run), jax.process_index()
    if isinstance(run, Remote):
        return StoreHome(run, process)
    return LockedFolder(run, option="--run", mode=0o700) if process == 0 else SharedFolder()


class LockedFolder(FolderLock):
    """A run on a disk, in process 0."""

    def keep(self) -> None:
        """Do nothing: the files are where they stay."""


class SharedFolder:
    """A run on a disk, in the other processes."""

    begun = True

    def __enter__(self) -> "SharedFolder":
        return self

    def __exit__(self, *_) -> None:
        pass

    def keep(self) -> None:
        """Do nothing: the files are where they stay."""


class StoreHome:
    """A run in a store. Nothing is uploaded before `begun`, so a refused run changes nothing."""

    def __init__(self, run: Remote, process: int):
        self.process, folder = process, work_folder(run)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.lock = StoreLock(run, option="--run") if process == 0 else None
        wanted = lambda name: process == 0 or self._is_own(name)  # noqa: E731
        held = lambda: self.lock is None or self.lock.taken_by is None  # noqa: E731
        self.mirror = Mirror(folder, run, wanted, held)
        self._begun = False

    def __enter__(self) -> "StoreHome":
        if self.lock:
            self.lock.__enter__()
        try:
            self.mirror.fetch(self._needs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            if self.begun:
                self.mirror.close()
        finally:
            if self.lock:
                self.lock.__exit__()

    @property
    def begun(self) -> bool:
        """Return whether the run has started."""
        return self._begun

    @begun.setter
    def begun(self, begun: bool) -> None:
        if begun and not self._begun:
            self.mirror.start()
        self._begun = begun

    def keep(self) -> None:
        """Upload the files that changed. Raises AnotherRunError if the lock was taken over."""
        if self.lock:
            self.lock.check()
        self.mirror.upload()

    def _needs(self, name: str) -> bool:
        if self.process == 0:
            return bool(GROWING.fullmatch(name))
        return name == RETURNS or self._is_own(name)

    def _is_own(self, name: str) -> bool:
        return Path(name).stem.endswith(f"-{self.process}")
