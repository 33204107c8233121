"""What an index of millions of rows takes on a host: to write, to load, and to plan a stage from.

Each step is a process of its own. The first load turns the index into files of the host, and the
second maps them. The plan's limit is what training needs before its first batch. Writes
benchmarks/results/index.md.

    python benchmarks/index.py [--rows 26600000]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setting import setting

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "index.md"
WRITE = """
import numpy as np, pyarrow
from easyanimate_jax.data.index import write_index

rng, part = np.random.default_rng(0), 2**20
sizes = ((256, 256), (512, 512), (384, 672), (672, 384), (768, 768), (1024, 1024))
shapes = np.array([(f, h, w) for f in (1, 9, 21, 49) for h, w in sizes])
T, gh, gw = (shapes[:, 0] - 1) // 4 + 1, shapes[:, 1] // 16, shapes[:, 2] // 16
names = ("frames", "height", "width", "T", "gh", "gw", "tokens")
code = rng.integers(0, len(shapes), rows).astype(np.int16)
table = zip(names, (*shapes.T, T, gh, gw, T * gh * gw), strict=True)
columns = {name: values[code].astype(np.int32) for name, values in table}
for name, value in (("source_height", 1080), ("source_width", 1920), ("num_captions", 2)):
    columns[name] = np.full(rows, value, np.int32)
columns["clip"] = pyarrow.chunked_array([
    pyarrow.array([f"films/{j % 1000:04}/video_{j:09}.mp4#{j % 7 * 49}-{j % 7 * 49 + 49}"
                   for j in range(first, min(rows, first + part))])
    for first in range(0, rows, part)])
words = pyarrow.array((code % 4 == 0).astype(np.int32)), pyarrow.array(np.zeros(rows, np.int32))
columns["kind"] = pyarrow.DictionaryArray.from_arrays(words[0], ["video", "image"])
columns["source"] = pyarrow.DictionaryArray.from_arrays(words[1], ["films"])
number = np.arange(3 * rows)  # latents and two captions
spots = {"file": number // 3000, "begin": number % 3000 * 3_400_000,
         "size": np.full(3 * rows, 3_400_000), "checksum": number % 2**32}
files = [[f"shards/{i % 256:02x}/{i:032x}.shard", 10**10] for i in range(3 * rows // 3000 + 1)]
began = time.perf_counter()
write_index(folder / "index.parquet", columns, spots, np.full(rows, 3), {"files": files})
told["size"] = (folder / "index.parquet").stat().st_size
"""
LOAD = """
from easyanimate_jax.data.index import read_index
from easyanimate_jax.data.plan.plan import Plan

began = time.perf_counter()
index = read_index(folder / "index.parquet", folder / "cache")
told["load"] = time.perf_counter() - began
began = time.perf_counter()
lengths = (3328, 13312, 53248)
plan = Plan(index, lengths=lengths, batch_size=768, seed=0, name="stage", held_out=0.001)
plan(0)
"""
MEASURE = """
told["seconds"] = time.perf_counter() - began
told["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps(told))
"""


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=26_600_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        written, first, second = (run(code, rows, folder) for code in (WRITE, LOAD, LOAD))
    lines = [
        "# The index on a host",
        "",
        f"{setting()} {rows:,} rows with three entries each, names of 40 letters; the file has "
        f"{written['size'] / 1e9:.2f} GB. Asked: at most 60 s and 4 GB, the plan included.",
        "",
        "| | load, s | plan of a stage, s | peak of the process, GB |",
        "|---|---|---|---|",
        f"| first process of a host | {first['load']:.1f} | {first['seconds']:.1f} "
        f"| {first['peak']:.2f} |",
        f"| a later one | {second['load']:.2f} | {second['seconds']:.1f} | {second['peak']:.2f} |",
        "",
        f"Writing took {written['seconds']:.0f} s.",
    ]
    RESULT.write_text("\n".join([*lines, ""]))
    print(RESULT.read_text())


def run(code: str, rows: int, folder: str) -> dict:
    """Return the JSON that a program in a new process prints."""
    head = f"import json, resource, time\nfrom pathlib import Path\nrows, told = {rows}, {{}}\n"
    head += f"folder = Path({folder!r})\n"
    command = [sys.executable, "-c", head + code + MEASURE]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout)


if __name__ == "__main__":
    main()
