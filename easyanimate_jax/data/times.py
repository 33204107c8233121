"""Map times to frames: videos are read by time stamps, never by counting frames.

One rule holds for clips, films, masks and controls: the frame shown at time t is the last one whose
stamp is at most t, within the rounding of stamps (`Timeline.tolerance`). Stamps are read from
packets without decoding; for mp4 and mov the header suffices, so a long film is cheap. Frames that
are never shown are excluded: frames cut by an edit list, hidden VP8 frames, and frames before the
first key frame.
"""

import io
import struct
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from jaxtyping import Float, Int64

from easyanimate_jax.facts import FPS

MARGIN = 0.001  # seconds; Matroska and FLV round stamps to multiples of this
COARSE = 0.005  # seconds; half a tick of a GIF's clock
BACK = 1.0  # seconds by which decoding times may run back: some programs do not order them

Seconds = Float[np.ndarray, " F"]


def shown_at(stamps: Seconds, targets: Float[np.ndarray, " n"], tolerance: float) -> np.ndarray:
    """Return the number of the frame shown at each target: the last with stamp <= target.

    `stamps` are ascending, in seconds. A stamp up to `tolerance` seconds after its target still
    counts. The result is -1 for a target before the first frame.
    """
    return np.searchsorted(stamps, targets + (tolerance + 1e-9), side="right") - 1


def frames_in(seconds: float | np.ndarray, fps: float | int = FPS) -> np.ndarray | np.int64:
    """Return the number of frames, at `fps` per second, of a film that lasts `seconds`.

    `seconds` is the time from its first to its last stamp.
    """
    return np.floor(np.asarray(seconds) * fps + fps * MARGIN).astype(np.int64) + 1


def clip_frames(
    num_frames: np.ndarray | int,
    fps: np.ndarray | float,
    reference_rate: bool,
    rate: int = FPS,
) -> np.ndarray | np.int64:
    """Return how many training frames each clip offers, at `rate` a second.

    `fps` is the average rate of a clip, 0 for pictures. With `reference_rate`, every
    `stride_of(fps)`-th frame counts, as in the reference.
    """
    num_frames, fps = np.asarray(num_frames, np.int64), np.asarray(fps, np.float64)
    if reference_rate:
        return (num_frames - 1) // stride_of(fps) + 1
    seconds = np.divide(num_frames - 1, fps, out=np.zeros_like(fps), where=fps > 0)
    return frames_in(seconds, rate)


def stride_of(fps: float | np.ndarray) -> np.ndarray | np.int64:
    """Return the frame stride that the reference uses to approximate `FPS` (spec 6.6)."""
    return np.maximum(1, np.round(np.asarray(fps) / FPS)).astype(np.int64)


class ClockError(ValueError):
    """The decoding times of a film run back."""


class Timeline(NamedTuple):
    """The time stamps of the frames that a film shows."""

    stamps: Int64[np.ndarray, " F"]  # ascending, in units of `unit`
    unit: Fraction  # seconds
    keys: Int64[np.ndarray, "K 2"]  # key frames: stamp, ascending, and the seek target
    exact: bool  # True: decoded frames have these stamps; False: only their order is known

    @property
    def seconds(self) -> Seconds:
        """Return the stamps in seconds; the first frame is at 0."""
        return (self.stamps - self.stamps[0]) * float(self.unit)

    @property
    def rate(self) -> float:
        """Return the average frames per second from first to last stamp; 0 for one frame."""
        span = int(self.stamps[-1] - self.stamps[0]) * self.unit
        return float((len(self.stamps) - 1) / span) if span else 0.0

    @property
    def tolerance(self) -> float:
        """Return half a tick of the film's clock, limited to `MARGIN` to `COARSE` seconds."""
        return min(max(float(self.unit) / 2, MARGIN), COARSE)

    def at(
        self,
        start: float | int,
        count: int,
        first: int = 0,
        end: int | None = None,
        fps: float | int = FPS,
    ) -> np.ndarray:
        """Return the numbers of `count` frames at `fps` per second.

        The first is shown `start` seconds after frame `first`. Raises ValueError if the film from
        there to frame `end` is too short.
        """
        seconds, end = self.seconds, len(self.stamps) if end is None else end
        if not 0 <= first < end <= len(seconds):
            raise ValueError(f"has {len(seconds)} frames, and {first} to {end} are asked for")
        targets = seconds[first] + start + np.arange(count) / fps
        if targets[-1] > seconds[end - 1] + self.tolerance + 1e-9:
            have = max(0, int(frames_in(seconds[end - 1] - seconds[first] - start, fps)))
            raise ValueError(
                f"has {have} frames at {fps:g} a second from second {start:g} on, and {count} are "
                f"asked for; ask for fewer, or give a longer film"
            )
        return shown_at(seconds, targets, self.tolerance)

    def key_before(self, number: int) -> tuple[int, int] | None:
        """Return (stamp, seek target) of the last key frame at or before frame `number`.

        None stands for the beginning of the file.
        """
        place = int(np.searchsorted(self.keys[:, 0], self.stamps[number], side="right")) - 1
        return tuple(self.keys[place].tolist()) if self.exact and place > 0 else None


