"""The line above every benchmark result: date, machine, Python, command and load."""

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path


def setting() -> str:
    """Return date, machine, Python, command and load as one paragraph."""
    memory = next(x for x in Path("/proc/meminfo").read_text().splitlines() if "Total" in x)
    return (
        f"{datetime.date.today()}; {os.cpu_count()} cores, "
        f"{int(memory.split()[1]) / 2**20:.0f} GiB, {platform.machine()}, "
        f"Python {platform.python_version()}; `{shlex.join(['python', *sys.argv])}`; "
        f"load average {os.getloadavg()[2]:.1f} over the last 15 minutes."
    )
