"""Video and picture files: open safely, decode, resize, write.

FFmpeg takes a path for a URL or a script, so files are opened here, recognised by their first
bytes, and handed over as file objects. Headers are checked before anything is decoded, and
decoded frames are counted: a damaged file is a `ValueError` that names it, never a short clip.
Files of strangers are decoded in processes of their own, see data/decode.py.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageOps

from easyanimate_jax.data.paths import open_regular
from easyanimate_jax.facts import FPS

MAX_SIDE = 4096
MAX_PIXELS = 2**29  # of one clip in memory: 1.6 GB
MAX_BYTES = 2**30  # of a file inside an archive
CODECS = {"av1", "ffv1", "h264", "hevc", "libdav1d", "mpeg4", "prores", "vp8", "vp9"}
PICTURES = ("PNG", "JPEG", "WEBP")
# Of FFmpeg's scaler: bilinear with antialias like `resize_crop`, and chroma for every pixel. Its
# defaults are a little faster, and more than a level too dark.
SCALING = (
    Interpolation.BILINEAR
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
MAGIC = (  # (offset, bytes, FFmpeg demuxer, or "image" for Pillow)
    (4, b"ftyp", "mov"),
    (4, b"moov", "mov"),
    (4, b"mdat", "mov"),
    (4, b"wide", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"\x89PNG", "image"),
    (0, b"\xff\xd8\xff", "image"),
    (8, b"WEBP", "image"),
)

Frames = UInt8[np.ndarray, "F H W 3"]
Picture = UInt8[np.ndarray, "H W 3"]


class Member(NamedTuple):
    """A file that is a part of another one, such as a tar's: read in place, never extracted."""

    archive: Path
    offset: int
    size: int  # bytes
    name: str

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    def read(self) -> bytes:
        if self.size > MAX_BYTES:
            raise ValueError(f"{self} has {self.size:,} bytes; at most {MAX_BYTES:,} are read")
        with open_regular(self.archive) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError(f"{self}: {len(content):,} of {self.size:,} bytes are there")
        return content


class Example(NamedTuple):
    """A file that is a field of an example of an open data set."""

    examples: object  # by index, dicts of fields
    index: int
    field: str
    name: str
    folder: Path  # of the data set

    def __str__(self) -> str:
        return f"example {self.index}:{self.name}"

    def read(self) -> bytes:
        return self.examples[self.index][self.field]


class Content(NamedTuple):
    """A file whose bytes are here."""

    content: bytes
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        return self.content


File = Path | Member | Example | Content


class Probe(NamedTuple):
    """What the header says; `height` and `width` are as displayed, after rotation."""

    kind: str  # "video" or "image"
    num_frames: int
    height: int
    width: int
    fps: float  # 0 for images


def probe(path: File) -> Probe:
    """Kind, frame count, size and rate of a file; decodes at most one frame."""
    with _open(path) as (file, demuxer):
        if demuxer == "image":
            with _picture(path, file) as image:
                rotated = (
                    image.getexif().get(0x0112, 1) >= 5
                )  # EXIF orientations with a quarter turn
                width, height = image.size[::-1] if rotated else image.size
            return Probe("image", 1, height, width, 0.0)
        with _video(path, file, demuxer) as (container, stream):
            num_frames = stream.frames
            frame = next(container.decode(stream), None)
            if frame is None:
                raise ValueError(f"{path}: no frame could be decoded; replace the file")
            height, width = _displayed(frame)
            if not 0 < num_frames < 2**31:  # WebM and others store none: one packet is one frame
                container.seek(0)
                num_frames = sum(packet.size > 0 for packet in container.demux(stream))
            return Probe("video", num_frames, height, width, float(stream.average_rate or 0))


