"""Faults on demand, for tests: nothing happens unless EASYANIMATE_FAULTS is set.

It is a comma-separated list of `NAME@AT`, `NAME@FIRST-LAST` (steps, or positions in the plan) or
`NAME`, each followed by `/RANK` where only one process is meant. With EASYANIMATE_FAULTS_ONCE, the
name of a folder, every entry kills once, however often the run is started again.
"""

import os
import signal
from pathlib import Path


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


def kill_if_asked(name: str, at: int) -> None:
    """End this process as the kernel does, if the fault `name` is wanted at `at`."""
    entry = asked(name, at)
    if not entry:
        return
    once = os.environ.get("EASYANIMATE_FAULTS_ONCE")
    if once:
        mark = Path(once) / entry.replace("/", "_")
        if mark.exists():
            return
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
