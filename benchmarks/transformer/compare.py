"""Run both sides of a comparison in processes of their own, in alternating rounds."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

ONE_SIDE = Path(__file__).parent / "one_side.py"
ROOT = Path(__file__).parents[2]


def measure(
    side: str,
    task: str,
    grids: list,
    *,
    width: int,
    depth: int,
    dtype: str,
    repeats: int,
    limit: float | None = None,
) -> list[dict | None]:
    """Return seconds, peak bytes and device at each grid; None where memory was too small.

    Raises TimeoutExpired after `limit` seconds, with the process ended.
    """
    words = [sys.executable, str(ONE_SIDE), side, task, "--dtype", dtype]
    for name, value in (("width", width), ("depth", depth), ("repeats", repeats)):
        words += [f"--{name}", str(value)]
    words += ["--grids", *("x".join(map(str, grid)) for grid in grids)]
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=limit)
    if ran.returncode:
        print(ran.stderr[-2000:], file=sys.stderr)
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return found + [None] * (len(grids) - len(found))


def alternate(sides, task: str, grids: list, *, rounds: int, **more) -> dict[str, list]:
    """Return the joined rounds per side and grid; None where one failed."""
    together = {side: [{"seconds": [], "peak": 0} for _ in grids] for side in sides}
    for _ in range(rounds):
        for side in sides:
            for n, result in enumerate(measure(side, task, grids, **more)):
                so_far = together[side][n]
                if so_far and result:
                    result["seconds"] += so_far["seconds"]
                    result["peak"] = max(result["peak"], so_far["peak"])
                together[side][n] = so_far and result
    return together


def num_tokens(grid: tuple[int, int, int]) -> int:
    """Return the number of tokens of a grid."""
    return math.prod(grid)


def best(result: dict | None) -> str:
    """Return the best and the median seconds as text."""
    if result is None:
        return "did not fit"
    return f"{min(result['seconds']):.3g} ({statistics.median(result['seconds']):.3g})"


def ratio(ours: dict | None, theirs: dict | None, field: str) -> str:
    """Return ours / theirs as text, for the best seconds or for the peak bytes."""
    if ours is None or theirs is None:
        return "-"
    pick = min if field == "seconds" else int
    return f"{pick(ours[field]) / pick(theirs[field]):.2f}"
