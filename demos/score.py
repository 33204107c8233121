"""The verifier of the captioned world: it measures a clip's attributes and its errors.

All measures are closed-form functions of the pixels; nothing is learned. The background is the
colour of the border. The object is the part that differs from it. Its colour is the nearest colour
of the palette, its motion the least-squares line through its centres, and its shape the template
(drawn form or handwritten digit) with the largest overlap.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from demos.world import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    FORMS,
    FORMS_PER_DIGIT,
    NEW_DIRECTIONS,
    SHAPES,
    SPEEDS,
    WRITERS,
    Attributes,
    Prompt,
    mask,
)
from easyanimate_jax.data.control import canny

MIN_CONTRAST = 45.0  # RGB distance; palette and backgrounds are at least 130 apart
MIN_AREA = 0.01  # of the short side squared; the thinnest digit has 0.03
STILL = 0.4 * SPEEDS["slowly"]  # a slower object (in short sides per frame) counts as still
QUICK = (SPEEDS["slowly"] * SPEEDS["quickly"]) ** 0.5
COMPASS = {  # eight directions, 45 degrees apart
    **DIRECTIONS,
    **NEW_DIRECTIONS,
    "southeast": (0.5**0.5, 0.5**0.5),
    "southwest": (0.5**0.5, -(0.5**0.5)),
    "northwest": (-(0.5**0.5), -(0.5**0.5)),
}
UNEVEN = 0.15  # deviation along a straight line, as a share of the way; a jump has 0.17
ASIDE = 0.12  # deviation from the line, as a share of the way; two sides of a corner have 0.14
FOLLOW = 0.2  # least speed of a side of the box, as a share of the centre's
BOX = 24  # side of a template
NEAR = 0.0075  # of a frame's diagonal: largest distance of matched edges (Martin et al. 2004)

# The score of the best constant answer on the world's prompts. Three of four objects are forms.
CHANCE = {
    "colour": 1 / len(COLOURS),
    "background": 1 / len(BACKGROUNDS),
    "direction": 1 / len(DIRECTIONS),
    "speed": 1 / len(SPEEDS),
    "shape": FORMS_PER_DIGIT / (FORMS_PER_DIGIT + 1) / len(FORMS),
    "joint": 1 / (len(COLOURS) * len(BACKGROUNDS) * len(DIRECTIONS)),
}

Video = UInt8[np.ndarray, "F H W 3"]
Directions = Mapping[str, tuple[float, float]]


class Measures(NamedTuple):
    """The attributes that a clip shows, and the numbers from which two of them follow."""

    attributes: Attributes
    overlaps: Mapping[str, float]  # of the object with each shape's best template; 1 is equal
    velocity: Float[np.ndarray, "2"]  # (y, x) in short sides per frame


def measure(video: Video, directions: Directions = MappingProxyType(DIRECTIONS)) -> Measures:
    """Return what `video` shows; None for what it does not (no object, no motion, one frame).

    The direction is the nearest of `directions`, name -> (y, x) of length 1. Without an object, all
    overlaps and the velocity are 0.
    """
    ground, colour, frames, seen = segmented(video)
    background = _nearest(ground, BACKGROUNDS)
    if 2 * seen.sum() < len(seen):
        none = Attributes(None, background, None)
        return Measures(none, dict.fromkeys(SHAPES, 0.0), np.zeros(2))
    centres = np.array([ndimage.center_of_mass(frame) for frame in frames[seen]])
    centres = centres / min(video.shape[1:3])
    velocity = np.polyfit(np.flatnonzero(seen), centres, 1)[0] if len(centres) > 1 else np.zeros(2)
    overlaps = _overlaps(np.stack([_boxed(frame) for frame in frames[seen]]))
    shape = max(overlaps, key=overlaps.get)
    found = Attributes(_nearest(colour, COLOURS), background, shape, *_motion(velocity, directions))
    return Measures(found, overlaps, velocity)


def attributes(video: Video, directions: Directions = MappingProxyType(DIRECTIONS)) -> Attributes:
    """Return the attributes that `measure` finds."""
    return measure(video, directions).attributes


def strict_attributes(video: Video) -> Attributes:
    """Return what `video` shows, with a direction that a wrong drawing does not get by chance.

    It is the nearest of eight directions. It is None unless every frame shows the object and its
    centre stays near even motion on a straight line: an object that jitters, jumps or turns a
    corner has no direction.
    """
    found = attributes(video, COMPASS)
    *_, frames, seen = segmented(video)
    if found.direction is None or not seen.all():
        return found._replace(direction=None)
    times = np.arange(len(frames))
    centres = np.array([ndimage.center_of_mass(frame) for frame in frames])
    velocity, start = np.polyfit(times, centres, 1)
    speed = np.linalg.norm(velocity)
    left = (centres - start - times[:, None] * velocity) / (speed * times[-1])
    along, aside = left @ velocity / speed, left @ (velocity[::-1] * (1, -1)) / speed
    even = along.std() <= UNEVEN and aside.std() <= ASIDE
    return found if even else found._replace(direction=None)


def moves_whole(video: Video) -> bool:
    """Return whether all sides of the object's box follow its centre, by a share of `FOLLOW`.

    They do not if the object only grows, or if one copy of it stands still.
    """
    direction = attributes(video, COMPASS).direction
    *_, frames, seen = segmented(video)
    if direction is None or not seen.all():
        return False
    times, moved = np.arange(len(frames)), np.array(COMPASS[direction]) != 0
    centres = np.array([ndimage.center_of_mass(frame) for frame in frames])
    sides = [[np.flatnonzero((f > 0.5).any(axis))[[0, -1]] for axis in (1, 0)] for f in frames]
    velocity = np.polyfit(times, centres, 1)[0][:, None]
    follow = np.polyfit(times, np.reshape(sides, (-1, 4)), 1)[0].reshape(2, 2) / velocity
    return bool(follow[moved].min() >= FOLLOW)


def object_path(video: Video) -> Float[np.ndarray, "F 2"]:
    """Return the middle of the object's box in each frame, (x, y) pixels; NaN without an object."""
    *_, frames, seen = segmented(video)
    path = np.full((len(video), 2), np.nan)
    for i in np.flatnonzero(seen):
        ends = [np.flatnonzero((frames[i] > 0.5).any(axis))[[0, -1]] for axis in (0, 1)]
        path[i] = [(first + last + 1) / 2 for first, last in ends]
    return path


