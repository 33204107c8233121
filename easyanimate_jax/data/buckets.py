"""Token arithmetic: aspect ratios, frames per resolution, and the token lengths of clips.

After the VAE no code depends on the resolution: a bucket is a token length, with one compiled
program. A stage has a nominal `Budget` ("3328", "13312", ...). Within it a clip becomes a few large
frames or many small ones. `fit_lengths` and `fit_budget` choose a stage's lengths offline, from its
clips.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from easyanimate_jax.facts import CELL, TIME_FACTOR, check_fields

MAX_SIDE = 1344  # pixels a side of a generated video; released models were trained for 128 to 1344
MAX_UPSCALE = 1.25  # the reference's rule for small sources (spec 8.4)
GOOD_FILL = 0.97  # a random draw selects among candidates this full, so that resolutions mix
MAX_STRETCH = 1.15  # maximum aspect error of grids that are not in the table
NUM_LENGTHS, MULTIPLE = 6, 256  # maximum number of a stage's lengths; each is a multiple of 256
MIN_SHARE = 1e-3  # minimum share of clips per length: the plan gives each length 1 step in 1000
FIT_ROUNDS = 5  # rounds of choosing shapes for lengths, then lengths for shapes
CHUNK = 2**15  # sizes compared at a time

# Spec 8.3: height / width as the reference rounds it -> height, width at base size 512.
ASPECTS = {
    0.25: (256, 1024), 0.26: (256, 992), 0.27: (256, 960), 0.28: (256, 928), 0.32: (288, 896),
    0.33: (288, 864), 0.35: (288, 832), 0.40: (320, 800), 0.42: (320, 768), 0.48: (352, 736),
    0.50: (352, 704), 0.52: (352, 672), 0.57: (384, 672), 0.60: (384, 640), 0.68: (416, 608),
    0.72: (416, 576), 0.78: (448, 576), 0.82: (448, 544), 0.88: (480, 544), 0.94: (480, 512),
    1.00: (512, 512), 1.07: (512, 480), 1.13: (544, 480), 1.21: (544, 448), 1.29: (576, 448),
    1.38: (576, 416), 1.46: (608, 416), 1.67: (640, 384), 1.75: (672, 384), 2.00: (704, 352),
    2.09: (736, 352), 2.40: (768, 320), 2.50: (800, 320), 2.89: (832, 288), 3.00: (864, 288),
    3.11: (896, 288), 3.62: (928, 256), 3.75: (960, 256), 3.88: (992, 256), 4.00: (1024, 256),
}  # fmt: skip


def latent_frames(frames: int) -> int:
    """Return the number of latent frames. Raises ValueError unless `frames` is 4n+1."""
    if frames < 1 or frames % TIME_FACTOR != 1:
        raise ValueError(
            f"{frames} frames: the count must be 4n+1 (frame 0, then fours); "
            f"use {whole_frames(max(frames, 1))}"
        )
    return (frames - 1) // TIME_FACTOR + 1


def whole_frames(frames: int) -> int:
    """Return the largest 4n+1 that is not above `frames`."""
    return (frames - 1) // TIME_FACTOR * TIME_FACTOR + 1


def grid_of(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return (latent frames, token rows, token columns). Raises ValueError for other sizes."""
    if height < CELL or width < CELL or height % CELL or width % CELL:
        raise ValueError(f"{height}x{width}: sides must be multiples of {CELL} pixels")
    return latent_frames(frames), height // CELL, width // CELL


