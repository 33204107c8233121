"""What a clip is worth, from its pixels: classical measures, and the form of a model's.

A score is a function of a few frames (F, H, W, 3) uint8 and the seconds between them, and the range
of values to keep. A large model is another `Score`; the names and ranges are the reference's where
it has the same measure (spec 13), with an own name where ours measures something simpler.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8

Pictures = UInt8[np.ndarray, "F H W 3"]


@dataclass(frozen=True)
class Score:
    """Clips whose `measure` is outside [low, high] are left out.

    `frames` says what it is given: "motion" frames two a second and small, or "still" ones, first,
    middle and last, up to 512 pixels long. `better` is 1 if more is better, -1 if less is, and 0 if
    the score says nothing of a clip's quality inside its range.
    """

    name: str
    measure: Callable[[Pictures, float], float]
    frames: str = "still"
    low: float = -np.inf
    high: float = np.inf
    better: int = 0


def motion(frames: Pictures, scale: float) -> float:
    """Mean length of Farneback's flow between neighbours, in pixels of the source."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flows = [
        np.linalg.norm(cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0), axis=-1)
        for a, b in itertools.pairwise(grey)
    ]
    return float(np.mean(flows)) * scale if flows else 0.0


def consistency(frames: Pictures, scale: float) -> float:
    """The smallest cosine between the colour histograms of neighbours."""
    histograms = []
    for frame in frames:
        histogram, _ = np.histogramdd(frame.reshape(-1, 3), bins=(8, 8, 8), range=[(0, 256)] * 3)
        histograms.append(np.sqrt(histogram.ravel() / histogram.sum()))
    pairs = itertools.pairwise(histograms)
    return min((float(a @ b) for a, b in pairs), default=1.0)


def sharpness(frames: Pictures, scale: float) -> float:
    """Variance of the Laplacian of the sharpest picture."""
    return max(float(cv2.Laplacian(_grey(frame), cv2.CV_64F).var()) for frame in frames)


def text_area(frames: Pictures, scale: float) -> float:
    """Share of the middle picture in boxes like lines of text: dense, wide, full of edges."""
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
    """Hasler and Suesstrunk's measure; a grey picture has 0."""
    r, g, b = (frames[..., c].astype(np.float32) for c in range(3))
    rg, yb = r - g, (r + g) / 2 - b
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def picture_hash(picture: UInt8[np.ndarray, "H W 3"]) -> int:
    """64 bits that small changes leave alone: signs of differences of an 8 x 9 thumbnail."""
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
