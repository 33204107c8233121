"""Compare the loader with bare reads of its shards, and with torch's DataLoader with PyAV.

Cached latents: batches of `Loader` against bare reads of the same entries in the same order, one
thread each. Pixels: our decoding processes (decode, resize, crop) against a DataLoader with as
many workers that do the same with PyAV. Its workers resize with FFmpeg's scaler, whose pixels must
equal ours bit for bit, with Pillow, or with torch. Rounds alternate. CPU seconds are compared,
because other work on the machine affects them less than wall time. Writes
benchmarks/results/loader.md.

    python benchmarks/loader.py [--rounds 3]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from setting import setting

from easyanimate_jax.data import media
from easyanimate_jax.data.index import INDEX_TYPES
from easyanimate_jax.data.records import write_set, write_texts

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "loader.md"
GRID, BATCH, SHARDS, SHARD = (13, 32, 32), 8, 4, 16  # 13,312 tokens
CLIPS, FRAMES, SIDE, CROP, WORKERS = 8, 49, (360, 640), (384, 672), 2
PASSES = 4  # passes over the clips in a round

LATENTS = """
import sys
from easyanimate_jax.data.loader import Loader, Pages, keep_memory
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Records

folder = sys.argv[1]
tokens, batch, steps, passes = map(int, sys.argv[2:])

def make_plan(records):
    return Plan(records.index, lengths=(tokens,), batch_size=batch, seed=0, name="bench")

def make_loader():
    records = Records(folder)
    return Loader(records, make_plan(records), task="t2v", microbatch=batch, text_drop=0.1)
"""
BARE = """
from easyanimate_jax.storage.stores import read_ranges

records = Records(folder)
plan = make_plan(records)

def done():
    for step in range(steps):
        for record in plan(step)[1]:
            for entry in (0, 1):  # latents, and a text
                file, begin, size, _ = records.index.spot(int(record), entry)
                read_ranges(records.folder / file, [(begin, begin + size)])
"""
BATCHES = """
loader, pages = make_loader(), Pages()

def done():
    for step in range(steps):
        loader.batch(step, pages)
"""
MEASURE_LATENTS = """
import json, time
done()
start = time.process_time()
for _ in range(passes):
    done()
cpu = (time.process_time() - start) / (passes * steps * batch)
began = time.perf_counter()
next(make_loader().batches(123_456))
print(json.dumps({"cpu": cpu, "first": time.perf_counter() - began}))
"""
CACHED = {
    "bare reads": BARE,
    "bare reads, malloc as the loader sets it": BARE + "keep_memory()",
    "our batches": BATCHES,
}
OURS = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from easyanimate_jax.data.decode import Decoders

folder, workers, frames, h, w, passes = Path(sys.argv[1]), *map(int, sys.argv[2:])
pool = Decoders(workers, seconds=120.0)
paths = sorted(folder.glob("*.mp4"))
read = lambda path: pool.read_clip(path, 0, frames, 1, (h, w))
with ThreadPoolExecutor(workers) as threads:
    list(threads.map(pool.probe, paths))

def worker_cpu():  # without the start: ours import again, a DataLoader forks
    clock = os.sysconf("SC_CLK_TCK")
    stats = [open(f"/proc/{w.pid}/stat").read().rpartition(")")[2].split()
             for w in pool.free.queue if w]
    return sum(int(s[11]) + int(s[12]) for s in stats) / clock

def one():
    return read(paths[0])

def done():
    with ThreadPoolExecutor(workers) as threads:
        return sum(clip.shape[0] for clip in threads.map(read, paths * passes))
"""
THEIRS = """
import sys
from pathlib import Path
import av, numpy as np, torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from PIL import Image
from easyanimate_jax.data.media import SCALING

folder, workers, frames, h, w, passes = Path(sys.argv[1]), *map(int, sys.argv[2:7])
how = sys.argv[7]
paths = sorted(folder.glob("*.mp4")) * passes
torch.set_num_threads(1)

class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return len(paths)

    def __getitem__(self, i):
        with av.open(str(paths[i])) as container:
            decoded = [f for f, _ in zip(container.decode(video=0), range(frames))]
        h0, w0 = decoded[0].height, decoded[0].width
        th, tw = (h, w0 * h // h0) if h * w0 > w * h0 else (h0 * w // w0, w)
        top, left = round((th - h) / 2), round((tw - w) / 2)
        if how == "ffmpeg":
            scaler = VideoReformatter()
            small = [scaler.reformat(f, tw, th, "rgb24", interpolation=SCALING) for f in decoded]
            small = [f.to_ndarray() for f in small]
        if how == "pillow":
            small = [np.asarray(f.to_image().resize((tw, th), Image.Resampling.BILINEAR))
                     for f in decoded]
        if how == "torch":
            x = np.stack([f.to_ndarray(format="rgb24") for f in decoded])
            x = torch.from_numpy(x).permute(0, 3, 1, 2)
            x = F.interpolate(x, size=(th, tw), mode="bilinear", antialias=True)
            return x[:, :, top : top + h, left : left + w].permute(0, 2, 3, 1).contiguous()
        return torch.from_numpy(np.stack(small)[:, top : top + h, left : left + w])

def one():
    return Clips()[0].numpy()

def done():
    loader = torch.utils.data.DataLoader(Clips(), batch_size=None, num_workers=workers)
    return sum(clip.shape[0] for clip in loader)

worker_cpu = lambda: 0.0
"""
MEASURE = """
import json, resource, time, zlib
import numpy as np
whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
cpu = lambda: sum(sum(resource.getrusage(w)[:2]) for w in whose) + worker_cpu()
pixels = zlib.crc32(np.ascontiguousarray(one()))
began, start = time.perf_counter(), cpu()
count = done()
print(json.dumps({"frames": count, "seconds": time.perf_counter() - began, "cpu": cpu() - start,
                  "pixels": pixels}))
"""
SAME_PIXELS = "torch DataLoader, PyAV, FFmpeg's scaler (the same pixels)"


