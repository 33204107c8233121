"""Scores of a clip's quality, computed from its pixels by classical measures.

A `Score` is a function of a few frames, uint8 (F, H, W, 3), and a scale or captions, with the range
of values to keep. A large model can be used as another `Score`. Names and ranges are the
reference's if it has the same measure (spec 13); simpler measures of ours have other names.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8

from easyanimate_jax.storage.functions import named_object

Pictures = UInt8[np.ndarray, "F H W 3"]


@dataclass(frozen=True)
class Score:
    """A measure of clips; clips whose value is outside [low, high] are left out.

    `frames` chooses the input of `measure`. "motion" gives small frames, two a second. "still"
    gives the first, middle and last frame, with up to 512 pixels on the longer side. A measure gets
    them with the scale, in pixels of the source, and returns a number. "captioned" gives 8 frames
    of that size, spread over the clip, with its captions, and the measure returns a number for each
    caption; the worst of them counts, since training draws any of them. `better` is 1 if high
    values are better, -1 if low ones are, and 0 if the value does not rank clips.
    """

    name: str
    measure: Callable[[Pictures, float], float] | Callable[[Pictures, list[str]], Sequence[float]]
    frames: str = "still"
    low: float | int = -np.inf
    high: float | int = np.inf
    better: int = 0

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(
                f"Score.name is {self.name!r}; use letters, digits and _, as in text_2"
            )
        for field, allowed in (
            ("frames", ("still", "motion", "captioned")),
            ("better", (-1, 0, 1)),
        ):
            if (value := getattr(self, field)) not in allowed:
                one_of = ", ".join(map(repr, allowed))
                raise ValueError(f"score {self.name}: {field} is {value!r}; use one of {one_of}")
        if not self.low <= self.high:
            raise ValueError(
                f"score {self.name}: low is {self.low} and high is {self.high}; use a low that is "
                f"not above high"
            )

    @property
    def of_captions(self) -> bool:
        """Return whether the measure gets the captions of a clip beside its frames."""
        return self.frames == "captioned"

    def fault(self, row: dict) -> str:
        """Return why a row is left out; "" if its value is in the range, or missing."""
        bad = self.name in row and not self.low <= row[self.name] <= self.high
        return self.reason if bad else ""

    @property
    def reason(self) -> str:
        """Return the reason of a clip whose value is outside the range."""
        return f"{self.name} outside {self.low:g} to {self.high:g}"


def named_score(text: str) -> Score:
    """Return the `Score` MODULE:NAME, after a trial on two frames of noise.

    Raises ValueError if there is none, or if its measure does not return a finite number.
    """
    score = named_object(text)
    if not isinstance(score, Score):
        raise ValueError(
            f"{text} is not the MODULE:NAME of a Score; write NAME = Score('name', function) in "
            f"MODULE, with the class of easyanimate_jax.prepare.scores"
        )
    frames = np.random.default_rng(0).integers(0, 256, (2, 90, 160, 3), np.uint8)
    value = score.measure(frames, ["Noise."] if score.of_captions else 1.0)
    try:
        [number] = value if score.of_captions else [value]
        finite = np.isfinite(float(number))
    except (TypeError, ValueError):
        finite = False
    if not finite:
        wanted = "a list of one finite number for one caption"
        wanted = wanted if score.of_captions else "a finite number"
        raise ValueError(f"{text} returns {value!r} for two frames of noise; return {wanted}")
    return score


def check_names(scores: Sequence[Score], taken: Collection[str]) -> None:
    """Raise ValueError if two scores have one name, or one has the name of a `taken` column."""
    names = [score.name for score in scores]
    for name in names:
        if names.count(name) > 1 or name in taken:
            owner = "a column of the table" if name in taken else "another score"
            raise ValueError(f"score {name}: {owner} has this name; use another one")


def motion(frames: Pictures, scale: float) -> float:
    """Return the mean length of Farneback's flow between neighbours, in pixels of the source."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flows = [
        np.linalg.norm(cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0), axis=-1)
        for a, b in itertools.pairwise(grey)
    ]
    return float(np.mean(flows)) * scale if flows else 0.0


def consistency(frames: Pictures, scale: float) -> float:
    """Return the smallest cosine similarity of the colour histograms of neighbouring frames."""
    histograms = []
    for frame in frames:
        histogram, _ = np.histogramdd(frame.reshape(-1, 3), bins=(8, 8, 8), range=[(0, 256)] * 3)
        histograms.append(np.sqrt(histogram.ravel() / histogram.sum()))
    pairs = itertools.pairwise(histograms)
    return min((float(a @ b) for a, b in pairs), default=1.0)


def sharpness(frames: Pictures, scale: float) -> float:
    """Return the variance of the Laplacian of the sharpest frame."""
    return max(float(cv2.Laplacian(_grey(frame), cv2.CV_64F).var()) for frame in frames)


def text_area(frames: Pictures, scale: float) -> float:
    """Return the share of the middle frame in boxes like lines of text: wide and full of edges."""
    grey = _grey(frames[len(frames) // 2])
    edges = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    _, strong = cv2.threshold(edges, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    lines = cv2.morphologyEx(strong, cv2.MORPH_CLOSE, np.ones((1, 13), np.uint8))
    count, _, boxes, _ = cv2.connectedComponentsWithStats(lines)
    area = 0
    for x, y, w, h, _ in boxes[1:count]:
        dense = strong[y : y + h, x : x + w].mean() / 255
        strokes = np.abs(np.diff((strong[y : y + h, x : x + w] > 0).astype(int), axis=1)).sum() / h
        if (
            6 <= h <= grey.shape[0] // 5
            and w >= 3 * h
            and 0.3 <= dense <= 0.9
            and strokes >= w / 12
        ):
            area += w * h
    return area / grey.size


def colourfulness(frames: Pictures, scale: float) -> float:
    """Return Hasler and Suesstrunk's colourfulness; a grey frame has 0."""
    r, g, b = (frames[..., c].astype(np.float32) for c in range(3))
    rg, yb = r - g, (r + g) / 2 - b
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def picture_hash(picture: UInt8[np.ndarray, "H W 3"]) -> int:
    """Return a 64-bit perceptual hash: the signs of differences in an 8 x 9 thumbnail.

    Small changes of the picture change few bits.
    """
    small = cv2.resize(_grey(picture), (9, 8), interpolation=cv2.INTER_AREA).astype(int)
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def _grey(picture: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)


SCORES = (
    Score("consistency", consistency, low=0.8, better=1),
    Score("colourfulness", colourfulness, low=4.0, better=1),
    Score("sharpness", sharpness, low=20.0, better=1),
    Score("text_area", text_area, high=0.02, better=-1),
    Score("motion", motion, "motion", low=2.0, high=20.0),
)