def check_size(frames: int, height: int, width: int) -> None:
    """Raise ValueError, naming the nearest valid value, for a size that cannot be generated."""
    for name, side in (("height", height), ("width", width)):
        if side % CELL or not CELL <= side <= MAX_SIDE:
            low = min(max(side // CELL * CELL, CELL), MAX_SIDE)
            near = sorted({low, min(low + CELL, MAX_SIDE)} if low <= side else {low})
            raise ValueError(
                f"{name} {side}: sides are multiples of {CELL} from {CELL} to {MAX_SIDE} pixels; "
                f"use {' or '.join(map(str, near))}"
            )
    if frames < 1 or frames % TIME_FACTOR != 1:
        low = whole_frames(frames)
        near = f"{low} or {low + TIME_FACTOR}" if low >= 1 else "1"
        raise ValueError(f"{frames} frames: the count is 4n+1 (frame 0, then fours); use {near}")


def num_tokens(frames: int, height: int, width: int) -> int:
    """Return the number of video tokens. Raises ValueError for sizes that are not whole tokens."""
    return math.prod(grid_of(frames, height, width))


def aspect_sizes(size: int) -> dict[float, tuple[int, int]]:
    """Return key -> (height, width) of about `size` x `size` pixels, floored to whole tokens."""
    return {
        key: tuple(side * size // 512 // CELL * CELL for side in sides)
        for key, sides in ASPECTS.items()
    }


def frames_for_budget_a(budget: int, pixels: int, most: int = 49) -> int:
    """Return the frames that the reference's collate step takes; they may exceed the budget.

    `pixels` are those of one frame.
    """
    return min(budget // pixels, most) // TIME_FACTOR * TIME_FACTOR + 1


def frames_for_budget_b(budget: int, pixels: int, most: int = 49) -> int:
    """Return the frames of the documented table (49 / 21 / 9 at 512 / 768 / 1024 for "13312")."""
    return max(whole_frames(min(budget // pixels, most)), 1)


class Shape(NamedTuple):
    """The size of an encoded clip: pixel frames, then height and width in pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Budget:
    """A nominal token count and the clips admitted under it."""

    tokens: int
    """Nominal tokens of a clip: 3,328, 13,312 and 53,248 in the report (spec 9.4)."""

    lengths: tuple[int, ...]
    """Token lengths, ascending; one program is compiled for each, and the last is the capacity."""

    sizes: tuple[int, ...]
    """Resolutions, as the side in pixels of a square of equal area."""

    frames: int = 49
    """Maximum frames of a clip, 4n+1; the default is that of the released scripts (spec 9.1)."""

    min_fill: float = 0.8
    """Share of a length that a clip must fill; clips that fill less are left out of this set."""

    def __post_init__(self):
        check_fields(
            self,
            tokens="[1, inf)",
            lengths="[1, inf)",
            sizes=f"[{CELL}, inf)",
            frames="[1, inf)",
            min_fill="[0, 1]",
        )
        latent_frames(self.frames)  # refuses a count that is not 4n+1
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"{self}: lengths must be one or more, ascending")
        if not self.sizes:
            raise ValueError(f"{self}: sizes must be one or more")

    @property
    def pixels(self) -> int:
        """Return pixels x frames of the budget: 49 * 512 * 512 for 13312."""
        return self.frames * CELL**2 * self.tokens // latent_frames(self.frames)

    def length_of(self, shape: Shape) -> int:
        """Return the smallest compiled length that holds the clip."""
        tokens = num_tokens(*shape)
        return next(length for length in self.lengths if length >= tokens)

    def fill(self, shape: Shape) -> float:
        """Return the share of its compiled length that the clip fills."""
        return num_tokens(*shape) / self.length_of(shape)

    def candidates(self, frames: int, height: int, width: int) -> list[Shape]:
        """Return the possible shapes of a source clip: per size, the table's nearest aspect."""
        return self._shapes(self._table(height, width), frames, height, width)

    def choose(self, frames: int, height: int, width: int, clip: str) -> Shape | None:
        """Return the shape that fills a compiled length best; None if none reaches `min_fill`.

        Small sizes floored to whole tokens distort the picture and leave lengths unfilled; then
        grids that are not in the table compete too. If several shapes fill well, the clip's name
        selects one. A video keeps at least five frames, because its caption describes motion.
        """
        shapes, _ = self.admissible(frames, height, width)
        return shapes[name_word(clip) % len(shapes)] if shapes else None

    def admissible(self, frames: int, height: int, width: int) -> tuple[tuple[Shape, ...], str]:
        """Return the shapes that `choose` draws from, and the reason if there are none."""
        return _admissible(self, min(whole_frames(frames), self.most_frames), height, width)

    @property
    def most_frames(self) -> int:
        """Return the frame count above which all clips are treated alike."""
        return max(self.frames, TIME_FACTOR + 1)

    def describe(self) -> list[tuple[Shape, int, int]]:
        """Return (shape, tokens, compiled length) of every resolution, for long enough clips."""
        shapes = {
            shape
            for size in self.sizes
            for height, width in aspect_sizes(size).values()
            for shape in self._shapes([(height, width)], self.frames, height, width)
        }
        ordered = sorted(shapes, key=lambda s: (s.height * s.width, s.height))
        return [(shape, num_tokens(*shape), self.length_of(shape)) for shape in ordered]

    @property
    def capacity(self) -> int:
        """Return the tokens of the table's largest sample, rounded up: the required last length."""
        largest = 0
        for size in self.sizes:
            for height, width in aspect_sizes(size).values():
                frames = frames_for_budget_b(self.pixels, height * width, self.frames)
                largest = max(largest, num_tokens(frames, height, width))
        return -(-largest // MULTIPLE) * MULTIPLE

    def _table(self, height: int, width: int) -> list[tuple[int, int]]:
        key = min(ASPECTS, key=lambda key: abs(key - height / width))
        return list(dict.fromkeys(aspect_sizes(size)[key] for size in self.sizes))

    def _shapes(self, sides, frames: int, height: int, width: int) -> list[Shape]:
        shapes = []
        for h, w in sides:
            in_capacity = self.lengths[-1] // (h * w // CELL**2)
            if not in_capacity or max(h / height, w / width) > MAX_UPSCALE:
                continue
            by_budget = frames_for_budget_b(self.pixels, h * w, self.frames)
            most = min(by_budget, (in_capacity - 1) * TIME_FACTOR + 1, whole_frames(frames))
            shapes.append(Shape(most, h, w))
        return shapes


def _stretch(h: int, w: int, height: int, width: int) -> float:
    """Return the ratio of the aspects of h x w and height x width, at least 1; 1 is equal."""
    ratio = h * width / (w * height)
    return max(ratio, 1 / ratio)


def name_word(clip: str) -> int:
    """Return a 64-bit hash of a clip's name; it draws the clip's shape."""
    return int.from_bytes(hashlib.blake2b(clip.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=2**20)  # a million clips have some thousands of sizes and durations
def _admissible(
    budget: Budget, frames: int, height: int, width: int
) -> tuple[tuple[Shape, ...], str]:
    table = budget._table(height, width)
    true = [sides for sides in table if _stretch(*sides, height, width) <= MAX_STRETCH]
    shapes = budget._shapes(true or table, frames, height, width)
    if not any(budget.fill(shape) >= GOOD_FILL for shape in shapes):
        beside = {
            (h + dh, w + dw)
            for h, w in table
            for dh in (-CELL, 0, CELL)
            for dw in (-CELL, 0, CELL)
            if min(h + dh, w + dw) > 0 and _stretch(h + dh, w + dw, height, width) <= MAX_STRETCH
        }
        shapes += budget._shapes(sorted(beside - set(true)), frames, height, width)
    if not shapes:
        return (), f"is smaller than every size of the stage, even enlarged by {MAX_UPSCALE}"
    if frames > TIME_FACTOR:
        shapes = [shape for shape in shapes if shape.frames > 1]
    good = tuple(shape for shape in shapes if budget.fill(shape) >= GOOD_FILL)
    best = max(shapes, key=budget.fill, default=None)
    if good or (best and budget.fill(best) >= budget.min_fill):
        return good or (best,), ""
    return (), f"fills no token length to {budget.min_fill} (min_fill)"


class Clips(NamedTuple):
    """Source clips as columns, one row each."""

    frames: Int[np.ndarray, "R"]  # at the training rate
    height: Int[np.ndarray, "R"]
    width: Int[np.ndarray, "R"]
    word: UInt64[np.ndarray, "R"]  # name_word of each


class Choice(NamedTuple):
    """The shapes of clips: each clip's row of `shapes`, or -1 and its row of `reasons`."""

    shapes: list[Shape]
    shape: Int[np.ndarray, "R"]
    reasons: list[str]
    reason: Int[np.ndarray, "R"]


def choose_all(budget: Budget, clips: Clips) -> Choice:
    """Return the result of `Budget.choose` for many clips.

    Equal sizes and durations are looked up once.
    """
    classes, member = _classes(budget, clips)
    shapes, reasons, table, size, why = {}, {"": 0}, [], [], []
    for source in classes:
        admissible, reason = budget.admissible(*source)
        table.append([shapes.setdefault(shape, len(shapes)) for shape in admissible])
        size.append(len(admissible))
        why.append(reasons.setdefault(reason, len(reasons)))
    first = np.cumsum([0, *size[:-1]])
    flat = np.array([shape for row in table for shape in row] + [-1], np.int32)
    size = np.array(size)[member]
    draw = (clips.word % np.maximum(size, 1).astype(np.uint64)).astype(np.int64)
    place = np.where(size > 0, first[member] + draw, -1)
    return Choice(list(shapes), flat[place], list(reasons), np.array(why, np.int32)[member])


def fit_lengths(
    tokens: Int[np.ndarray, "V"], counts: np.ndarray, most: int = NUM_LENGTHS
) -> tuple[int, ...]:
    """Return at most `most` lengths that need the least padding; exact, by dynamic programming.

    `counts` samples have `tokens` tokens. Lengths are multiples of MULTIPLE, the largest sample
    fits the last length, and each length holds at least MIN_SHARE of the samples.
    """
    ends = np.unique(-(-tokens // MULTIPLE) * MULTIPLE)
    place = np.searchsorted(ends, tokens)
    below = np.concatenate([[0], np.cumsum(np.bincount(place, counts, len(ends)))])
    least = MIN_SHARE * below[-1]
    # cost[i, j]: computed tokens of the samples above ends[i - 1] and up to ends[j - 1]
    held = below[None, :] - below[:, None]
    cost = np.where(held >= least, held * np.concatenate([[0], ends])[None, :], np.inf)
    total, cut = np.where(np.arange(len(below)) == 0, 0.0, np.inf), []
    best, chosen = np.inf, ()
    for number in range(1, most + 1):
        through = total[:, None] + cost
        cut.append(through.argmin(axis=0))
        total = through.min(axis=0)
        if total[-1] < best:
            best, j, chosen = total[-1], len(ends), ()
            for step in reversed(cut[:number]):
                chosen, j = (int(ends[j - 1]), *chosen), step[j]
    return chosen


def fit_budget(budget: Budget, clips: Clips, most: int = NUM_LENGTHS) -> Budget:
    """Return `budget` with the lengths that need the least padding for `clips`.

    Each round chooses shapes that fill the lengths, then lengths that hold the shapes; the best
    round is returned. The lengths of the given `budget` are ignored. Raises ValueError if no clip
    fits.
    """
    classes, member = _classes(budget, clips)
    counts = np.bincount(member, minlength=len(classes))
    trial = replace(budget, lengths=(budget.capacity,), min_fill=0.0)
    best, best_share = None, 0.0
    for _ in range(FIT_ROUNDS):
        tokens, weights = [], []
        for source, count in zip(classes, counts, strict=True):
            shapes, _ = trial.admissible(*source)
            tokens += [num_tokens(*shape) for shape in shapes]
            weights += [count / len(shapes) for _ in shapes]
        if not tokens:
            raise ValueError(
                f"none of {len(counts)} kinds of clips fits {budget}; add smaller sizes, or larger "
                f"clips"
            )
        tokens, weights = np.array(tokens), np.array(weights)
        lengths = fit_lengths(tokens, weights, most)
        padded = np.array(lengths)[np.searchsorted(lengths, tokens)]
        share = np.dot(tokens, weights) / np.dot(padded, weights)
        if share > best_share:
            best, best_share = replace(budget, lengths=lengths), share
        if lengths == trial.lengths:
            break
        trial = replace(trial, lengths=lengths)
    return best


def _classes(budget: Budget, clips: Clips) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """Return the distinct sources (frames, height, width), and the source of each clip.

    Two clips have the same source if all comparisons in `admissible` give equal results for them.
    """
    sides, of_sides = np.unique(
        (clips.height.astype(np.int64) << 32) | clips.width, return_inverse=True
    )
    height, width = sides >> 32, sides & (2**32 - 1)
    parts = [slice(i, i + CHUNK) for i in range(0, len(sides), CHUNK)]
    patterns = np.concatenate([_pattern(budget, height[part], width[part]) for part in parts])
    _, first, pattern = np.unique(patterns, return_index=True, return_inverse=True)
    most = budget.most_frames
    frames = np.minimum((clips.frames - 1) // TIME_FACTOR * TIME_FACTOR + 1, most)
    keys, member = np.unique(
        pattern[of_sides].astype(np.int64) * (most + 1) + frames, return_inverse=True
    )
    like, frames = np.divmod(keys, most + 1)
    columns = frames, height[first[like]], width[first[like]]
    return list(zip(*(column.tolist() for column in columns), strict=True)), member


def _pattern(budget: Budget, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Return a byte pattern per source size: its aspect, and its unusable grids.

    A grid is unusable if it is too large for the source or too stretched.
    """
    keys = np.array(list(ASPECTS))
    entry = np.abs(keys - (height / width)[:, None]).argmin(axis=1)
    tables = np.array([list(aspect_sizes(size).values()) for size in budget.sizes])
    near = np.array([(dh, dw) for dh in (-CELL, 0, CELL) for dw in (-CELL, 0, CELL)])
    grids = (tables.transpose(1, 0, 2)[entry][:, :, None] + near).reshape(len(entry), -1, 2)
    h, w = np.maximum(grids, 1).transpose(2, 0, 1)
    height, width = height[:, None], width[:, None]
    large = np.maximum(h / height, w / width) > MAX_UPSCALE
    ratio = h * width / (w * height)
    stretched = np.maximum(ratio, 1 / ratio) > MAX_STRETCH
    bits = np.packbits(np.concatenate([large, stretched], axis=1), axis=1)
    row = np.concatenate([entry[:, None].astype(np.uint8), bits], axis=1)
    return np.ascontiguousarray(row).view(f"V{row.shape[1]}")[:, 0]
