"""Faults on demand, for tests: nothing happens unless EASYANIMATE_FAULTS is set.

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
import resource
import signal
import time
from pathlib import Path

VALUES = {"nan": float("nan"), "inf": float("inf"), "spike": 20.0}  # the loss masks errors above 50
FULL = 8192  # bytes


def asked(name: str, at: int) -> str | None:
    """The entry that wants the fault `name` at `at`, if there is one."""
    for entry in os.environ.get("EASYANIMATE_FAULTS", "").split(","):
        fault, _, rank = entry.partition("/")
        wanted, _, where = fault.partition("@")
        first, _, last = where.partition("-")
        if rank and rank != os.environ.get("JAX_PROCESS_ID", "0"):
            continue
        if wanted == name and (not where or int(first) <= at <= int(last or first)):
            return entry
    return None


def value_asked(position: int) -> float | None:
    """What all numbers of the batch at `position` are to be, if a fault wants it."""
    return next((value for name, value in VALUES.items() if asked(name, position)), None)


def kill_if_asked(name: str, at: int) -> None:
    """End this process as the kernel does, if the fault `name` is wanted at `at`."""
    if _due(name, at):
        os.kill(os.getpid(), signal.SIGKILL)


def stop_if_asked(step: int) -> None:
    """Be killed, sleep for ever, or be stopped before a step."""
    kill_if_asked("step", step)
    if _due("stopped", step):
        os.kill(os.getpid(), signal.SIGSTOP)
    if _due("hang", step):
        while True:
            time.sleep(1)


def limit_files_if_asked(step: int) -> None:
    """Let the kernel refuse to write long files from here on, or no longer."""
    if "full" in os.environ.get("EASYANIMATE_FAULTS", ""):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = FULL if asked("full", step) else hard
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def _due(name: str, at: int) -> bool:
    """Whether the fault is wanted, and was not had before where once is enough."""
    entry = asked(name, at)
    once = os.environ.get("EASYANIMATE_FAULTS_ONCE")
    if not (entry and once):
        return bool(entry)
    mark = Path(once) / entry.replace("/", "_")
    if mark.exists():
        return False
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    return True
