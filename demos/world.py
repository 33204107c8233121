"""A small captioned world, written to real files: one coloured object moves over a background.

An object is a drawn shape or a handwritten digit of scikit-learn. Every clip has an English and a
Chinese caption that state all its attributes, so `score.py` needs no learned judge. Some (colour,
background, direction) triples never occur in training, but every pair of their values does. They
test whether the model combines known words in new ways.

    python -m demos.world OUT --images 400 --clips 1000 --large-clips 4

writes `OUT/metadata.json` (two rows per file: English, then Chinese) and a second data set,
`OUT/heldout/metadata.json`, with true clips of the held-out triples. `OUT/texts/metadata.json` has
the captions of all files, and captions of directions that no file shows: text encoders learn from
text alone, so they know more words than a video model has seen. Every clip has a control file:
a spot that moves along the object's path, or its exact depth or pose (`--control depth` or `pose`).
"""

import copy
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import cv2
import numpy as np
import tyro
from jaxtyping import Float, UInt8
from scipy import ndimage
from sklearn.datasets import load_digits

from easyanimate_jax.commands.parse import registry
from easyanimate_jax.data.control import trajectory_video
from easyanimate_jax.data.media import write_png, write_video
from easyanimate_jax.facts import SEEDS, check_fields

COLOURS = {
    "red": (225, 40, 40),
    "green": (30, 175, 50),
    "blue": (45, 75, 230),
    "yellow": (240, 220, 40),
    "purple": (175, 35, 205),
    "cyan": (40, 215, 225),
}
# Not quite black and white: -1 exactly would mean "unknown" to the noised references (spec 6.4).
BACKGROUNDS = {"black": (16, 16, 16), "white": (240, 240, 240), "grey": (128, 128, 128)}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (y, x)
NEW_DIRECTIONS = {"northeast": (-(0.5**0.5), 0.5**0.5)}  # only texts name them; see `concept.py`
SPEEDS = {"slowly": 0.019, "quickly": 0.038}  # short sides per frame
FORMS = ("circle", "square", "triangle", "cross")
DIGITS = tuple(f"digit {d}" for d in range(10))
SHAPES = FORMS + DIGITS

CHINESE = {
    **{"red": "红色", "green": "绿色", "blue": "蓝色"},
    **{"yellow": "黄色", "purple": "紫色", "cyan": "青色"},
    **{"black": "黑色", "white": "白色", "grey": "灰色"},
    **{"left": "左", "right": "右", "up": "上", "down": "下", "northeast": "东北"},
    **{"slowly": "慢慢", "quickly": "快速"},
    **{"circle": "圆形", "square": "正方形", "triangle": "三角形", "cross": "十字形"},
    **{digit: digit.replace("digit ", "数字") for digit in DIGITS},
}

FPS = 8
DURATIONS = (9, 13, 17, 25)
ASPECTS = (1.0, 0.75, 1.33, 0.67, 1.5, 0.5, 2.0)  # height / width
SHORT_SIDES = (64, 80, 96, 112, 128)
LARGE_SHORT_SIDES = (192, 224, 256)
RADII = (0.28, 0.34)  # half the object's box, in short sides: an object spans several tokens
OFF_CENTRE = 0.10  # largest distance of a path's middle from the picture's, in short sides
SPOT = 0.5  # half the side of a path's spot, in short sides
FORMS_PER_DIGIT = 3  # three of every four objects are drawn forms, one is a digit
WRITERS = 20  # handwritten images per digit
NEAR, FAR = 255, 64  # grey levels of a depth video: near is bright
BONES = {  # (y, x) of a box's sides -> RGB
    (-1, 0): (255, 0, 0),
    (1, 0): (0, 255, 0),
    (0, -1): (0, 0, 255),
    (0, 1): (255, 255, 0),
}


class Attributes(NamedTuple):
    """The attributes of a clip; an image has neither direction nor speed."""

    colour: str | None
    background: str
    shape: str | None
    direction: str | None = None
    speed: str | None = None


