"""Faults on demand, for tests: a run has none unless EASYANIMATE_FAULTS is set.

It is a comma-separated list of `NAME@AT`, `NAME@FIRST-LAST` (steps, or positions in the plan) or
`NAME`, each followed by `/RANK` where only one process is meant. With EASYANIMATE_FAULTS_ONCE, the
name of a folder, an entry that stops a process does so once, however often the run is started.

    nan inf spike       a batch (by its position in the plan) of such numbers
    step                killed before a step
    writing finalising  killed while a checkpoint is written, and before it gets its name
    written checked     killed when it has its name, and when its files were compared
    deleting            killed while an old checkpoint is deleted
    hang stopped        sleeping before a step, or stopped by SIGSTOP
    full                no file may grow beyond 8 KB while a checkpoint is written
"""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VALUES = {"nan": float("nan"), "inf": float("inf"), "spike": 20.0}  # the loss masks errors above 50
FULL = 8192  # bytes


@dataclass(frozen=True)
class Faults:
    """The faults that a process shall have: entries as in EASYANIMATE_FAULTS, its rank, marks.

    A training loop and its checkpoints ask it at the places above. `once` is the folder that
    remembers which entries have stopped a process.
    """

    entries: tuple[str, ...] = ()
    rank: str = "0"
    once: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Faults":
        """Return the faults that the environment variables ask for."""
        asked = environment.get("EASYANIMATE_FAULTS", "")
        entries = tuple(entry for entry in asked.split(",") if entry)
        rank = environment.get("JAX_PROCESS_ID", "0")
        return cls(entries, rank, environment.get("EASYANIMATE_FAULTS_ONCE", ""))

    def value(self, position: int) -> float | None:
        """Return what all numbers of the batch at `position` are to be, if a fault wants it."""
        return next((value for name, value in VALUES.items() if self._asked(name, position)), None)

    def kill(self, name: str, at: int) -> None:
        """End this process as the kernel does, if the fault `name` is wanted at `at`."""
        if self._due(name, at):
            os.kill(os.getpid(), signal.SIGKILL)

    def before_step(self, step: int) -> None:
        """Be killed, sleep for ever, or be stopped before a step."""
        self.kill("step", step)
        if self._due("stopped", step):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._due("hang", step):
            while True:
                time.sleep(1)

    def limit_files(self, step: int) -> None:
        """Let the kernel refuse to write long files from here on, or no longer."""
        if not any(entry.startswith("full") for entry in self.entries):
            return
        import resource  # Windows has none

        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = FULL if self._asked("full", step) else hard
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    def _asked(self, name: str, at: int) -> str | None:
        """Return the entry that wants the fault `name` at `at`, if there is one."""
        for entry in self.entries:
            fault, _, rank = entry.partition("/")
            wanted, _, where = fault.partition("@")
            first, _, last = where.partition("-")
            if rank and rank != self.rank:
                continue
            if wanted == name and (not where or int(first) <= at <= int(last or first)):
                return entry
        return None

    def _due(self, name: str, at: int) -> bool:
        """Return whether the fault is wanted, and was not had before where once is enough."""
        entry = self._asked(name, at)
        if not (entry and self.once):
            return bool(entry)
        mark = Path(self.once) / entry.replace("/", "_")
        if mark.exists():
            return False
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        return True


NO_FAULTS = Faults()
