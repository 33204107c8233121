"""The loader beside its limits: a bare ArrayRecord reader, and torch's DataLoader with PyAV.

Cached latents: batches of `Loader`, beside reading the same records in the same order with the bare
reader, one thread each. Pixels: our decoding processes (decode, resize, crop), beside a DataLoader
whose workers do the same with PyAV and torch, as many workers. Rounds alternate; CPU seconds are
compared, which other work on the machine disturbs less than time. Writes
benchmarks/results/loader.md.

    python benchmarks/loader.py [--rounds 3]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from setting import setting

from easyanimate_jax.data import media
from easyanimate_jax.data.loader import Loader
from easyanimate_jax.data.plan import Plan
from easyanimate_jax.data.records import INDEX_TYPES, Records, Writer, write_texts

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "loader.md"
GRID, BATCH, SHARDS, SHARD = (13, 32, 32), 8, 4, 16  # 13,312 tokens
CLIPS, FRAMES, SIDE, CROP, WORKERS = 8, 49, (360, 640), (384, 672), 2

OURS = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from easyanimate_jax.data.decode import Decoders

folder, workers, frames, h, w = Path(sys.argv[1]), *map(int, sys.argv[2:])
pool = Decoders(workers, seconds=120.0)
paths = sorted(folder.glob("*.mp4"))
with ThreadPoolExecutor(workers) as threads:
    list(threads.map(pool.probe, paths))

def worker_cpu():  # a DataLoader forks, ours import anew: that is the start's, not the work's
    clock = os.sysconf("SC_CLK_TCK")
    stats = [open(f"/proc/{w.pid}/stat").read().rpartition(")")[2].split()
             for w in pool.free.queue if w]
    return sum(int(s[11]) + int(s[12]) for s in stats) / clock

def done():
    with ThreadPoolExecutor(workers) as threads:
        read = lambda path: pool.read_clip(path, 0, frames, 1, (h, w))
        return sum(clip.shape[0] for clip in threads.map(read, paths))
"""
THEIRS = """
import sys
from pathlib import Path
import av, numpy as np, torch
import torch.nn.functional as F
from PIL import Image

folder, workers, frames, h, w = Path(sys.argv[1]), *map(int, sys.argv[2:6])
how = sys.argv[6]
paths = sorted(folder.glob("*.mp4"))
torch.set_num_threads(1)

class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return len(paths)

    def __getitem__(self, i):
        with av.open(str(paths[i])) as container:
            decoded = [f.to_ndarray(format="rgb24") for f, _ in
                       zip(container.decode(video=0), range(frames))]
        h0, w0 = decoded[0].shape[:2]
        th, tw = (h, w0 * h // h0) if h * w0 > w * h0 else (h0 * w // w0, w)
        top, left = round((th - h) / 2), round((tw - w) / 2)
        if how == "pillow":  # the same pixels as ours
            small = [np.asarray(Image.fromarray(f).resize((tw, th), Image.Resampling.BILINEAR))
                     for f in decoded]
            return torch.from_numpy(np.stack(small)[:, top : top + h, left : left + w])
        x = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
        x = F.interpolate(x, size=(th, tw), mode="bilinear", antialias=True)
        return x[:, :, top : top + h, left : left + w].permute(0, 2, 3, 1).contiguous()

def done():
    loader = torch.utils.data.DataLoader(Clips(), batch_size=None, num_workers=workers)
    return sum(clip.shape[0] for clip in loader)

worker_cpu = lambda: 0.0
"""
MEASURE = """
import json, resource, time
whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
cpu = lambda: sum(sum(resource.getrusage(w)[:2]) for w in whose) + worker_cpu()
began, start = time.perf_counter(), cpu()
count = done()
print(json.dumps({"frames": count, "seconds": time.perf_counter() - began, "cpu": cpu() - start}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        folder = Path(place)
        cached, first, size = cached_latents(folder, rounds)
        pixels = pixel_path(folder, rounds)
    lines = [
        "# The loader",
        "",
        f"{setting()} Best of {rounds} alternating rounds.",
        "",
        f"Cached latents: {SHARDS * SHARD} records of {int(np.prod(GRID)):,} tokens, "
        f"{size / 1e6:.1f} MB each, batches of {BATCH}, one thread, warm page cache. First batch "
        f"after a resume at step 123,456, without worker processes, index and shards opened anew: "
        f"**{first:.2f} s**.",
        "",
        "| | records / CPU second | MB / CPU second | of the bare reader |",
        "|---|---|---|---|",
    ]
    bare = cached["bare ArrayRecord reader"]
    for name, seconds in cached.items():
        rate = 1 / seconds
        lines.append(f"| {name} | {rate:.0f} | {rate * size / 1e6:,.0f} | {bare / seconds:.2f} |")
    lines += [
        "",
        f"Pixels: {CLIPS} clips of {FRAMES} frames, {SIDE[0]}x{SIDE[1]} H.264 to "
        f"{CROP[0]}x{CROP[1]}, {WORKERS} workers.",
        "",
        "| | frames / CPU second | frames / second | of the DataLoader (CPU) |",
        "|---|---|---|---|",
    ]
    theirs = pixels["torch DataLoader, PyAV, Pillow (the same pixels)"]
    for name, best in pixels.items():
        lines.append(
            f"| {name} | {best['frames'] / best['cpu']:.0f} "
            f"| {best['frames'] / best['seconds']:.0f} | {theirs['cpu'] / best['cpu']:.2f} |"
        )
    RESULT.write_text("\n".join([*lines, ""]))
    print(RESULT.read_text())


def cached_latents(folder: Path, rounds: int) -> tuple[dict[str, float], float, int]:
    """CPU seconds a record, seconds to the first batch after a resume, bytes of a record."""
    rng, tokens = np.random.default_rng(0), int(np.prod(GRID))
    writer = Writer(folder / "set", {"set": {"condition_draws": 0}})
    row = dict.fromkeys(INDEX_TYPES, 0) | {"clip": "a", "kind": "video", "tokens": tokens}
    row |= dict(zip(("T", "gh", "gw"), GRID, strict=True)) | {"num_captions": 1}
    for shard in range(SHARDS):
        some = [
            {
                "mean": rng.standard_normal((tokens, 64), np.float32).astype(np.float16),
                "logvar": rng.standard_normal((tokens, 64), np.float32).astype(np.float16),
                "text0": np.ones((1, 77, 1024), np.float16),
                "text1": np.ones((1, 256, 2048), np.float16),
            }
            for _ in range(SHARD)
        ]
        writer.write(shard, some, [row] * SHARD)
    writer.finish(SHARDS)
    empty = (np.zeros((1, 77, 1024), np.float16), np.zeros((1, 256, 2048), np.float16))
    write_texts(folder / "empty.safetensors", empty)
    size = sum(a.nbytes for a in some[0].values())

    def loader():
        records = Records(folder / "set")
        plan = Plan(records.index, lengths=(tokens,), batch_size=BATCH, seed=0, name="bench")
        return Loader(records, plan, task="t2v", microbatch=BATCH, text_drop=0.1)

    ours, steps = loader(), SHARDS * SHARD // BATCH
    best = {"bare ArrayRecord reader": 1e9, "our batches": 1e9}
    for _ in range(rounds):
        began = time.process_time()
        for step in range(steps):
            for record in ours.plan(step)[1]:
                ours.records.readers[record // SHARD].read([int(record % SHARD)])
        bare = (time.process_time() - began) / (SHARDS * SHARD)
        began = time.process_time()
        for step in range(steps):
            ours.batch(step)
        built = (time.process_time() - began) / (SHARDS * SHARD)
        for name, seconds in zip(best, (bare, built), strict=True):
            best[name] = min(best[name], seconds)
    began = time.perf_counter()
    next(loader().batches(123_456))
    return best, time.perf_counter() - began, size


def pixel_path(folder: Path, rounds: int) -> dict[str, dict]:
    """The best round of each, by CPU seconds."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (FRAMES, SIDE[0] // 8, SIDE[1] // 8, 3), np.uint8)
    frames = small.repeat(8, 1).repeat(8, 2)
    clips = folder / "clips"
    clips.mkdir()
    for i in range(CLIPS):
        media.write_video(clips / f"{i}.mp4", np.roll(frames, i, 0), crf=23)
    names = {
        "our decoding processes": (OURS, []),
        "torch DataLoader, PyAV, Pillow (the same pixels)": (THEIRS, ["pillow"]),
        "torch DataLoader, PyAV, torch's resize": (THEIRS, ["torch"]),
    }
    runs = {name: [] for name in names}
    for _ in range(rounds):
        for name, (code, more) in names.items():
            arguments = map(str, (clips, WORKERS, FRAMES, *CROP, *more))
            env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", code + MEASURE, *arguments]
            ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(ran.stdout.splitlines()[-1]))
    return {name: min(some, key=lambda r: r["cpu"]) for name, some in runs.items()}


if __name__ == "__main__":
    main()
