"""Compare the token efficiency of our plan with the reference's batches, on a million clips.

The index is synthetic; the result states its mix. Our side fits lengths to the index, chooses
shapes that fill them, and uses the steps of the plan. In the reference (spec 8.3 to 8.5) every rank
fills batches of one aspect and type, draws a size for each, and cuts it to its shortest clip. It
pads nothing, so it loses the frames that it cuts and the wait for the largest rank. Writes
benchmarks/results/token_efficiency.md.

    python benchmarks/token_efficiency.py [--clips 1000000]
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from setting import setting

from easyanimate_jax import Budget
from easyanimate_jax.data import buckets
from easyanimate_jax.data.buckets import Clips, choose_all, fit_budget, num_tokens
from easyanimate_jax.data.plan.plan import CYCLE, Plan

RESULT = Path(__file__).parent / "results" / "token_efficiency.md"
RANKS = 128
MOST_STEPS = 2000  # simulated steps of the reference
BLOCKS, WIDTH, TEXT = 48, 3072, 333  # the 12B; tokens of BERT and T5

# (height, width, share of the videos); the others have random sizes
VIDEO_SIZES = (
    (1080, 1920, 0.38), (720, 1280, 0.21), (2160, 3840, 0.07), (1920, 1080, 0.10),
    (1280, 720, 0.04), (480, 854, 0.05), (360, 640, 0.03), (804, 1920, 0.03), (1080, 1440, 0.02),
    (720, 960, 0.02), (1080, 1080, 0.02),
)  # fmt: skip
IMAGE_ASPECTS = ((2 / 3, 0.35), (3 / 2, 0.15), (3 / 4, 0.2), (4 / 3, 0.05), (1.0, 0.15))
IMAGE_SHARE = 0.2
RATES = ((24, 0.35), (25, 0.2), (30, 0.35), (60, 0.1))
MIX = """The mix. 20 % images: long side 1024 to 3000 pixels, height / width 2/3 (35 %), 3/2 (15 %),
3/4 (20 %), 4/3 (5 %), 1 (15 %), anything from 1/2 to 2 (10 %). 80 % videos: 1920x1080 (38 %),
1280x720 (21 %), 1080x1920 (10 %), 3840x2160 (7 %), 854x480 (5 %), 720x1280 (4 %), 640x360 (3 %),
1920x804 (3 %), 1440x1080, 960x720, 1080x1080 (2 % each), cut to any size (3 %: short side 360 to
1080, aspect 1/2 to 2.4); 24 (35 %), 25 (20 %), 30 (35 %), 60 frames a second (10 %); 25 % are
pieces of exactly 10 s, 4 % last 0.4 to 3 s, the others 3 to 10 s, log-normal around 5 s. Stages
13312 and 53248 take sources of at least 720 pixels (spec 9.4)."""

STAGES = (  # budget, smallest source side, global batch, the reference's image size
    (Budget(3328, (3584,), tuple(range(256, 897, 128))), 0, 1536, 1024, 256),
    (Budget(13312, (13824,), tuple(range(256, 1025, 128))), 720, 768, 1024, 512),
    (Budget(53248, (53248,), tuple(range(256, 1281, 128))), 720, 256, 1280, 1024),
)


class Index:
    """The sizes, source frames and frame rates of `number` clips of the stated mix."""

    def __init__(self, number: int):
        rng = np.random.default_rng(0)
        self.image = rng.random(number) < IMAGE_SHARE
        height, width = (np.zeros(number, np.int64) for _ in range(2))
        pick = np.searchsorted(np.cumsum([s for *_, s in VIDEO_SIZES]), rng.random(number))
        for i, (h, w, _) in enumerate(VIDEO_SIZES):
            height[pick == i], width[pick == i] = h, w
        free = pick == len(VIDEO_SIZES)
        self._free(rng, free, height, width, rng.integers(360, 1081, number), (0.5, 2.4))
        ratio = np.exp(rng.uniform(np.log(0.5), np.log(2), number))
        which = np.searchsorted(np.cumsum([s for _, s in IMAGE_ASPECTS]), rng.random(number))
        for i, (aspect, _) in enumerate(IMAGE_ASPECTS):
            ratio[which == i] = aspect
        side = rng.integers(1024, 3001, number)
        tall, wide = np.minimum(1, ratio) * side, np.minimum(1, 1 / ratio) * side
        height[self.image], width[self.image] = tall[self.image], wide[self.image]
        self.height, self.width = height, width
        seconds = np.clip(rng.lognormal(np.log(5), 0.45, number), 3, 10)
        kind = rng.random(number)
        seconds[kind < 0.25] = 10
        short = kind > 0.96
        seconds[short] = rng.uniform(0.4, 3, short.sum())
        self.fps = np.array([r for r, _ in RATES])[
            np.searchsorted(np.cumsum([s for _, s in RATES])[:-1], rng.random(number), "right")
        ]
        self.source_frames = np.where(self.image, 1, np.maximum(1, seconds * self.fps)).astype(int)

    @staticmethod
    def _free(rng, which, height, width, short, aspects):
        aspect = np.exp(rng.uniform(*np.log(aspects), len(which)))
        tall, wide = short * np.maximum(1, aspect), short * np.maximum(1, 1 / aspect)
        height[which], width[which] = tall[which], wide[which]


def ours(index: Index, budget: Budget, fits: np.ndarray, batch: int) -> dict:
    """Fit, choose and plan; return the efficiency of a whole cycle of the plan's steps."""
    began = time.perf_counter()
    stride = np.maximum(1, np.round(index.fps / 8)).astype(int)
    frames = np.where(index.image, 1, (index.source_frames - 1) // stride + 1)
    rng = np.random.default_rng(1)
    words = rng.integers(2**63, size=len(frames)).astype(np.uint64)
    clips = Clips(frames[fits], index.height[fits], index.width[fits], words[fits])
    budget = fit_budget(budget, clips)
    choice = choose_all(budget, clips)
    used = choice.shape >= 0
    table = np.array([num_tokens(*shape) for shape in choice.shapes])
    tokens = table[choice.shape[used]]
    plan = Plan(
        {
            "clip": np.arange(used.sum()).astype("S"),
            "kind": np.where(index.image[fits][used], "image", "video"),
            "tokens": tokens.astype(np.int32),
            "source_height": clips.height[used],
            "source_width": clips.width[used],
        },
        lengths=budget.lengths,
        batch_size=batch,
        seed=0,
        name="bench",
    )
    seconds = time.perf_counter() - began
    computed = real = 0
    for step in range(CYCLE):
        length, ids = plan(step)
        computed, real = computed + length * batch, real + int(tokens[ids].sum())
    taken = np.array([s.frames for s in choice.shapes])[choice.shape[used]]
    whole = np.minimum(clips.frames[used], budget.frames)
    whole = np.where(whole > 1, (whole - 1) // 4 * 4 + 1, 1)
    reasons = {
        reason: int(np.sum(choice.reason[~used] == i)) for i, reason in enumerate(choice.reasons)
    }
    return {
        "efficiency": real / computed,
        "shapes": len(plan.lengths),
        "lengths": plan.lengths,
        "dropped": int(np.sum(~used)) / len(used),
        "reasons": {r: n for r, n in reasons.items() if n},
        "neighbour": 0.0,
        "budget": 1 - taken.sum() / whole.sum(),
        "wait": 1.0,  # every rank runs the same program on as many rows
        "seconds": seconds,
    }


def reference(index, budget, fits, local, image_size, token_size, same_length) -> dict:
    """Simulate spec 8.3 to 8.5 per rank; `same_length` is its keep_all_node_same_token_length."""
    rng, shared = np.random.default_rng(2), np.random.default_rng(43)
    height, width, image = index.height[fits], index.width[fits], index.image[fits]
    length = index.source_frames[fits]
    frames = np.where(image, 1, np.minimum(49, (0.8 * length).astype(int) // 3))
    keys = np.array(list(buckets.ASPECTS))
    aspect = np.abs(keys[None] - (height / width)[:, None]).argmin(axis=1)
    readable = frames > 0
    order = rng.permutation(np.flatnonzero(readable))
    sizes = np.array(sorted({*range(256, image_size, 128), image_size}))
    tables = {int(s): list(buckets.aspect_sizes(int(s)).values()) for s in sizes}
    ratios = (*next(r for s, r in IMAGE_RATIOS if image_size >= s), 4.0)
    chance = np.array([0.75] + [0.25 / (len(ratios) - 1)] * (len(ratios) - 1))

    def batch(members: np.ndarray) -> tuple[tuple, int, int]:
        """(rows, frames, height, width), frames after the table, frames decoded."""
        key, decoded = aspect[members[0]], frames[members]
        if image[members[0]]:
            size = int(image_size / rng.choice(ratios, p=chance))
            h, w = list(buckets.aspect_sizes(size).values())[key]
            count, allowed = 1, np.ones(len(members), int)
        else:
            mean = ((height + width)[members] / 2).min()
            admitted = sizes[sizes < 1.25 * mean]
            size = int(rng.choice(admitted if len(admitted) else sizes))
            h, w = tables[size][key]
            table = buckets.frames_for_budget_a(budget.pixels, size * size)
            allowed = np.minimum(table, np.maximum((decoded - 1) // 4 * 4 + 1, 1))
            count = int(allowed.min())
        rows, pixels = len(members), count * h * w
        rows *= 4 if budget.pixels // 16 >= pixels else 2 if budget.pixels // 4 >= pixels else 1
        return (rows, count, h, w), int(allowed.sum()), count * len(members)

    ranks = [queued(order[rank::RANKS], image, aspect, local) for rank in range(RANKS)]
    steps = min(MOST_STEPS, min(len(batches) for batches in ranks))
    shapes, allowed, kept, means, largest = set(), 0, 0, 0.0, 0.0
    for step in range(steps):
        draw = int(shared.choice([*range(256, token_size, 128), token_size]))
        work = np.zeros(RANKS)
        for rank in range(RANKS):
            shape, before, after = batch(ranks[rank][step])
            if same_length:
                rows, count, h, w = shape
                cut = min(count, buckets.frames_for_budget_b(49 * draw * draw, h * w))
                after, shape = after // count * cut, (rows, cut, h, w)
            allowed, kept = allowed + before, kept + after
            shapes.add(shape)
            work[rank] = shape[0] * flops(num_tokens(*shape[1:]))
        means, largest = means + work.mean(), largest + work.max()
    return {
        "efficiency": 1.0,
        "shapes": len(shapes),
        "dropped": 1 - readable.mean(),
        "neighbour": 1 - kept / allowed,
        "wait": means / largest,
        "steps": steps,
    }


def queued(clips: np.ndarray, image: np.ndarray, aspect: np.ndarray, size: int) -> list:
    """Return a rank's batches of `size` clips in order, queued by type and aspect (spec 8.3)."""
    queues, batches = defaultdict(list), []
    for clip in clips:
        queue = queues[(image[clip], aspect[clip])]
        queue.append(clip)
        if len(queue) == size:
            batches.append(np.array(queue))
            queue.clear()
    return batches


IMAGE_RATIOS = (
    (1536, (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)),
    (1024, (1.0, 1.25, 1.5, 2.0)),
    (768, (1.0, 1.25, 1.5)),
    (512, (1.0,)),
)


def flops(tokens: int) -> float:
    """Return the forward FLOPs of one sample: projections and MLPs of both streams, attention."""
    joint = tokens + TEXT
    return BLOCKS * (24.0 * WIDTH**2 * joint + 4.0 * WIDTH * joint**2)


def main() -> None:
    """Compare both sides at three budgets, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1_000_000)
    number = parser.parse_args().clips
    index = Index(number)
    rows, notes = [], []
    for budget, side, batch, image_size, token_size in STAGES:
        fits = np.minimum(index.height, index.width) >= side
        found = {"ours": ours(index, budget, fits, batch)}
        name = f"{fits.sum():,} clips fit stage {budget.tokens}"
        notes.append(
            f"* {name}: lengths {', '.join(map(str, found['ours']['lengths']))}; left out: "
            f"{found['ours']['reasons'] or 'none'}; fit and plan took "
            f"{found['ours']['seconds']:.1f} s."
        )
        for same in (False, True):
            label = "reference, same token length on all ranks" if same else "reference"
            found[label] = reference(
                index, budget, fits, batch // RANKS, image_size, token_size, same
            )
        for label, f in found.items():
            rows.append(
                f"| {budget.tokens} | {label} | {f['efficiency']:.4f} | {f['wait']:.3f} "
                f"| **{f['efficiency'] * f['wait']:.3f}** | {f['shapes']:,} "
                f"| {100 * f['dropped']:.2f} % | {100 * f['neighbour']:.1f} % |"
            )
            print(rows[-1], flush=True)
        print(notes[-1], flush=True)
    RESULT.write_text(
        "\n".join(
            [
                "# Token efficiency of a million clips",
                "",
                setting(),
                "",
                MIX,
                "",
                f"{RANKS} ranks. Real / computed: tokens of clips over tokens the chips compute. "
                "Wait: mean over maximum of the ranks' FLOPs, per step. Their product is the share "
                "of the chips' time that real tokens get. The reference cuts a batch to its "
                "shortest clip, and with the same token length on all ranks once more; we cut no "
                "clip for a neighbour. Its shapes are (rows, frames, height, width); a compiler "
                "of static shapes would build one program for each.",
                "",
                "| budget | | real / computed | wait | real work | compiled shapes | dropped "
                "| frames cut for others |",
                "|---|---|---|---|---|---|---|---|",
                *rows,
                "",
                *notes,
                "",
            ]
        )
    )


if __name__ == "__main__":
    main()
