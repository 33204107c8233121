"""Injected faults for tests: a run has none unless EASYANIMATE_FAULTS is set.

The variable is a comma-separated list of `NAME@AT`, `NAME@FIRST-LAST` (steps, or positions in the
plan) or `NAME`. `/RANK` after an entry limits it to one process. If EASYANIMATE_FAULTS_ONCE names a
folder, an entry stops a process only once, however often the run is started.

    nan inf spike       fill a batch (by its position in the plan) with such numbers
    step                kill the process before a step
    writing finalising  kill it while a checkpoint is written, or before the checkpoint is named
    uploaded            kill it after its arrays are in a store, before it says so
    written checked     kill it after the checkpoint is named, or after its files were compared
    deleting            kill it while an old checkpoint is deleted
    restoring           kill it as it begins to read a checkpoint, which the others read too
    hang stopped        sleep before a step, or stop the process by SIGSTOP
    full                limit files to 8 KB while a checkpoint is written
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
    """The faults of a process: entries as in EASYANIMATE_FAULTS, and the rank of the process.

    The training loop and `Checkpoints` call the methods at the places above. The folder `once`
    records which entries have already stopped a process.
    """

    entries: tuple[str, ...] = ()
    rank: str = "0"
    once: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Faults":
        """Return the faults that the environment variables request."""
        asked = environment.get("EASYANIMATE_FAULTS", "")
        entries = tuple(entry for entry in asked.split(",") if entry)
        rank = environment.get("JAX_PROCESS_ID", "0")
        return cls(entries, rank, environment.get("EASYANIMATE_FAULTS_ONCE", ""))

    def value(self, position: int) -> float | None:
        """Return the number that fills the batch at `position`, or None without a fault there."""
        return next((value for name, value in VALUES.items() if self._asked(name, position)), None)

    def kill(self, name: str, at: int) -> None:
        """Kill this process by SIGKILL if the fault `name` is due at `at`."""
        if self._due(name, at):
            os.kill(os.getpid(), signal.SIGKILL)

    def before_step(self, step: int) -> None:
        """Kill the process, stop it or sleep for ever, if such a fault is due before `step`."""
        self.kill("step", step)
        if self._due("stopped", step):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._due("hang", step):
            while True:
                time.sleep(1)

    def limit_files(self, step: int) -> None:
        """Set the kernel's file size limit to 8 KB if the fault is due, and reset it otherwise."""
        if not any(entry.startswith("full") for entry in self.entries):
            return
        import resource  # Windows has none

        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = FULL if self._asked("full", step) else hard
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    def _asked(self, name: str, at: int) -> str | None:
        """Return the entry for the fault `name` at `at`, or None."""
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
        """Return whether the fault is due at `at`; with `once`, each entry is due only once."""
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