def path_distance(video: Video, path: Float[np.ndarray, "F 2"]) -> float:
    """Return the mean distance of the object from `path`, in pixels.

    A frame without an object counts as half the short side.
    """
    distance = np.linalg.norm(object_path(video) - path, axis=1)
    return float(np.nan_to_num(distance, nan=min(video.shape[1:3]) / 2).mean())


def edge_f1(video: Video, edges: Video) -> float:
    """Return the F1 score of the Canny edges of `video` against white `edges`, over all frames.

    An edge pixel is right if the other video has one within `NEAR` of the frame's diagonal.
    """
    tolerance = NEAR * np.hypot(*video.shape[1:3])
    found, wanted = canny(video)[..., 0] > 127, edges[..., 0] > 127
    right = [
        sum(_near(b, tolerance)[a].sum() for a, b in zip(one, other, strict=True))
        / max(one.sum(), 1)
        for one, other in ((found, wanted), (wanted, found))
    ]
    return float(2 * right[0] * right[1] / max(sum(right), 1e-9))


def _near(edges: Bool[np.ndarray, "H W"], tolerance: float) -> Bool[np.ndarray, "H W"]:
    """Return True where an edge lies within `tolerance` pixels."""
    if not edges.any():
        return np.zeros_like(edges)
    return ndimage.distance_transform_edt(~edges) <= tolerance