def read_clip(
    path: File,
    start: int,
    count: int,
    stride: int = 1,
    size: tuple[int, int] | None = None,
) -> Frames:
    """Frames start, start + stride, ... of a video; all `count` of them, or a `ValueError`.

    With a `size` (height, width), each is resized and cropped as it comes, as by `resize_crop`.
    """
    last, done, clip = start + (count - 1) * stride, 0, None
    scaler = VideoReformatter()
    with _open(path) as (file, demuxer):
        if demuxer == "image":
            raise ValueError(f"{path} is a picture, not a video; give it type 'image'")
        with _video(path, file, demuxer) as (container, stream):
            height, width = size or (stream.height, stream.width)
            if count * width * height > MAX_PIXELS:
                raise ValueError(
                    f"{path}: {count} frames of {height}x{width} exceed {MAX_PIXELS} "
                    f"pixels in memory; scale the file down"
                )
            for index, frame in enumerate(container.decode(stream)):
                _check_size(path, frame.height, frame.width)  # it may change on the way
                if frame.is_corrupt:  # the decoder made something up
                    raise ValueError(f"{path}: frame {index} is damaged; replace the file")
                if index >= start and (index - start) % stride == 0:
                    picture = _upright(scaler, frame, size)
                    if clip is None:
                        clip = np.empty((count, *picture.shape), np.uint8)
                    if picture.shape != clip.shape[1:]:
                        raise ValueError(f"{path}: frames change their size; encode it anew")
                    clip[done], done = picture, done + 1
                if index == last:
                    break
    if done < count:
        raise ValueError(
            f"{path}: {done} frames decoded of {count} wanted (from {start}, every "
            f"{stride}); the file is damaged or shorter than its header says"
        )
    return clip


def read_frames(path: File, indices: Sequence[int], side: int) -> Frames:
    """The frames of a video at the ascending `indices`, in one pass, at most `side` pixels long."""
    frames, scaler = [], VideoReformatter()
    with _open(path) as (file, demuxer):
        if demuxer == "image":
            raise ValueError(f"{path} is a picture, not a video; give it type 'image'")
        with _video(path, file, demuxer) as (container, stream):
            for index, frame in enumerate(container.decode(stream)):
                if index == indices[len(frames)]:
                    size = fit_side(*_displayed(frame), side)
                    frames.append(np.array(_upright(scaler, frame, size)))
                if len(frames) == len(indices):
                    break
    if len(frames) < len(indices):
        raise ValueError(f"{path}: frame {indices[len(frames)]} does not decode; replace the file")
    return np.stack(frames)


def fit_side(height: int, width: int, side: int) -> tuple[int, int]:
    """The size scaled so that its longer side is at most `side`."""
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def read_image(path: File) -> Picture:
    """A picture as RGB, turned as its EXIF orientation says."""
    with _open(path) as (file, demuxer):
        if demuxer != "image":
            raise ValueError(f"{path} is a video, not a picture; give it type 'video'")
        with _picture(path, file) as image:
            try:
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
            except (OSError, SyntaxError) as error:
                raise ValueError(f"{path}: the picture does not decode ({error})") from error


