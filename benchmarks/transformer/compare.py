"""Both sides of a comparison, each in its own process, rounds alternating."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ONE_SIDE = Path(__file__).parent / "one_side.py"
ROOT = Path(__file__).parents[2]


def measure(side: str, task: str, sizes: dict, *, dtype: str, repeats: int) -> dict | None:
    """Seconds, peak bytes, device; None if the process ended without a result: out of memory."""
    words = [sys.executable, str(ONE_SIDE), side, task, "--dtype", dtype]
    for name, value in (sizes | {"repeats": repeats}).items():
        words += [f"--{name}", str(value)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    if ran.returncode:
        print(ran.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(ran.stdout.splitlines()[-1])


def alternate(sides, task: str, sizes: dict, *, dtype: str, repeats: int, rounds: int) -> dict:
    """Per side the results of its rounds together; None where one did not end well."""
    together = {side: {"seconds": [], "peak": 0} for side in sides}
    for _ in range(rounds):
        for side in sides:
            result = together[side] and measure(side, task, sizes, dtype=dtype, repeats=repeats)
            if result:
                result["seconds"] += together[side]["seconds"]
                result["peak"] = max(result["peak"], together[side]["peak"])
            together[side] = result
    return together


def num_tokens(sizes: dict) -> int:
    return sizes["frames"] * sizes["rows"] * sizes["columns"]


def best(result: dict | None) -> str:
    """Best and median seconds."""
    if result is None:
        return "did not fit"
    return f"{min(result['seconds']):.2f} ({statistics.median(result['seconds']):.2f})"


def ratio(ours: dict | None, theirs: dict | None, field: str) -> str:
    """Ours over theirs: of the best seconds, or of the peak bytes."""
    if ours is None or theirs is None:
        return "-"
    pick = min if field == "seconds" else int
    return f"{pick(ours[field]) / pick(theirs[field]):.2f}"