class Prompt(NamedTuple):
    """Attributes and the English and the Chinese sentence that state them."""

    attributes: Attributes
    en: str
    zh: str


@dataclass(frozen=True)
class WorldConfig:
    """The number of files of each kind in a world, its seed and its control signal."""

    images: int = 400
    """Number of pictures."""

    clips: int = 1000
    """Number of clips with a short side of 64 to 128 pixels."""

    large_clips: int = 4
    """Number of clips with a short side of 192 to 256 pixels."""

    heldout: int = 96
    """Number of clips with (colour, background, direction) triples that no other clip shows."""

    seed: int = 0
    """Seed of all random choices."""

    control: Literal["path", "depth", "pose"] = "path"
    """Signal of each clip's control video: the object's exact path, depth or pose."""

    def __post_init__(self):
        check_fields(
            self,
            images="[0, inf)",
            clips="[0, inf)",
            large_clips="[0, inf)",
            heldout="[0, inf)",
            seed=SEEDS,
        )


def caption(a: Attributes) -> Prompt:
    """Return the prompt whose English and Chinese sentences state these attributes."""
    zh = {key: CHINESE.get(value) for key, value in a._asdict().items()}
    en_motion, zh_motion = "", ""
    if a.direction:
        en_motion = f" moves {a.direction} {a.speed}"
        zh_motion = f"{zh['speed']}向{zh['direction']}移动"
    return Prompt(
        a,
        en=f"a {a.colour} {a.shape}{en_motion} on a {a.background} background",
        zh=f"{zh['colour']}的{zh['shape']}在{zh['background']}背景上{zh_motion}",
    )


def held_out() -> tuple[tuple[str, str, str], ...]:
    """Return the 12 of 72 (colour, background, direction) triples that training never shows."""
    backgrounds, directions = tuple(BACKGROUNDS), tuple(DIRECTIONS)
    return tuple(
        (colour, backgrounds[(i + k) % 3], directions[(i + 2 * k) % 4])
        for i, colour in enumerate(COLOURS)
        for k in range(2)
    )


def prompts(split: str, count: int, seed: int) -> list[Prompt]:
    """Return `count` prompts for clips of the "seen" or "heldout" triples, values equally often.

    One object in four is a digit, the others are drawn forms. Raises ValueError for another split.
    """
    if split not in ("seen", "heldout"):
        raise ValueError(f'split is {split!r}: choose "seen" or "heldout"')
    triples = [
        triple
        for triple in itertools.product(COLOURS, BACKGROUNDS, DIRECTIONS)
        if (triple in held_out()) == (split == "heldout")
    ]
    rng = np.random.default_rng((seed, split == "heldout"))
    return list(itertools.islice(moving(triples, rng), count))


def moving(triples: Sequence[tuple[str, str, str]], rng: np.random.Generator) -> Iterator[Prompt]:
    """Yield prompts of (colour, background, direction) triples, values equally often, without end.

    One object in four is a digit, the others are drawn forms.
    """
    shapes, speeds = _shapes(rng), _cycle(tuple(SPEEDS), rng)
    for colour, background, direction in _cycle(triples, rng):
        yield caption(Attributes(colour, background, next(shapes), direction, next(speeds)))


def image_prompts(count: int, seed: int) -> list[Prompt]:
    """Return `count` prompts for still images: colour, background and shape."""
    rng = np.random.default_rng((seed, 2))
    pairs, shapes = _cycle(tuple(itertools.product(COLOURS, BACKGROUNDS)), rng), _shapes(rng)
    return [caption(Attributes(*next(pairs), next(shapes))) for _ in range(count)]


def _cycle(values, rng: np.random.Generator) -> Iterator:
    """Yield all values in random order, then again in a new order, without end."""
    while True:
        yield from (values[i] for i in rng.permutation(len(values)))


def _shapes(rng: np.random.Generator) -> Iterator[str]:
    forms, digits = _cycle(FORMS, rng), _cycle(DIGITS, rng)
    for choice in _cycle((*[forms] * FORMS_PER_DIGIT, digits), rng):
        yield next(choice)


