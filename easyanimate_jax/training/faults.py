"""Faults on demand, for tests: nothing happens unless EASYANIMATE_FAULTS is set.

A comma-separated list of `NAME` (the process kills itself at that place), `NAME@AT` (only there, a
step or a position) or `NAME@FIRST-LAST`. With EASYANIMATE_FAULTS_ONCE=FILE the process kills itself
only if the file is not there yet, and makes it first, so that a restart gets through.
"""

import os
import signal
from pathlib import Path


def asked(name: str, at: int) -> bool:
    """Whether the fault `name` is wanted at `at`."""
    for fault_ in os.environ.get("EASYANIMATE_FAULTS", "").split(","):
        wanted, _, where = fault_.partition("@")
        first, _, last = where.partition("-")
        if wanted == name and (not where or int(first) <= at <= int(last or first)):
            return True
    return False


def fault(name: str, at: int = 0) -> None:
    """Kill this process, as the kernel does, if the fault `name` is wanted."""
    if not asked(name, at):
        return
    once = os.environ.get("EASYANIMATE_FAULTS_ONCE")
    if once:
        if Path(once).exists():
            return
        Path(once).touch()
    os.kill(os.getpid(), signal.SIGKILL)
