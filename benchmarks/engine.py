"""Measure what `prepare --engine ray` costs beside `prepare` in one process, on this machine.

Both encode the same films by the same VAE, in alternating rounds. Two numbers of films separate the
seconds a clip from those of the start (processes, imports, models, one program). The cluster is a
local one that starts before, in a network namespace with loopback alone where that is possible,
because Ray listens on all addresses. Writes benchmarks/results/engine.md.

    unshare -rn sh -c 'ip link set lo up && python benchmarks/engine.py'
"""

import argparse
import contextlib
import os
import shutil
import tempfile
import threading
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
    config = VAEConfig(channels=(64, 128, 128), layers=1, groups=8, unshuffle=4, dtype="float32")
    return CausalVAE(config, rngs=nnx.Rngs(0)), Texts()


def main() -> None:
    """Measure both, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--films", type=int, nargs=2, default=(24, 120))
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    folder, seconds = Path(tempfile.mkdtemp()), {}
    try:
        sources = [films(folder / f"films{count}", count) for count in a.films]
        with cluster.connected():
            for turn in range(a.rounds + 1):  # the first one fills the compilation cache
                for name in ("process", "ray"):
                    spent = [measure(name, source, folder / "out") for source in sources]
                    print(turn, name, *spent, flush=True)
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


def measure(name: str, source: Path, out: Path) -> np.ndarray:
    """Return the wall and CPU seconds of making all shards of a source, planned before."""
    shutil.rmtree(out / name, ignore_errors=True)
    plan_sets(source, out / name, [CLIPS], 0, weights=WEIGHTS, shard_size=SHARD)
    with Processors() as processors:
        began = time.perf_counter()
        if name == "ray":
            assert engine.make_sets(out / name, [CLIPS], load, (), 0, weights=WEIGHTS)
        else:
            assert make_sets(out / name, [CLIPS], *load(), (), 0, weights=WEIGHTS)
        wall = time.perf_counter() - began
    return np.array([wall, processors.seconds])


class Processors:
    """Counts the CPU seconds of this process and all below it, also of those that end meanwhile.

    A thread looks at the system's counts, because Ray does not wait for processes that it ends.
    """

    def __enter__(self) -> "Processors":
        self.first, self.last, self.ended = self._ticks(), {}, threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        self.last |= self._ticks()
        ticks = sum(count - self.first.get(pid, 0) for pid, count in self.last.items())
        self.seconds = ticks / os.sysconf("SC_CLK_TCK")

    def _look(self) -> None:
        while not self.ended.wait(0.1):
            self.last |= self._ticks()

    def _ticks(self) -> dict[int, int]:
        parents, ticks = {}, {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                parents[int(path.parent.name)] = int(fields[1])
                ticks[int(path.parent.name)] = int(fields[11]) + int(fields[12])

        def is_mine(pid: int) -> bool:
            while pid and pid != os.getpid():
                pid = parents.get(pid, 0)
            return bool(pid)

        return {pid: count for pid, count in ticks.items() if is_mine(pid)}


def files(folder: Path) -> dict[str, bytes]:
    """Return the shards of a prepared folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.shard")}


def table(a, seconds: dict, same: bool) -> str:
    """Return the result as Markdown."""
    few, many = a.films
    lines = [
        "# What an engine costs",
        "",
        setting(),
        "",
        f"Clips of {FRAMES} x {SIDE} x {SIDE}, {SHARD} a shard, in one process and on a local Ray "
        f"cluster. CPU seconds are those of all processes, Ray's own ones included; other work on "
        f"the machine affects them less than wall time. The seconds a clip are the difference of "
        f"both numbers of clips, and the start is the rest. Median of {a.rounds} alternating "
        f"rounds, in brackets the least. The shards are "
        f"{'equal to the byte' if same else 'NOT EQUAL'}.",
        "",
        f"| engine | seconds | {few} clips | {many} clips | a clip | start |",
        "|---|---|---|---|---|---|",
    ]
    middle = {}
    for name, spent in seconds.items():
        for i, kind in enumerate(("wall", "CPU")):
            less, more = np.array(spent)[:, :, i].T
            clip = (more - less) / (many - few)
            middle[name, kind] = np.median(clip)
            cells = [f"{np.median(x):.3g} ({x.min():.3g})" for x in (less, more, clip)]
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} | {cost(less, few, clip)} |")
    more = {kind: middle["ray", kind] / middle["process", kind] - 1 for kind in ("wall", "CPU")}
    told = f"By the medians, a clip takes {more['wall']:+.1%} wall and {more['CPU']:+.1%} CPU time."
    return "\n".join([*lines, "", told, ""])


def cost(less: np.ndarray, few: int, clip: np.ndarray) -> str:
    """Return the median of the seconds that are not those of clips."""
    return f"{np.median(less - few * clip):.1f}"


if __name__ == "__main__":
    main()
