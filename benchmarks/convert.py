"""Convert four blocks of the 12B to our layout and back, compared with diffusers' load and save.

Each measurement is a new process on the same 2 GB of random bfloat16 weights in sharded
safetensors. Time excludes imports. Peak RSS is that of the whole process, given with its value
before the work. Rounds alternate; best, median and worst are reported. Before each round, memory is
allocated and freed, because the host of a virtual machine may have taken free pages back, and the
next process would wait for them. Writes benchmarks/results/convert.md.

    python benchmarks/convert.py [--rounds 3]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from setting import setting

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "convert.md"
SHARD_BYTES = 300_000_000

MAKE = """
import json
import sys
import ml_dtypes, numpy as np
from easyanimate_jax.weights import mmdit_table
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.weights import files
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.module import abstract, shapes_of
from pathlib import Path

folder, shard_bytes = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir()
config = MMDiTConfig(depth=4, mmdit_depth=4, heads=48, text_widths=(3584,), text_norm=True,
                     round_time=True)
ours = shapes_of(abstract(MMDiT, config))
none = {n: Tensor(s, ml_dtypes.bfloat16, lambda box: None) for n, s in ours.items()}
rng = np.random.default_rng(0)
noise = rng.standard_normal(2**24 + 1, np.float32).astype(ml_dtypes.bfloat16)
fill = lambda shape: Tensor.of(np.resize(np.roll(noise, rng.integers(2**24)), shape))
theirs = {n: fill(t.shape) for n, t in mmdit_table.to_torch(none, config, "diffusers").items()}
files.write_shards(folder, mmdit_table.STEM, theirs, shard_bytes=shard_bytes)
(folder / "config.json").write_text(json.dumps(mmdit_table.config_json(config, "diffusers")))
"""
OURS = """
import json
import sys
import time
from easyanimate_jax.weights.conversion import Options, convert
from easyanimate_jax.weights.conversion import peak_rss

source, target, to, shard_bytes = sys.argv[1:]
before, cpu = peak_rss(), time.process_time()
report = convert(source, target, Options(to, shard_bytes=int(shard_bytes)))
cpu = time.process_time() - cpu
print(json.dumps({"seconds": report.seconds, "cpu": cpu, "before": before, "peak": peak_rss()}))
"""
THEIRS = """
import json
import sys
import time
import torch
from diffusers import EasyAnimateTransformer3DModel
from easyanimate_jax.weights.conversion import peak_rss

source, target, to, shard_bytes = sys.argv[1:]
before, began, cpu = peak_rss(), time.perf_counter(), time.process_time()
model = EasyAnimateTransformer3DModel.from_pretrained(source, torch_dtype=torch.bfloat16)
model.save_pretrained(target, max_shard_size=int(shard_bytes))
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "before": before, "peak": peak_rss()}))
"""


TOUCH = "import numpy as np; np.full(5 * 10**9, 1, np.uint8)"  # more than a run and its files need


def main() -> None:
    """Measure both sides in alternating rounds, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        folder = Path(place)
        python(MAKE, folder / "theirs", SHARD_BYTES)
        python(OURS, folder / "theirs", folder / "ours", "jax", SHARD_BYTES)
        size = sum(p.stat().st_size for p in (folder / "theirs").glob("*.safetensors"))
        work = {
            "ours: diffusers layout to jax": (OURS, "theirs", "jax"),
            "ours: jax to diffusers layout": (OURS, "ours", "diffusers"),
            "diffusers: from_pretrained, save_pretrained": (THEIRS, "theirs", "-"),
        }
        runs = {name: [] for name in work}
        for _ in range(rounds):
            for name, (code, source, to) in work.items():
                target = folder / "target"
                python(TOUCH)
                runs[name].append(python(code, folder / source, target, to, SHARD_BYTES))
                if to == "diffusers":
                    compare(folder / "theirs", target)
                shutil.rmtree(target)
        largest = 2 * 4 * 3072 * 12288  # an MLP's kernel of all four blocks
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(table(runs, size, largest))
    print(RESULT.read_text())


def python(code: str, *arguments) -> dict | None:
    """Return the JSON that a new process prints in its last line; None without output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1]) if ran.stdout else None


def compare(expected: Path, found: Path) -> None:
    """Exit with an error if a file differs after the conversion to our layout and back."""
    for path in sorted(expected.glob("*.safetensors")):
        if path.read_bytes() != (found / path.name).read_bytes():
            raise SystemExit(f"{path.name} differs: the conversion there and back is not exact")


def table(runs: dict[str, list[dict]], size: int, largest: int) -> str:
    """Return the result as Markdown."""
    lines = [
        "# Conversion, beside diffusers",
        "",
        setting(),
        "",
        f"{size / 1e6:.0f} MB of bfloat16, four blocks of the 12B's width, in shards of "
        f"{SHARD_BYTES / 1e6:.0f} MB. The largest stacked tensor is {largest / 1e6:.0f} MB. Best, "
        f"median and worst of {len(next(iter(runs.values())))} alternating rounds; the page cache "
        "is warm. Every row reads and writes all of it; ours also checks every value for NaN. The "
        "files that come back are compared byte for byte.",
        "",
        "| | seconds (median, worst) | CPU seconds | MB/s | peak RSS | before the work | added |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        seconds, cpu = [r["seconds"] for r in results], min(r["cpu"] for r in results)
        peak, before = (max(r[key] for r in results) / 1e6 for key in ("peak", "before"))
        lines.append(
            f"| {name} | {min(seconds):.2f} ({median(seconds):.2f}, {max(seconds):.2f}) "
            f"| {cpu:.2f} | {size / 1e6 / min(seconds):.0f} | {peak:.0f} MB | {before:.0f} MB "
            f"| {peak - before:.0f} MB |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