def resize_crop(
    frames: UInt8[np.ndarray, "F h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "F {height} {width} 3"]:
    """Scale to cover (height, width), bilinear with antialias, then crop the centre (spec 8.3)."""
    return np.stack([_resize_crop(frame, height, width) for frame in frames])


def _resize_crop(
    frame: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    if frame.shape[:2] == (height, width):
        return frame
    rows, columns, top, left = _cover(*frame.shape[:2], height, width)
    resized = Image.fromarray(frame).resize((columns, rows), Image.Resampling.BILINEAR)
    return np.asarray(resized)[top : top + height, left : left + width]


def _cover(h: int, w: int, height: int, width: int) -> tuple[int, int, int, int]:
    """What (h, w) is scaled to, so that it covers (height, width), and the corner of the crop."""
    tall = height * w > width * h
    rows, columns = (height, w * height // h) if tall else (h * width // w, width)
    return rows, columns, round((rows - height) / 2), round((columns - width) / 2)


def write_video(
    path: Path, frames: Frames, fps: int = FPS, crf: int = 18, comment: str = ""
) -> None:
    """H.264 in yuv420p, which every player shows; `crf` 0 is best, 51 worst.

    The `comment` lies in the file's metadata. Equal frames give equal bytes: x264's macroblock tree
    is off, with which the bytes differed from call to call (seen up to 320 x 240 pixels).
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"{path}: {height}x{width} frames cannot be yuv420p; use even sizes")
    with open(path, "wb") as file, av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = comment
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())


def write_png(path: Path, picture: Picture) -> None:
    Image.fromarray(picture).save(path, format="PNG")


def write_gif(path: Path, frames: Frames, fps: int = FPS) -> None:
    """An endless animation; GIF knows 256 colours."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=1000 // fps, loop=0)


def contact_sheet(
    videos: UInt8[np.ndarray, "B F H W 3"], columns: int = 8
) -> UInt8[np.ndarray, "_ _ 3"]:
    """One row per video: up to `columns` of its frames, first and last among them."""
    picks = np.linspace(0, videos.shape[1] - 1, min(columns, videos.shape[1])).round().astype(int)
    return rearrange(videos[:, picks], "B F H W C -> (B H) (F W) C")


@contextmanager
def _open(path: File) -> Iterator[tuple[BinaryIO, str]]:
    """The open file and its demuxer, told from its first bytes and never from its name."""
    with _bytes(path) as file:
        head = file.read(16)
        file.seek(0)
        for offset, magic, demuxer in MAGIC:
            if head[offset : offset + len(magic)] == magic:
                yield file, demuxer
                return
    raise ValueError(
        f"{path} starts with {head[:12]!r}: not mp4, mov, mkv, webm, avi, png, jpeg or webp"
    )


def _bytes(path: File) -> BinaryIO:
    return open_regular(path) if isinstance(path, Path) else io.BytesIO(path.read())


@contextmanager
def _picture(path: File, file: BinaryIO) -> Iterator[Image.Image]:
    try:
        image = Image.open(file, formats=PICTURES)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error
    with image:
        _check_size(path, image.height, image.width)
        yield image


@contextmanager
def _video(path: File, file: BinaryIO, demuxer: str) -> Iterator[tuple]:
    """The container and its first video stream; FFmpeg's errors become `ValueError`s."""
    try:
        with av.open(file, format=demuxer) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context.name not in CODECS:
                raise ValueError(
                    f"{path} is coded as {stream.codec_context.name}; read are {sorted(CODECS)}"
                )
            _check_size(path, stream.height, stream.width)
            stream.codec_context.thread_count = 1  # the others would idle, at a stack each
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{path}: does not decode ({error.strerror}); replace the file") from error


def _check_size(path: File, height: int, width: int) -> None:
    if not 0 < max(height, width) <= MAX_SIDE:
        raise ValueError(f"{path} is {height}x{width}; at most {MAX_SIDE} pixels a side are read")


def _displayed(frame: av.VideoFrame) -> tuple[int, int]:
    """Height and width after rotation."""
    return (frame.height, frame.width)[:: -1 if frame.rotation % 180 else 1]


def _upright(
    scaler: VideoReformatter, frame: av.VideoFrame, size: tuple[int, int] | None
) -> Picture:
    """The frame as RGB, turned, resized and cropped to `size`: a view of the scaler's output."""
    height, width = size or _displayed(frame)
    rows, columns, top, left = _cover(*_displayed(frame), height, width)
    h, w = (rows, columns)[:: -1 if frame.rotation % 180 else 1]
    plane = scaler.reformat(frame, w, h, "rgb24", interpolation=SCALING, threads=1).planes[0]
    pixels = np.ndarray((h, w, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
    return np.rot90(pixels, frame.rotation // 90)[top : top + height, left : left + width]
