"""Video and picture files: open them safely, decode, resize, write.

FFmpeg interprets some paths as URLs or scripts, so this module opens files itself, recognises them
by their first bytes, and passes file objects to FFmpeg. Headers are checked before anything is
decoded, and decoded frames are counted: a damaged file raises a `ValueError` that names it, and
never gives a short clip. The rules are in data/times.py (which frame is shown when), data/shown.py
(how it looks) and data/pictures.py. data/decode.py decodes untrusted files in separate processes.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

from easyanimate_jax.data.paths import open_regular, read_part
from easyanimate_jax.data.pictures import (
    Animation,
    Picture,
    fill,
    fit_side,
    is_animated,
    open_picture,
    picture_kind,
    size_of,
    to_rgb,
)
from easyanimate_jax.data.shown import SCALING
from easyanimate_jax.data.streams import Allow, Film, free, open_film
from easyanimate_jax.data.times import Timeline
from easyanimate_jax.facts import FPS
from easyanimate_jax.storage.stores import Place

MAX_PIXELS = 2**29  # pixels of one clip in memory: 1.6 GB
MAX_BYTES = 2**30  # bytes of a file inside an archive
MAGIC = (  # (offset, bytes, FFmpeg demuxer, or "image" for Pillow)
    (4, b"ftyp", "mov"),
    (4, b"moov", "mov"),
    (4, b"mdat", "mov"),
    (4, b"wide", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"FLV\x01", "flv"),
    (0, b"\x89PNG", "image"),
    (0, b"\xff\xd8\xff", "image"),
    (0, b"GIF8", "image"),
    (0, b"II*\0", "image"),
    (0, b"MM\0*", "image"),
    (8, b"WEBP", "image"),
)
PACKETS = ((0, 188), (4, 192))  # MPEG transport streams: offset and bytes of a packet
HEAD = 2 * 192 + 8  # bytes that identify the format of a file
BT709 = 1  # FFmpeg's number of BT.709's matrix, primaries and transfer
LIMITED = 1  # FFmpeg's number of the range from 16 to 235

Frames = UInt8[np.ndarray, "F H W 3"]
Size = tuple[int, int] | int | None  # crop to (height, width), or scale to at most this long a side
Sample = tuple[int, Size]  # number of a frame, and the size of its picture


class Member(NamedTuple):
    """A file inside another one, such as a tar; it is read in place, never extracted."""

    archive: Place
    offset: int
    size: int  # bytes
    name: str

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    def read(self) -> bytes:
        """Return the bytes. Raises ValueError if the file is too large or incomplete."""
        if self.size > MAX_BYTES:
            raise ValueError(f"{self} has {self.size:,} bytes; use at most {MAX_BYTES:,}")
        return read_part(self.archive, self.offset, self.size)


class Example(NamedTuple):
    """A file that is a field of an example in a TFDS data set."""

    examples: object  # indexable; an example is a dict of fields
    index: int
    field: str
    name: str
    folder: Path  # folder of the data set

    def __str__(self) -> str:
        return f"example {self.index}:{self.name}"

    def read(self) -> bytes:
        """Return the bytes."""
        return self.examples[self.index][self.field]


class Cell(NamedTuple):
    """A file in a cell of a parquet table; it is read in place, see data/cells.py."""

    table: Place
    leaf: str  # the values: `video` or `video.bytes`
    group: int  # of rows
    row: int  # in its group
    name: str

    def __str__(self) -> str:
        return f"{self.table}:{self.name}"

    def read(self) -> bytes:
        """Return the bytes. Raises ValueError if the table does not hold them now."""
        from easyanimate_jax.data.cells import read_cell  # the workers do not need pyarrow

        return read_cell(self.table, self.leaf, self.group, self.row)


class Content(NamedTuple):
    """A file whose bytes are in memory."""

    content: bytes
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Return the bytes."""
        return self.content


File = Place | Member | Example | Cell | Content


class Probe(NamedTuple):
    """The properties of a file as its packets and header state them.

    `height` and `width` are as displayed: after rotation, with square pixels.
    """

    kind: str  # "video" or "image"
    num_frames: int  # frames that are shown
    height: int
    width: int
    fps: float  # average from the first frame to the last; 0 for images

    @property
    def seconds(self) -> float:
        """Return the seconds from the first frame's time stamp to the last one's."""
        return (self.num_frames - 1) / self.fps if self.fps else 0.0


