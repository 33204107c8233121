"""Compare the search for near-duplicates with faiss's IndexBinaryMultiHash, on one core.

Each side decides for the same 64-bit hashes, in order, which are at most 5 bits from one before
them. A share of the hashes is planted near others. Our search also decides which rows are kept.
faiss (pip install faiss-cpu) searches with 3 hashes of 21 bits and one flip, which finds all pairs.
It answers a sample of the queries, with all rows in the index. Writes
benchmarks/results/duplicates.md.

    taskset -c 0 python benchmarks/duplicates.py [--rows 5000000]
"""

import argparse
import resource
import time
from pathlib import Path

import faiss
import numpy as np
from setting import setting

from easyanimate_jax.prepare.duplicates import MANY, NEAR, find_repeats

RESULT = Path(__file__).parent / "results" / "duplicates.md"
QUERIES = 20_000  # of faiss
PLANTED = 20  # every 20th row is near another


def main() -> None:
    """Time both sides, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    rows = parser.parse_args().rows
    faiss.omp_set_num_threads(1)
    lines = [
        "| rows | bits | our seconds | comparisons per row | peak of the process, MB | repeated |",
        "|---|---|---|---|---|---|",
    ]
    for count, biased in ((rows // 5, False), (rows // 5, True), (rows, False)):
        hashes = made(count, biased)
        seconds, (repeated, comparisons) = timed(find_repeats, hashes)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        lines.append(
            f"| {count:,} | {'biased' if biased else 'balanced'} | {seconds:.1f} | "
            f"{comparisons / count:.1f} | {peak:.0f} | {repeated.sum():,} |"
        )
    build, search, missed = multi_hash(hashes, repeated)
    lines += [
        "",
        f"faiss {faiss.__version__}, {rows:,} rows, balanced bits: {build:.1f} s for the index; "
        f"{search:.1f} s for {QUERIES:,} queries, so {build + search * rows / QUERIES:,.0f} s for "
        f"all, {(build + search * rows / QUERIES) / seconds:.0f} times ours. Of the repeated rows "
        f"among the queries, it finds no near row for {missed}.",
        "",
        "Biased bits: each bit is equal in 3 of 4 rows. The warning comes above "
        f"{MANY:,} comparisons per row.",
    ]
    RESULT.write_text("\n".join(["# Near-duplicates", "", setting(), "", *lines, ""]))
    print(RESULT.read_text())


def made(count: int, biased: bool) -> np.ndarray:
    """Return hashes; every `PLANTED`-th is a copy of another with up to 5 bits flipped."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, np.uint64)
    if biased:
        hashes &= rng.integers(0, 2**64, count, np.uint64)
    planted = rng.choice(count, count // PLANTED, replace=False)
    near = hashes[rng.integers(0, count, len(planted))]
    for _ in range(NEAR):
        near ^= np.uint64(1) << rng.integers(0, 64, len(planted)).astype(np.uint64)
    hashes[planted] = near
    return hashes


def multi_hash(hashes: np.ndarray, repeated: np.ndarray) -> tuple[float, float, int]:
    """Return faiss's seconds for the index and for the queries, and repeated rows it misses."""
    codes = hashes.view(np.uint8).reshape(-1, 8)
    index = faiss.IndexBinaryMultiHash(64, 3, 21)
    index.nflip = 1
    build, _ = timed(index.add, codes)
    queries = np.random.default_rng(1).choice(len(codes), QUERIES, replace=False)
    search, (limits, _, _) = timed(index.range_search, codes[queries], NEAR + 1)
    alone = np.diff(limits.astype(np.int64)) == 1  # it finds the query itself
    return build, search, int((alone & repeated[queries]).sum())


def timed(function, *arguments) -> tuple[float, object]:
    """Return the seconds of a call, and its result."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()
