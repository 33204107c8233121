"""Measure what `prepare --engine ray` costs beside `prepare` in one process, on this machine.

Both encode the same films by the same VAE, in alternating rounds. Two numbers of films separate the
seconds a clip from those of the start (processes, imports, models, one program). The cluster is a
local one that starts before, in a network namespace with loopback alone where that is possible,
because Ray listens on all addresses. Writes benchmarks/results/engine.md.

    unshare -rn sh -c 'ip link set lo up && python benchmarks/engine.py [--rounds 2]'
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import flax.nnx as nnx
import numpy as np
from setting import setting

from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.prepare import cluster, engine
from easyanimate_jax.prepare.prepare import make_sets, plan_sets

RESULT = Path(__file__).parent / "results" / "engine.md"
FRAMES, SIDE, SHARD = 17, 128, 12
CLIPS = LatentSet("clips", Budget(320, (320,), (SIDE,), frames=FRAMES))
WEIGHTS = {"vae": "v", "text": "t"}


class Texts:
    """States without an encoder: only the clips count here."""

    def encode(self, prompts):
        return (np.zeros((len(prompts), 3, 4), np.float32),)

    def is_cut(self, prompt):
        return False


def load() -> tuple[CausalVAE, Texts]:
    """Return a VAE with random weights, and the texts."""
    config = VAEConfig(channels=(32, 64, 64), layers=1, groups=8, unshuffle=4, dtype="float32")
    return CausalVAE(config, rngs=nnx.Rngs(0)), Texts()


def main() -> None:
    """Measure both, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--films", type=int, nargs=2, default=(24, 72))
    p.add_argument("--rounds", type=int, default=2)
    a = p.parse_args()
    folder, seconds = Path(tempfile.mkdtemp()), {}
    try:
        sources = [films(folder / f"films{count}", count) for count in a.films]
        with cluster.connected():
            for turn in range(a.rounds + 1):  # the first one fills the compilation cache
                for name in ("process", "ray"):
                    spent = [measure(name, source, folder / "out") for source in sources]
                    print(turn, name, spent, flush=True)
                    seconds.setdefault(name, []).extend([spent] * (turn > 0))
        same = files(folder / "out" / "ray") == files(folder / "out" / "process")
    finally:
        shutil.rmtree(folder)
    RESULT.write_text(table(a, seconds, same))
    print(RESULT.read_text())


def films(folder: Path, count: int) -> Path:
    """Write films of moving noise with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = rng.integers(20, 255, (SIDE // 8, SIDE // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for number in range(count):
        frames = [np.roll(noise, (number, 3 * i), (0, 1)) for i in range(FRAMES)]
        media.write_video(folder / f"{number}.mp4", np.stack(frames))
        (folder / f"{number}.txt").write_text(f"film {number}")
    return folder


def measure(name: str, source: Path, out: Path) -> float:
    """Return the seconds of making all shards of a source, which is planned before."""
    shutil.rmtree(out / name, ignore_errors=True)
    plan_sets(source, out / name, [CLIPS], 0, weights=WEIGHTS, shard_size=SHARD)
    began = time.perf_counter()
    if name == "ray":
        assert engine.make_sets(out / name, [CLIPS], load, (), 0, weights=WEIGHTS)
    else:
        assert make_sets(out / name, [CLIPS], *load(), (), 0, weights=WEIGHTS)
    return time.perf_counter() - began


def files(folder: Path) -> dict[str, bytes]:
    """Return the shards of a prepared folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.shard")}


def table(a, seconds: dict, same: bool) -> str:
    """Return the result as Markdown."""
    few, many = a.films
    best = {name: np.min(spent, axis=0) for name, spent in seconds.items()}
    clip = {name: (b[1] - b[0]) / (many - few) for name, b in best.items()}
    lines = [
        "# What an engine costs",
        "",
        setting(),
        "",
        f"Clips of {FRAMES} x {SIDE} x {SIDE}, {SHARD} a shard, in one process and on a local Ray "
        f"cluster; the best of {a.rounds} alternating rounds. The start is what is left of "
        f"{few} clips without their seconds a clip. The shards are "
        f"{'equal to the byte' if same else 'NOT EQUAL'}.",
        "",
        f"| engine | {few} clips, s | {many} clips, s | a clip, s | start, s |",
        "|---|---|---|---|---|",
    ]
    for name, b in best.items():
        start = b[0] - few * clip[name]
        lines.append(f"| {name} | {b[0]:.1f} | {b[1]:.1f} | {clip[name]:.3f} | {start:.1f} |")
    more = clip["ray"] / clip["process"] - 1
    return "\n".join([*lines, "", f"Ray takes {more:+.1%} of the seconds a clip.", ""])


if __name__ == "__main__":
    main()
