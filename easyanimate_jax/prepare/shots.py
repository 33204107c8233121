"""Find the cuts of a film and split it into clips, by the reference's rules (spec 13)."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from scenedetect import ContentDetector, FrameTimecode

from easyanimate_jax.facts import check_fields

THRESHOLD, MIN_SCENE = 27.0, 15  # settings of the content detector; MIN_SCENE is in frames


@dataclass(frozen=True)
class Splitting:
    """Rules for the length of clips; the defaults are the reference's (spec 13)."""

    min_seconds: float = 3.0
    """Length of the shortest clip in seconds; shorter ones are left out."""

    max_seconds: float = 10.0
    """Length of the longest clip in seconds; longer scenes are cut into pieces of this length."""

    trim_seconds: float = 0.5
    """Seconds removed from the end of a scene, because the detector finds some cuts late. 0 removes
    nothing."""

    def __post_init__(self):
        check_fields(self, min_seconds="[0, inf)", max_seconds="(0, inf)", trim_seconds="[0, inf)")
        if self.min_seconds > self.max_seconds:
            raise ValueError(
                f"Splitting.min_seconds is {self.min_seconds}; use max_seconds, "
                f"{self.max_seconds}, or less"
            )


class Span(NamedTuple):
    """A span of frames of a film."""

    first: int
    end: int  # one past the last frame


def find_cuts(frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: float) -> list[int]:
    """Return the indices of the first frames of all shots except the first shot.

    One frame is held at a time, so the film may be of any length.
    """
    detector = ContentDetector(threshold=THRESHOLD, min_scene_len=MIN_SCENE)
    cuts, count = [], 0
    for frame in frames:
        bgr = np.ascontiguousarray(frame[..., ::-1])
        cuts += detector.process_frame(FrameTimecode(count, fps), bgr)
        count += 1
    cuts += detector.post_process(FrameTimecode(count, fps))
    return sorted({int(cut.frame_num) for cut in cuts})


def split(
    num_frames: int, cuts: list[int], fps: float, rules: Splitting
) -> tuple[list[Span], list[Span]]:
    """Return (spans that become clips, spans that are too short)."""
    least, most = round(rules.min_seconds * fps), max(1, round(rules.max_seconds * fps))
    edges = [0, *cuts, num_frames]
    kept, short = [], []
    for first, end in itertools.pairwise(edges):
        if end - first < least:
            short.append(Span(first, end))
        elif end - first > most:
            for start in range(first, end, most):
                piece = Span(start, min(start + most, end))
                (kept if piece.end - piece.first >= least else short).append(piece)
        elif cuts:
            kept.append(Span(first, max(first + 1, end - round(rules.trim_seconds * fps))))
        else:
            kept.append(Span(first, end))
    return kept, short
