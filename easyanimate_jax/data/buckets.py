"""Token arithmetic: aspect ratios, frames per resolution, and the buckets clips are cut to.

After the VAE nothing knows resolution: a bucket is a token length, one compiled program. A stage
has a nominal `Budget` ("3328", "13312", ...); within it a clip may become few large frames or
many small ones. Here stand, once, the factors that the VAE and the transformer compress by.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

TIME_FACTOR, SPACE_FACTOR, PATCH = 4, 8, 2  # VAE time, VAE space, transformer patch
CELL = SPACE_FACTOR * PATCH  # pixels of a token's side

MAX_SIDE = 1344  # pixels of what is generated; released models were trained for 128 to 1344
MAX_UPSCALE = 1.25  # the reference's rule for small sources (spec 8.4)
GOOD_FILL = 0.97  # candidates this full compete by chance, so that resolutions mix
MAX_STRETCH = 1.15  # aspect error allowed to grids beside the table

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
    if frames < 1 or frames % TIME_FACTOR != 1:
        raise ValueError(
            f"{frames} frames: the count must be 4n+1 (frame 0, then fours); "
            f"use {whole_frames(max(frames, 1))}"
        )
    return (frames - 1) // TIME_FACTOR + 1


def whole_frames(frames: int) -> int:
    """The largest 4n+1 that is not above `frames`."""
    return (frames - 1) // TIME_FACTOR * TIME_FACTOR + 1


def grid_of(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, token rows, token columns."""
    if height < CELL or width < CELL or height % CELL or width % CELL:
        raise ValueError(f"{height}x{width}: sides must be multiples of {CELL} pixels")
    return latent_frames(frames), height // CELL, width // CELL


def check_size(frames: int, height: int, width: int) -> None:
    """Raises ValueError, naming the nearest possible, for a size that cannot be generated."""
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
    return math.prod(grid_of(frames, height, width))


def aspect_sizes(size: int) -> dict[float, tuple[int, int]]:
    """Key -> (height, width) of about `size` x `size` pixels, floored to whole tokens."""
    return {
        key: tuple(side * size // 512 // CELL * CELL for side in sides)
        for key, sides in ASPECTS.items()
    }


def frames_for_budget_a(budget: int, pixels: int, most: int = 49) -> int:
    """The reference's collate step; may exceed the budget. `pixels` of one frame."""
    return min(budget // pixels, most) // 4 * 4 + 1


def frames_for_budget_b(budget: int, pixels: int, most: int = 49) -> int:
    """The documented table (49 / 21 / 9 frames at 512 / 768 / 1024 for "13312")."""
    return max((min(budget // pixels, most) - 1) // 4 * 4 + 1, 1)


class Shape(NamedTuple):
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Budget:
    """A nominal token count and the clips admitted under it.

    `lengths` are the compiled token lengths, ascending; the last is the capacity. `sizes` are the
    square-equivalent resolutions. A clip that fills no length to `min_fill` is left to others.
    """

    tokens: int
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    frames: int = 49
    min_fill: float = 0.8

    def __post_init__(self):
        latent_frames(self.frames)
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"{self}: lengths must be one or more, ascending")
        if not self.sizes or any(size < CELL for size in self.sizes):
            raise ValueError(f"{self}: sizes must be one or more, each at least {CELL}")

    @property
    def pixels(self) -> int:
        """Pixels x frames of the budget: 49 * 512 * 512 for 13312."""
        return self.frames * CELL**2 * self.tokens // latent_frames(self.frames)

    def length_of(self, shape: Shape) -> int:
        """The smallest compiled length that holds the clip."""
        tokens = num_tokens(*shape)
        return next(length for length in self.lengths if length >= tokens)

    def fill(self, shape: Shape) -> float:
        return num_tokens(*shape) / self.length_of(shape)

    def candidates(self, frames: int, height: int, width: int) -> list[Shape]:
        """What a source clip may become: the table's entry of nearest aspect at each size."""
        return self._shapes(self._table(height, width), frames, height, width)

    def choose(self, frames: int, height: int, width: int, clip: str) -> Shape | None:
        """The shape that fills a compiled length best, or None if none reaches `min_fill`.

        Small sizes floored to whole tokens distort and leave gaps; then grids beside the table
        compete too. Among good fills the clip's name decides. A video keeps at least five frames:
        its caption speaks of motion.
        """
        table = self._table(height, width)
        true = [sides for sides in table if _stretch(*sides, height, width) <= MAX_STRETCH]
        shapes = self._shapes(true or table, frames, height, width)
        if not any(self.fill(shape) >= GOOD_FILL for shape in shapes):
            beside = {
                (h + dh, w + dw)
                for h, w in table
                for dh in (-CELL, 0, CELL)
                for dw in (-CELL, 0, CELL)
                if min(h + dh, w + dw) > 0
                and _stretch(h + dh, w + dw, height, width) <= MAX_STRETCH
            }
            shapes += self._shapes(sorted(beside - set(true)), frames, height, width)
        if frames > TIME_FACTOR:
            shapes = [shape for shape in shapes if shape.frames > 1]
        good = [shape for shape in shapes if self.fill(shape) >= GOOD_FILL]
        if good:
            digest = hashlib.blake2b(clip.encode(), digest_size=8).digest()
            return good[int.from_bytes(digest, "little") % len(good)]
        best = max(shapes, key=self.fill, default=None)
        return best if best and self.fill(best) >= self.min_fill else None

    def describe(self) -> list[tuple[Shape, int, int]]:
        """(shape, tokens, compiled length) of every resolution, for clips of any duration."""
        shapes = {
            shape
            for size in self.sizes
            for height, width in aspect_sizes(size).values()
            for shape in self._shapes([(height, width)], self.frames, height, width)
        }
        ordered = sorted(shapes, key=lambda s: (s.height * s.width, s.height))
        return [(shape, num_tokens(*shape), self.length_of(shape)) for shape in ordered]

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
    """How far the aspect of h x w is from that of height x width; 1 is equal."""
    return math.exp(abs(math.log(h * width / (w * height))))
