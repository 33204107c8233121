"""Measure the search for near-duplicates among vectors: time, memory, and what it misses.

Rows are random vectors of length 1: without structure ("random", the hardest case), or of 24 hidden
dimensions around many centres with noise and a common direction ("clustered", as the vectors of a
model of pictures). One row in ten is planted at a cosine of 0.95 to 1 to another. The vectors are
float16 in a file that is mapped. Of 20,000 rows all pairs are compared. Writes
benchmarks/results/similar.md.

    OPENBLAS_NUM_THREADS=1 python benchmarks/similar.py [--rows 1000000] [--width 256]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from setting import setting

from easyanimate_jax.prepare.similar import Similar, find_similar

RESULT = Path(__file__).parent / "results" / "similar.md"
LEAST, PLANTED = 0.95, 0.1
FEW = 20_000  # rows of which all pairs are compared
CHUNK = 100_000  # rows that are made at once


def main() -> None:
    """Time all cases, each in a process of its own, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--one", help="kind of the vectors: measure only this, and print a row")
    own = parser.parse_args()
    if own.one:
        print(measured(own.rows, own.width, own.one))
        return
    lines = [
        "| rows | numbers a row | vectors | trees | missed, by its own estimate | planted ones "
        "found | of those that all pairs give | CPU seconds | peak of the process, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in (FEW, own.rows // 5, own.rows):
        for kind in ("random", "clustered"):
            command = [sys.executable, __file__, "--rows", str(count), "--width", str(own.width)]
            ran = subprocess.run([*command, "--one", kind], capture_output=True, text=True)
            lines.append(ran.stdout.strip() or ran.stderr)
    RESULT.write_text("\n".join(["# Near-duplicates by vectors", "", setting(), "", *lines, ""]))
    print(RESULT.read_text())


def measured(count: int, width: int, kind: str) -> str:
    """Return a row of the result."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors"
        first = write(file, count, width, kind)
        vectors = np.memmap(file, np.float16, "r", shape=(count, width))
        began = time.process_time()
        found = find_similar(vectors, np.arange(count), LEAST)
        seconds = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return (
            f"| {count:,} | {width} | {kind} | {found.trees} | {found.missed:.2%} | "
            f"{found.repeated[first:].mean():.2%} | {compared(vectors, found)} | {seconds:.0f} | "
            f"{peak:.0f} |"
        )


def compared(vectors: np.ndarray, found: Similar) -> str:
    """Return the share of the rows to drop that were found, if there are few rows."""
    if len(vectors) > FEW:
        return ""
    units = vectors.astype(np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    kept = np.ones(len(units), bool)
    for row in range(len(units)):
        kept[row] = not ((units[:row] @ units[row] >= LEAST) & kept[:row]).any()
    wrong = int((found.repeated & kept).sum())
    share = (found.repeated & ~kept).sum() / (~kept).sum()
    return f"{share:.2%}, and {wrong} others"


def write(file: Path, count: int, width: int, kind: str) -> int:
    """Write vectors; return the number of the first planted one."""
    rng, first = np.random.default_rng(0), count - int(PLANTED * count)
    centres = rng.standard_normal((max(10, first // 200), 24), np.float32)
    turn, common = (
        rng.standard_normal((24, width), np.float32) / 24**0.5,
        rng.standard_normal(width),
    )
    with open(file, "wb") as opened:
        for start in range(0, first, CHUNK):
            size = min(CHUNK, first - start)
            if kind == "random":
                made = rng.standard_normal((size, width), np.float32)
            else:
                hidden = centres[rng.integers(len(centres), size=size)]
                hidden = hidden + 0.7 * rng.standard_normal((size, 24), np.float32)
                made = hidden @ turn + 0.15 * rng.standard_normal((size, width), np.float32)
                made += 0.8 * common.astype(np.float32)
            opened.write(unit(made).astype(np.float16))
        opened.flush()
        before = np.memmap(file, np.float16, "r", shape=(first, width))
        for start in range(first, count, CHUNK):
            size = min(CHUNK, count - start)
            base = unit(before[rng.integers(first, size=size)].astype(np.float32))
            other = rng.standard_normal((size, width), np.float32)
            other = unit(other - np.sum(other * base, axis=1, keepdims=True) * base)
            cosine = rng.uniform(LEAST, 1, (size, 1)).astype(np.float32)
            opened.write((cosine * base + np.sqrt(1 - cosine**2) * other).astype(np.float16))
    return first


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