def read_timeline(container, stream) -> Timeline | None:
    """Return the timeline of a video stream, from all of its packets; None if it has no frame.

    The stream must be at its beginning. One packet is one frame. Frames before the first key frame
    are skipped, because they refer to missing frames. Seek targets are decoding times in transport
    streams and presentation times in all other formats. Raises ClockError if the clock runs
    back, as where one recording was written behind another: their frames would be mixed.
    """
    by_decoding = container.format.name == "mpegts"
    hides = stream.codec_context.name == "vp8"
    shown, keys, exact, first, latest = [], [], True, None, None
    for packet in container.demux(stream):
        if packet.dts is not None:
            if latest is not None and (latest - packet.dts) * stream.time_base > BACK:
                raise ClockError(
                    f"its clock runs back after {float(latest * stream.time_base):.1f} s: several "
                    f"recordings follow each other; write it anew (ffmpeg -i IN -c copy OUT.mkv)"
                )
            latest = packet.dts
        if not packet.size or (hides and not bytes(packet)[0] & 0x10):  # VP8's show_frame
            continue
        stamp = packet.dts if packet.pts is None else packet.pts
        exact = exact and packet.pts is not None
        if stamp is None:
            stamp, exact = len(shown), False
        if packet.is_keyframe:
            decoded = by_decoding and packet.dts is not None
            keys.append((stamp, packet.dts if decoded else stamp))
            first = stamp if first is None else first
        if first is not None and stamp >= first and not packet.is_discard:
            shown.append(stamp)
    if not shown:
        return None
    stamps = np.sort(np.array(shown, np.int64))
    exact = exact and bool((np.diff(stamps) > 0).all())
    places = np.array(sorted(keys), np.int64).reshape(-1, 2)
    return Timeline(stamps, stream.time_base, places, exact)


class HeadersOnly:
    """An mp4 or mov file whose media data read as zeros, so that a pass over it reads only headers.

    A truncated file also reads as zeros after its end. The frames of its header are then counted,
    and decoding the file itself reports the missing ones.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.place, self.blanks = file, 0, []
        self.size = file.seek(0, io.SEEK_END)
        place = 0
        while place + 8 <= self.size:
            file.seek(place)
            head = file.read(16).ljust(16, b"\0")
            length, kind = struct.unpack(">I4s", head[:8])
            inner = place + 8
            if length == 1:
                (length,), inner = struct.unpack(">Q", head[8:]), place + 16
            end = place + length if length else self.size
            if end < inner:
                break
            if kind == b"mdat":
                self.blanks.append((inner, end))
            place = end
        self.size = max([self.size, *(end for _, end in self.blanks)])

    def read(self, count: int = -1) -> bytes:
        """Read as a binary file does; media data are zeros."""
        place, count = self.place, self.size if count < 0 else count
        for first, end in self.blanks:
            if first <= place < end:
                self.place += min(count, end - place)
                return bytes(self.place - place)
            if place < first:
                count = min(count, first - place)
                break
        self.file.seek(place)
        content = self.file.read(count)
        self.place += len(content)
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position as a binary file does."""
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def tell(self) -> int:
        """Return the position."""
        return self.place


def header_timeline(file: BinaryIO) -> Timeline | None:
    """Return the timeline of the first video stream of an mp4 or mov file, from its headers."""
    options = {"fflags": "noparse+nofillin"}  # parsers would read the frames
    headers = HeadersOnly(file)
    with av.open(headers, format="mov", container_options=options) as container:
        if not container.streams.video:
            return None
        return read_timeline(container, container.streams.video[0])