def probe(path: File, allow: Allow = free) -> Probe:
    """Return kind, frame count, size and rate of a file; at most one frame of a film is decoded.

    `allow` is that of `read_clip`. Raises ValueError, naming the file, if it cannot be read.
    """
    with _open(path) as (file, demuxer):
        if demuxer == "image":
            with open_picture(path, file) as image:
                if not is_animated(image):
                    return Probe("image", 1, *size_of(image), 0.0)
        with open_film(path, file, demuxer, allow) as film:
            _, size, _ = next(film.walk(0, 0), (0, None, None))
            if size is None:
                raise ValueError(f"{path}: no frame could be decoded; replace the file")
            return Probe("video", len(film.timeline.stamps), *size, film.timeline.rate)


def read_clip(
    path: File,
    start: int,
    count: int,
    stride: int = 1,
    size: tuple[int, int] | None = None,
    allow: Allow = free,
) -> Frames:
    """Return the frames start, start + stride, ... of a video; raise ValueError if any is missing.

    With a `size` (height, width), each frame is resized and cropped as by `resize_crop`. `allow` is
    called with the number of pixels about to be decoded.
    """

    def choose(timeline: Timeline) -> np.ndarray:
        numbers = start + stride * np.arange(count)
        have = int((numbers < len(timeline.stamps)).sum())
        if have < count:
            raise ValueError(
                f"{have} frames decoded of {count} wanted (from {start}, every {stride}); the "
                f"file is damaged or shorter than its header says"
            )
        return numbers

    return _read(path, choose, size, allow)


def read_at(
    path: File,
    start: float | int,
    count: int,
    size: tuple[int, int] | None = None,
    first: int = 0,
    end: int | None = None,
    allow: Allow = free,
    fps: float | int = FPS,
) -> Frames:
    """Return `count` frames at `fps` per second, from `start` seconds after frame `first` on.

    Raises ValueError if a frame would be shown later than frame `end` - 1. `size` and `allow` are
    those of `read_clip`.
    """
    return _read(path, lambda line: line.at(start, count, first, end, fps), size, allow)


def read_frames(
    path: File,
    indices: Sequence[int],
    side: int,
    allow: Allow = free,
) -> Frames:
    """Return the frames at the ascending `indices`, at most `side` pixels long, in one pass."""

    def choose(timeline: Timeline) -> np.ndarray:
        if indices[-1] >= len(timeline.stamps):
            raise ValueError(f"frame {indices[-1]} does not decode; replace the file")
        return np.array(indices)

    return _read(path, choose, side, allow)


def read_samples(path: File, samples: Sequence[Sample], allow: Allow = free) -> Iterator[Picture]:
    """Yield the picture of each of the ascending `samples` of a video, decoded in one pass.

    Only one picture is held, so a film may be of any length. `allow` is that of `read_clip`. Raises
    ValueError, naming the file, at the first frame that cannot be read.
    """
    with _open(path) as (file, demuxer), open_film(path, file, demuxer, allow) as film:
        yield from _pictures(path, film, samples)


def read_seconds(path: File, allow: Allow = free) -> list[float]:
    """Return the time of each frame of a video, in seconds after the first."""
    with _open(path) as (file, demuxer), open_film(path, file, demuxer, allow) as film:
        return film.timeline.seconds.tolist()


def read_image(path: File, mask: bool = False) -> Picture:
    """Return a picture as RGB by the rules of data/pictures.py.

    For a `mask` with an alpha channel, return that channel as grey. Raises ValueError for a video.
    """
    with _open(path) as (file, demuxer):
        if demuxer == "image":
            with open_picture(path, file) as image:
                if not is_animated(image):
                    return to_rgb(path, image, mask)
        raise ValueError(f"{path} is a video, not a picture; give it type 'video'")


def _read(path: File, choose: Callable, size: Size, allow: Allow) -> Frames:
    """Return the frames whose ascending numbers `choose(timeline)` returns; they may repeat."""
    with _open(path) as (file, demuxer), open_film(path, file, demuxer, allow) as film:
        try:
            numbers = choose(film.timeline).tolist()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for done, picture in enumerate(_pictures(path, film, [(n, size) for n in numbers])):
            if not done:
                _check_memory(path, len(numbers), *picture.shape[:2])
                clip = np.empty((len(numbers), *picture.shape), np.uint8)
            clip[done] = picture
    return clip


def _pictures(path: File, film: Film | Animation, samples: Sequence[Sample]) -> Iterator[Picture]:
    """Yield the picture of each of the ascending samples; they may repeat."""
    shapes, drawn, done = {}, None, 0
    for number, shown, draw in film.walk(samples[0][0], samples[-1][0]):
        if number > samples[done][0]:
            raise ValueError(f"{path}: frame {samples[done][0]} is damaged; replace the file")
        while samples[done][0] == number:
            size = samples[done][1]
            if samples[done] != drawn:
                picture = draw(fit_side(*shown, size) if isinstance(size, int) else size)
                drawn = samples[done]
            if picture.shape != shapes.setdefault(size, picture.shape):
                raise ValueError(f"{path}: frames change their size; encode it again")
            yield picture
            done += 1
            if done == len(samples):
                return
    raise ValueError(
        f"{path}: {done} frames decoded of {len(samples)} wanted, frame {samples[done][0]} is "
        f"missing; the file is damaged or shorter than its header says"
    )