def segmented(
    video: Video,
) -> tuple[
    Float[np.ndarray, "3"],
    Float[np.ndarray, "3"],
    Float[np.ndarray, "F H W"],
    Bool[np.ndarray, "F"],
]:
    """Return (background colour, object colour, object coverage, frames that show the object)."""
    border = np.concatenate([video[:, [0, -1]].reshape(-1, 3), video[:, :, [0, -1]].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    pixels = np.float32(video) - np.float32(ground)
    distance = np.sqrt((pixels**2).sum(-1))
    area = MIN_AREA * min(video.shape[1:3]) ** 2
    strongest = np.partition(distance.reshape(len(video), -1), -int(area), axis=1)[:, -int(area)]
    contrast = np.median(strongest)  # contrast of the object's core in most frames
    if contrast < MIN_CONTRAST:
        return ground, ground, np.zeros_like(distance), np.zeros(len(video), bool)
    object_colour = np.median(pixels[distance > 0.7 * contrast], axis=0)

    # The projection on the line background-object is linear in coverage: blur keeps the centroid.
    coverage = np.clip(pixels @ object_colour / (object_colour @ object_colour), 0, 1)
    coverage = np.clip(2 * coverage - 0.5, 0, 1)
    frames = np.stack([_object(frame) for frame in coverage])
    return ground, ground + object_colour, frames, frames.sum((1, 2)) > area


def score(
    videos: Iterable[Video],
    prompts: Sequence[Prompt],
    read: Callable[[Video], Attributes] = attributes,
) -> dict:
    """Return the share of videos that match their prompt, per attribute, and the chance levels.

    `read` returns the attributes of a video. `joint` counts videos whose colour, background and
    direction all match.
    """
    hits = {name: [] for name in CHANCE}
    for video, prompt in zip(videos, prompts, strict=True):
        shown, wanted = read(video), prompt.attributes
        for name in Attributes._fields:
            hits[name].append(getattr(shown, name) == getattr(wanted, name))
        hits["joint"].append(shown[:2] == wanted[:2] and shown.direction == wanted.direction)
    accuracy = {name: float(np.mean(values)) for name, values in hits.items()}
    return accuracy | {"count": len(prompts), "chance": CHANCE}


def first_frame_error(video: Video, image: UInt8[np.ndarray, "H W 3"]) -> float:
    """Return the mean absolute difference of frame 0 from `image`, as a share of 255."""
    return known_error(video[:1], image[None], np.zeros_like(image[None, ..., :1]))


def last_frame_error(video: Video, image: UInt8[np.ndarray, "H W 3"]) -> float:
    """Return the mean absolute difference of the last frame from `image`, as a share of 255."""
    return first_frame_error(video[-1:], image)


def known_error(video: Video, source: Video, mask: UInt8[np.ndarray, "F H W 1"]) -> float:
    """Return the mean absolute difference where `mask` is 0, as a share of 255."""
    difference = np.abs(np.float32(video) - np.float32(source))
    return float(difference[mask[..., 0] == 0].mean() / 255)


def edge_energy(videos: Video | UInt8[np.ndarray, "B F H W 3"]) -> float:
    """Return the mean square of horizontal differences: blur makes it small."""
    return float(np.mean(np.diff(np.float32(videos), axis=-2) ** 2))


def motion(video: Video) -> float:
    """Return the mean absolute difference of neighbouring frames, as a share of 255."""
    return float(np.abs(np.diff(np.float32(video), axis=0)).mean() / 255)


def _nearest(colour: np.ndarray, palette: Mapping[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: np.linalg.norm(colour - palette[name]))


def _object(coverage: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Return the coverage without connected parts smaller than a fifth of the largest."""
    labels, count = ndimage.label(coverage > 0.5, structure=np.ones((3, 3)))
    if count == 0:
        return np.zeros_like(coverage)
    sizes = np.bincount(labels.ravel())[1:]
    kept = np.concatenate([[False], sizes >= sizes.max() / 5])[labels]
    return coverage * ndimage.binary_dilation(kept, iterations=2)


def _motion(
    velocity: Float[np.ndarray, "2"], directions: Directions
) -> tuple[str | None, str | None]:
    """Return direction and speed of a velocity in short sides per frame."""
    direction = max(directions, key=lambda name: velocity @ directions[name])
    speed = velocity @ directions[direction]
    if speed < STILL:
        return None, None
    return direction, "quickly" if speed > QUICK else "slowly"


def _boxed(coverage: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "box box"]:
    """Return the object, centred and scaled so that its box's longer side fills the template."""
    rows, columns = (np.flatnonzero((coverage > 0.5).any(axis)) for axis in (1, 0))
    ends = [(axis[0] - 0.5, axis[-1] + 0.5) for axis in (rows, columns)]
    scale = max(last - first for first, last in ends) / BOX
    offsets = (np.arange(BOX) - (BOX - 1) / 2) * scale
    points = [offsets + (first + last) / 2 for first, last in ends]
    return ndimage.map_coordinates(coverage, np.meshgrid(*points, indexing="ij"), order=1)


def _overlaps(boxes: Float[np.ndarray, "F box box"]) -> dict[str, float]:
    """Return the mean normalised overlap with each shape's best template."""
    templates, names = _templates()
    boxes = boxes.reshape(len(boxes), -1)
    overlap = boxes @ templates.T / np.linalg.norm(boxes, axis=1, keepdims=True)
    found = dict.fromkeys(SHAPES, 0.0)
    for name, value in zip(names, overlap.mean(0).tolist(), strict=True):
        found[name] = max(found[name], value)
    return found


@functools.cache
def _templates() -> tuple[Float[np.ndarray, "templates pixels"], tuple[str, ...]]:
    """Return the templates of all forms and handwritten digits, with unit norm, and their names."""
    side = np.linspace(-1.2, 1.2, 96, dtype=np.float32)
    drawn = [
        (shape, mask(shape, side[:, None], side[None, :], 2.4 / 96, writer))
        for shape in SHAPES
        for writer in range(WRITERS if shape in DIGITS else 1)
    ]
    boxes = np.stack([_boxed(coverage).ravel() for _, coverage in drawn])
    return boxes / np.linalg.norm(boxes, axis=1, keepdims=True), tuple(name for name, _ in drawn)