@functools.cache
def digit_images(digit: int) -> Float[np.ndarray, "writers 64 64"]:
    """Return images of one handwritten digit by `WRITERS` writers, upsampled from 8x8; ink is 1."""
    images, labels = load_digits(return_X_y=True)
    images = images[labels == digit].reshape(-1, 8, 8) / 16
    images = images[:: len(images) // WRITERS][:WRITERS]
    fine = ndimage.zoom(images, (1, 8, 8), order=3, mode="grid-constant", grid_mode=True)
    return np.stack([_fill_box(image) for image in fine])


def _fill_box(ink: np.ndarray) -> np.ndarray:
    """Scale the ink so that its longer side fills the image, centred."""
    rows, columns = (np.flatnonzero((ink > INK).any(axis)) for axis in (1, 0))
    top, left = rows[0], columns[0]
    height, width = rows[-1] + 1 - top, columns[-1] + 1 - left
    size, scale = len(ink), max(height, width) / len(ink)
    y = (np.arange(size) + 0.5 - size / 2) * scale + top + height / 2 - 0.5
    x = (np.arange(size) + 0.5 - size / 2) * scale + left + width / 2 - 0.5
    return ndimage.map_coordinates(ink, np.meshgrid(y, x, indexing="ij"), order=1)


INK = 0.25  # grey level of a digit's outline


def mask(
    shape: str, y: np.ndarray, x: np.ndarray, pixel: float, writer: int = 0
) -> Float[np.ndarray, "..."]:
    """Return the anti-aliased coverage of `shape` at points of its box [-1, 1]^2, from 0 to 1.

    `pixel` is the width of a pixel in the units of the box.
    """
    if shape in DIGITS:
        ink = digit_images(DIGITS.index(shape))[writer]
        points = [(coordinate + 1) * len(ink) / 2 - 0.5 for coordinate in (y, x)]
        value = ndimage.map_coordinates(ink, np.broadcast_arrays(*points), order=1)
        return np.clip(0.5 + (value - INK) * max(3.0, 0.5 / pixel), 0, 1)
    inside = {  # distance to the outline, positive inside
        "circle": lambda: 1 - np.hypot(y, x),
        "square": lambda: 1 - np.maximum(abs(y), abs(x)),
        "triangle": lambda: np.minimum(1 - y, (1 + y - 2 * abs(x)) / 5**0.5),
        "cross": lambda: np.minimum(
            1 - np.maximum(abs(y), abs(x)), 0.34 - np.minimum(abs(y), abs(x))
        ),
    }[shape]()
    return np.clip(0.5 + inside / pixel, 0, 1)


def render(
    a: Attributes, num_frames: int, height: int, width: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "F H W 3"]:
    """Draw a clip (or, without a direction, an image) with random size, start and handwriting."""
    alpha = _coverage(a, num_frames, height, width, rng)
    colour, background = np.float32(COLOURS[a.colour]), np.float32(BACKGROUNDS[a.background])
    return (background + alpha * (colour - background) + 0.5).astype(np.uint8)


def depth(
    a: Attributes, num_frames: int, height: int, width: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "F H W 3"]:
    """Return the depth video of the clip that `render` draws from the same `rng` state.

    The object has the grey level `NEAR`, the background `FAR`.
    """
    near = _coverage(a, num_frames, height, width, rng) >= 0.5
    return np.repeat(np.where(near, np.uint8(NEAR), np.uint8(FAR)), 3, axis=-1)


def pose(
    a: Attributes, num_frames: int, height: int, width: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "F H W 3"]:
    """Return the skeleton of the clip that `render` draws from the same `rng` state.

    It has four bones in different colours, from the middle of the object's box to its four sides.
    """
    radius, centres = _placed(a, num_frames, height, width, rng)
    video, thick = np.zeros((num_frames, height, width, 3), np.uint8), max(1, round(radius / 10))
    for frame, middle in zip(video, centres, strict=True):
        for bone, colour in BONES.items():
            ends = (middle[::-1], (middle + radius * np.array(bone))[::-1])
            cv2.line(frame, *(tuple(int(v) for v in end) for end in ends), colour, thick)
    return video


def _coverage(
    a: Attributes, num_frames: int, height: int, width: int, rng: np.random.Generator
) -> Float[np.ndarray, "F H W 1"]:
    """Return the share of each pixel that the object covers, from 0 to 1."""
    radius, centres = _placed(a, num_frames, height, width, rng)
    y = (np.float32(np.arange(height)) + 0.5 - centres[:, :1])[:, :, None] / radius
    x = (np.float32(np.arange(width)) + 0.5 - centres[:, 1:])[:, None, :] / radius
    return mask(a.shape, y, x, 1 / radius, int(rng.integers(WRITERS)))[..., None]


def clips(
    prompts: Sequence[Prompt], num_frames: int, height: int, width: int, seed: int
) -> tuple[UInt8[np.ndarray, "B F H W 3"], Float[np.ndarray, "B F 2"]]:
    """Return one clip per prompt, and the path of its object in (x, y) pixels."""

    def draw(function):
        rngs = (np.random.default_rng((i, seed)) for i in range(len(prompts)))
        size = num_frames, height, width
        drawn = zip(prompts, rngs, strict=True)
        return np.stack([function(p.attributes, *size, rng) for p, rng in drawn])

    return draw(render), draw(path)


def path(
    a: Attributes, num_frames: int, height: int, width: int, rng: np.random.Generator
) -> Float[np.ndarray, "F 2"]:
    """Return the middle of the object's box in the clip that `render` draws, in (x, y) pixels.

    `rng` must have the same state as for `render`.
    """
    return _placed(a, num_frames, height, width, rng)[1][:, ::-1]


def path_video(
    path: Float[np.ndarray, "F 2"], num_frames: int, height: int, width: int
) -> UInt8[np.ndarray, "F H W 3"]:
    """Return the control video of a path: a spot that covers the whole object."""
    half = round(SPOT * min(height, width))
    return trajectory_video([path], num_frames, height, width, half)


CONTROLS = {
    "path": lambda a, *size_and_rng: path_video(path(a, *size_and_rng), *size_and_rng[:3]),
    "depth": depth,
    "pose": pose,
}


def _placed(
    a: Attributes, num_frames: int, height: int, width: int, rng: np.random.Generator
) -> tuple[float, Float[np.ndarray, "F 2"]]:
    """Return half the side of the object's box, and its middle in each frame, (y, x) pixels.

    Raises ValueError if the object would leave the picture.
    """
    short = min(height, width)
    radius = rng.uniform(*RADII) * short
    step = _velocity(a) * short if a.direction else np.zeros(2)
    travel = step * (num_frames - 1)
    room = np.array([height, width]) - 2 * radius - abs(travel)
    if (room < 0).any():
        raise ValueError(
            f"{num_frames} frames of {height}x{width} have no room for an object that moves "
            f"{a.direction} {a.speed}; choose fewer frames (see `durations`)"
        )
    off = np.minimum(room / 2, OFF_CENTRE * short)
    middle = np.array([height, width]) / 2 + rng.uniform(-off, off)
    times = np.arange(num_frames) - (num_frames - 1) / 2
    return radius, np.float32(middle + times[:, None] * step)


def durations(a: Attributes, height: int, width: int) -> tuple[int, ...]:
    """Return the frame counts in which an object of any size stays inside the picture."""
    room = np.array([height, width]) / min(height, width) - 2 * RADII[1]
    return tuple(F for F in DURATIONS if (abs(_velocity(a)) * (F - 1) <= room).all())


def _velocity(a: Attributes) -> Float[np.ndarray, "2"]:
    """Return how far the object moves from frame to frame, (y, x) in short sides."""
    return np.array((DIRECTIONS | NEW_DIRECTIONS)[a.direction]) * SPEEDS[a.speed]


def write_world(out: Path, config: WorldConfig) -> None:
    """Write the training files of `config` into `out` and the held-out ones into `out/heldout`."""
    stills = [(p, SHORT_SIDES) for p in image_prompts(config.images, config.seed)]
    moving = prompts("seen", config.clips + config.large_clips, config.seed)
    sides = [SHORT_SIDES] * config.clips + [LARGE_SHORT_SIDES] * config.large_clips
    items = stills + list(zip(moving, sides, strict=True))
    write_folder(out, items, config.seed, config.control)
    unseen = [(p, SHORT_SIDES) for p in prompts("heldout", config.heldout, config.seed)]
    write_folder(out / "heldout", unseen, config.seed + 1, config.control)
    write_texts(out / "texts", [prompt for prompt, _ in items], config.seed)


def write_texts(out: Path, seen: Sequence[Prompt], seed: int) -> None:
    """Write the captions of files, and as many of each new direction as one of theirs has."""
    rng = np.random.default_rng((seed, 3))
    count = sum(prompt.attributes.direction is not None for prompt in seen) // len(DIRECTIONS)
    triples = tuple(itertools.product(COLOURS, BACKGROUNDS, NEW_DIRECTIONS))
    unseen = itertools.islice(moving(triples, rng), count * len(NEW_DIRECTIONS))
    rows = [
        {"file_path": f"{i:05d}", "text": text}
        for i, prompt in enumerate([*seen, *unseen])
        for text in (prompt.en, prompt.zh)
    ]
    out.mkdir(exist_ok=True)
    (out / "metadata.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0), "utf-8")


def write_folder(
    out: Path, items: list[tuple[Prompt, tuple[int, ...]]], seed: int, control: str = "path"
) -> None:
    """Write one file, with its control file and two captions, for each (prompt, short sides)."""
    folder = f"{control}s"
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "clips").mkdir(exist_ok=True)
    (out / folder).mkdir(exist_ok=True)
    rows = []
    for i, (prompt, short_sides) in enumerate(items):
        rng = np.random.default_rng((seed, i))
        short, aspect = rng.choice(short_sides), rng.choice(ASPECTS)
        height, width = short * max(1, aspect), short * max(1, 1 / aspect)
        height, width = 2 * round(height / 2), 2 * round(width / 2)  # yuv420 needs even sides
        row = {"width": width, "height": height}
        if prompt.attributes.direction:
            row |= {"file_path": f"clips/{i:05d}.mp4", "type": "video"}
            row["control_file_path"] = f"{folder}/{i:05d}.mp4"
            num_frames = int(rng.choice(durations(prompt.attributes, height, width)))
            size = num_frames, height, width
            shown = CONTROLS[control](prompt.attributes, *size, copy.deepcopy(rng))
            clip = render(prompt.attributes, *size, rng)
            write_video(out / row["file_path"], clip, FPS, crf=10)  # fine enough for the colours
            write_video(out / row["control_file_path"], shown, FPS, crf=10)
        else:
            row |= {"file_path": f"images/{i:05d}.png", "type": "image"}
            write_png(out / row["file_path"], render(prompt.attributes, 1, height, width, rng)[0])
        rows += [row | {"text": text} for text in (prompt.en, prompt.zh)]
    (out / "metadata.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0), "utf-8")


def every_prompt() -> Iterator[Prompt]:
    """Yield the prompts of all images and clips of the world, held out or not."""
    for pair in itertools.product(COLOURS, BACKGROUNDS, SHAPES):
        yield caption(Attributes(*pair))
        for motion in itertools.product(DIRECTIONS, SPEEDS):
            yield caption(Attributes(*pair, *motion))


@functools.cache
def by_text() -> Mapping[str, Prompt]:
    """Return the prompt of every sentence of the world, English or Chinese."""
    known = {text: prompt for prompt in every_prompt() for text in (prompt.en, prompt.zh)}
    return MappingProxyType(known)


def main(out: tyro.conf.Positional[Path], config: tyro.conf.OmitArgPrefixes[WorldConfig]) -> None:
    """Write a world of captioned clips into the folder OUT."""
    write_world(out, config)


if __name__ == "__main__":
    tyro.cli(main, registry=registry())