def _check_memory(path: File, count: int, height: int, width: int) -> None:
    if count * width * height > MAX_PIXELS:
        raise ValueError(
            f"{path}: {count} frames of {height}x{width} exceed {MAX_PIXELS} pixels in memory; "
            f"scale the file down"
        )


def resize_crop(
    frames: UInt8[np.ndarray, "F h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "F {height} {width} 3"]:
    """Scale to cover (height, width), bilinear with antialias, then crop the centre (spec 8.3)."""
    return np.stack([fill(frame, height, width) for frame in frames])


def write_video(
    path: Path, frames: Frames, fps: float | int = FPS, crf: int = 18, comment: str = ""
) -> None:
    """Write H.264 in yuv420p, tagged as BT.709; `crf` 0 is best, 51 worst.

    The header comes first, so that a browser plays the file while it loads. `comment` is stored in
    the metadata. Equal frames give equal bytes; for this, x264's macroblock tree is off, because it
    made the bytes vary between calls (seen up to 320 x 240 pixels). Raises ValueError for odd
    sizes.
    """
    count, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"{path}: {height}x{width} frames cannot be yuv420p; use even sizes")
    # FFmpeg's `faststart` reopens the file by its name. Reserving room for the header does not.
    room = {"moov_size": str(4096 + 32 * count + 4 * len(comment.encode()))}
    with open(path, "wb") as file, av.open(file, "w", format="mp4", options=room) as container:
        if comment:
            container.metadata["comment"] = comment
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED
        scaler = VideoReformatter()
        for pixels in frames:
            frame = scaler.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels)),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=SCALING,
                threads=1,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_png(path: Path, picture: Picture) -> None:
    """Write a picture as PNG, whatever the suffix of `path`."""
    Image.fromarray(picture).save(path, format="PNG")


def write_gif(path: Path | io.BytesIO, frames: Frames, fps: float | int = FPS) -> None:
    """Write an endless animation; GIF supports 256 colours and stamps in units of 10 ms."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    stamps = np.rint(np.arange(len(frames) + 1) * 100 / fps) * 10
    lasts = np.diff(stamps).astype(int).tolist()
    first.save(path, "GIF", save_all=True, append_images=rest, duration=lasts, loop=0)


def contact_sheet(
    videos: UInt8[np.ndarray, "B F H W 3"], columns: int = 8
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Return one row per video: up to `columns` of its frames, including the first and the last."""
    picks = np.linspace(0, videos.shape[1] - 1, min(columns, videos.shape[1])).round().astype(int)
    return rearrange(videos[:, picks], "B F H W C -> (B H) (F W) C")


@contextmanager
def _open(path: File) -> Iterator[tuple[BinaryIO, str]]:
    """Yield the open file and its demuxer, from its first bytes and never from its name."""
    with _bytes(path) as file:
        head = file.read(HEAD)
        file.seek(0)
        yield file, _kind(path, head, file)


def _kind(path: File, head: bytes, file: BinaryIO) -> str:
    for offset, magic, demuxer in MAGIC:
        if head[offset : offset + len(magic)] == magic:
            if magic == b"ftyp":
                return picture_kind(path, head[: int.from_bytes(head[:4])]) or demuxer
            return "mjpeg" if magic == b"\xff\xd8\xff" and _is_mjpeg(file) else demuxer
    for first, length in PACKETS:
        if len(head) >= HEAD and set(head[first : first + 2 * length + 1 : length]) == {0x47}:
            return "mpegts"
    raise ValueError(
        f"{path} starts with {head[:12]!r}: not mp4, mov, mkv, webm, avi, ts, flv, mjpeg, gif, "
        f"png, jpeg, webp, avif or tiff"
    )


def _is_mjpeg(file: BinaryIO) -> bool:
    """Return True if several JPEGs follow each other.

    A photo with a second view says so in its header, and is not a film.
    """
    content = file.read()
    file.seek(0)
    return b"\xff\xd9\xff\xd8\xff" in content and b"MPF\0" not in content[: 2**16]


def _bytes(path: File) -> AbstractContextManager[BinaryIO]:
    return open_regular(path) if isinstance(path, Place) else io.BytesIO(path.read())
