"""Render a decoded frame as a player shows it: orientation, pixel aspect, transparency, HDR."""

from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from easyanimate_jax.data import hdr
from easyanimate_jax.data.pictures import BACKGROUND, Picture, cover

# Flags of FFmpeg's scaler: bilinear with antialias like `resize_crop`, and full-resolution chroma.
# FFmpeg's defaults are slightly faster, but their result is more than 1 level of 255 too dark.
SCALING = (
    Interpolation.BILINEAR
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
ROUND = 0.02  # relative tolerance of matrix entries: about 1 degree of rotation


class Look(NamedTuple):
    """The display geometry: scale frames to `coded` pixels, then transpose, then mirror."""

    coded: tuple[int, int]  # height and width, corrected for the pixel aspect
    turned: bool  # rows become columns
    mirrored: tuple[bool, bool]  # vertically, horizontally: after the transposition

    @property
    def size(self) -> tuple[int, int]:
        """Return the displayed (height, width)."""
        return self.coded[::-1] if self.turned else self.coded


def look_of(frame: av.VideoFrame, aspect: Fraction | None) -> Look:
    """Return the display geometry of a frame; a pixel is `aspect` times as wide as it is high.

    The pixel aspect changes the width, never the height. Raises ValueError for a rotation other
    than by multiples of 90 degrees.
    """
    coded = frame.height, max(1, round(frame.width * float(aspect or 1)))
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Look(coded, False, (False, False))
    a, b, _, c, d = np.frombuffer(bytes(data)[:20], np.int32).astype(float).tolist()
    largest = max(map(abs, (a, b, c, d)))
    straight = max(abs(b), abs(c)) <= ROUND * largest
    crossed = max(abs(a), abs(d)) <= ROUND * largest
    across, along = (c, b) if crossed else (a, d)
    if not largest or straight == crossed or not across or not along:
        raise ValueError("is turned by a matrix that is no quarter turn or mirror; encode it again")
    return Look(coded, crossed, (along < 0, across < 0))


def render(
    scaler: VideoReformatter, frame: av.VideoFrame, look: Look, size: tuple[int, int] | None
) -> Picture:
    """Return the frame as RGB, scaled to cover `size` and cropped to its centre."""
    height, width = size or look.size
    rows, columns, top, left = cover(*look.size, height, width)
    h, w = (columns, rows) if look.turned else (rows, columns)
    pixels = _rgb(scaler, frame, h, w)
    if look.turned:
        pixels = pixels.swapaxes(0, 1)
    up, over = (-1 if mirrored else 1 for mirrored in look.mirrored)
    return pixels[::up, ::over][top : top + height, left : left + width]


def _rgb(scaler: VideoReformatter, frame: av.VideoFrame, h: int, w: int) -> Picture:
    light, primaries = frame.color_trc, frame.color_primaries
    if light in (hdr.PQ, hdr.HLG):
        return hdr.to_sdr(_pixels(scaler, frame, h, w, "rgb48le"), light, primaries)
    if not any(component.is_alpha for component in frame.format.components):
        return _pixels(scaler, frame, h, w, "rgb24")
    rgba = _pixels(scaler, frame, h, w, "rgba").astype(np.uint32)
    alpha, behind = rgba[..., 3:], np.array(BACKGROUND[:3], np.uint32)
    return ((rgba[..., :3] * alpha + behind * (255 - alpha) + 127) // 255).astype(np.uint8)


def _pixels(scaler, frame, h: int, w: int, layout: str) -> np.ndarray:
    """Return a view of the scaler's output."""
    plane = scaler.reformat(frame, w, h, layout, interpolation=SCALING, threads=1).planes[0]
    number, kind = (4 if layout == "rgba" else 3), np.dtype("<u2" if "48" in layout else "u1")
    strides = (plane.line_size, number * kind.itemsize, kind.itemsize)
    return np.ndarray((h, w, number), kind, plane, strides=strides)