def main() -> None:
    """Measure both paths, and write the result."""
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
        f"{size / 1e6:.1f} MB each, batches of {BATCH}, one thread, {PASSES} passes after a first. "
        f"First batch after a resume at step 123,456, without worker processes, index and shards "
        f"opened again: **{first:.2f} s**.",
        "",
        "| | records / CPU second | MB / CPU second | ours to it |",
        "|---|---|---|---|",
    ]
    ours = cached["our batches"]
    for name, seconds in cached.items():
        rate = 1 / seconds
        lines.append(f"| {name} | {rate:.0f} | {rate * size / 1e6:,.0f} | {seconds / ours:.2f} |")
    lines += [
        "",
        f"Pixels: {CLIPS} clips of {FRAMES} frames, {SIDE[0]}x{SIDE[1]} H.264 to "
        f"{CROP[0]}x{CROP[1]}, {WORKERS} workers, {PASSES} passes.",
        "",
        "| | frames / CPU second | frames / second | ours to it, by CPU | by time |",
        "|---|---|---|---|---|",
    ]
    ours = pixels["our decoding processes"]
    for name, best in pixels.items():
        lines.append(
            f"| {name} | {best['frames'] / best['cpu']:.0f} "
            f"| {best['frames'] / best['seconds']:.0f} | {best['cpu'] / ours['cpu']:.2f} "
            f"| {best['seconds'] / ours['seconds']:.2f} |"
        )
    RESULT.write_text("\n".join([*lines, ""]))
    print(RESULT.read_text())


def cached_latents(folder: Path, rounds: int) -> tuple[dict[str, float], float, int]:
    """Return (CPU seconds per record, seconds to the first batch of a resume, bytes per record)."""
    rng, tokens = np.random.default_rng(0), int(np.prod(GRID))
    row = dict.fromkeys(INDEX_TYPES, 0) | {"clip": "a", "kind": "video", "tokens": tokens}
    row |= dict(zip(("T", "gh", "gw"), GRID, strict=True)) | {"num_captions": 1}
    some = [
        {
            "mean": rng.standard_normal((tokens, 64), np.float32).astype(np.float16),
            "logvar": rng.standard_normal((tokens, 64), np.float32).astype(np.float16),
            "text0": rng.standard_normal((1, 77, 1024), np.float32).astype(np.float16),
            "text1": rng.standard_normal((1, 256, 2048), np.float32).astype(np.float16),
        }
        for _ in range(SHARDS * SHARD)
    ]
    made_of = {"set": {"condition_draws": 0}}
    write_set(folder / "set", made_of, some, [row] * len(some), shard_size=SHARD)
    empty = (np.zeros((1, 77, 1024), np.float16), np.zeros((1, 256, 2048), np.float16))
    write_texts(folder / "empty.safetensors", empty)
    size = sum(a.nbytes for a in some[0].values())

    runs = {name: [] for name in CACHED}
    for _ in range(rounds):
        for name, code in CACHED.items():
            arguments = map(str, (folder / "set", tokens, BATCH, SHARDS * SHARD // BATCH, PASSES))
            runs[name].append(run(LATENTS + code + MEASURE_LATENTS, *arguments))
    best = {name: min(r["cpu"] for r in some) for name, some in runs.items()}
    return best, min(r["first"] for some in runs.values() for r in some), size


def run(code: str, *arguments: str) -> dict:
    """Return the JSON that a program in a new process prints in its last line."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *arguments]
    ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def pixel_path(folder: Path, rounds: int) -> dict[str, dict]:
    """Return the best round of each side, by CPU seconds."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (FRAMES, SIDE[0] // 8, SIDE[1] // 8, 3), np.uint8)
    frames = small.repeat(8, 1).repeat(8, 2)
    clips = folder / "clips"
    clips.mkdir()
    for i in range(CLIPS):
        media.write_video(clips / f"{i}.mp4", np.roll(frames, i, 0), crf=23)
    names = {
        "our decoding processes": (OURS, []),
        SAME_PIXELS: (THEIRS, ["ffmpeg"]),
        "torch DataLoader, PyAV, Pillow's resize": (THEIRS, ["pillow"]),
        "torch DataLoader, PyAV, torch's resize": (THEIRS, ["torch"]),
    }
    runs = {name: [] for name in names}
    for _ in range(rounds):
        for name, (code, more) in names.items():
            arguments = map(str, (clips, WORKERS, FRAMES, *CROP, PASSES, *more))
            runs[name].append(run(code + MEASURE, *arguments))
    best = {name: min(some, key=lambda r: r["cpu"]) for name, some in runs.items()}
    if best[SAME_PIXELS]["pixels"] != best["our decoding processes"]["pixels"]:
        raise RuntimeError("the DataLoader's pixels are not ours; the comparison is not fair")
    return best


if __name__ == "__main__":
    main()
