"""Video and picture files: open safely, decode, resize, write.

FFmpeg takes a path for a URL or a script, so files are opened here, recognised by their first
bytes, and handed over as file objects. Headers are checked before anything is decoded, and
decoded frames are counted: a damaged file is a `ValueError` that names it, never a short clip.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageOps

MAX_SIDE = 4096
MAX_PIXELS = 2**29  # of one clip in memory: 1.6 GB
CODECS = {"av1", "ffv1", "h264", "hevc", "libdav1d", "mpeg4", "prores", "vp8", "vp9"}
PICTURES = ("PNG", "JPEG", "WEBP")
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


class Probe(NamedTuple):
    """What the header says; `height` and `width` are as displayed, after rotation."""

    kind: str  # "video" or "image"
    num_frames: int
    height: int
    width: int
    fps: float  # 0 for images


def safe_path(root: str | os.PathLike, name: str) -> Path:
    """`root/name`, refused unless it stays inside `root` after links are followed."""
    if "\0" in name or ":" in name.split("/")[0]:
        raise ValueError(f"file name {name!r} is not a relative path; URLs are not read")
    path, root = Path(os.path.realpath(os.path.join(root, name))), Path(os.path.realpath(root))
    if root not in path.parents:
        raise ValueError(f"file name {name!r} leaves the data folder {root}; move the file into it")
    return path


def probe(path: Path) -> Probe:
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
            turned = frame.rotation % 180 != 0
            height, width = (frame.height, frame.width)[:: -1 if turned else 1]
            if not num_frames:  # WebM and others do not store it: one packet is one frame
                container.seek(0)
                num_frames = sum(packet.size > 0 for packet in container.demux(stream))
            return Probe("video", num_frames, height, width, float(stream.average_rate or 0))


def read_clip(path: Path, start: int, count: int, stride: int = 1) -> Frames:
    """Frames start, start + stride, ... of a video; all `count` of them, or a `ValueError`."""
    last = start + (count - 1) * stride
    frames = []
    with _open(path) as (file, demuxer):
        if demuxer == "image":
            raise ValueError(f"{path} is a picture, not a video; give it type 'image'")
        with _video(path, file, demuxer) as (container, stream):
            if count * stream.width * stream.height > MAX_PIXELS:
                raise ValueError(
                    f"{path}: {count} frames of {stream.height}x{stream.width} exceed {MAX_PIXELS} "
                    f"pixels in memory; scale the file down"
                )
            for index, frame in enumerate(container.decode(stream)):
                if index >= start and (index - start) % stride == 0:
                    frames.append(_upright(frame))
                if index == last:
                    break
    if len(frames) < count:
        raise ValueError(
            f"{path}: {len(frames)} frames decoded of {count} wanted (from {start}, every "
            f"{stride}); the file is damaged or shorter than its header says"
        )
    return np.stack(frames)


def read_image(path: Path) -> Picture:
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
    _, h, w, _ = frames.shape
    if (h, w) == (height, width):
        return frames
    tall = height * w > width * h
    rows, columns = (height, w * height // h) if tall else (h * width // w, width)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    resized = np.stack(
        [
            Image.fromarray(frame).resize((columns, rows), Image.Resampling.BILINEAR)
            for frame in frames
        ]
    )
    return resized[:, top : top + height, left : left + width]


def write_video(path: Path, frames: Frames, fps: int = 8, crf: int = 18, comment: str = "") -> None:
    """H.264 in yuv420p, which every player shows; `crf` 0 is best, 51 worst.

    The `comment` lies in the file's metadata.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"{path}: {height}x{width} frames cannot be yuv420p; use even sizes")
    with open(path, "wb") as file, av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())


def write_png(path: Path, picture: Picture) -> None:
    Image.fromarray(picture).save(path, format="PNG")


def write_gif(path: Path, frames: Frames, fps: int = 8) -> None:
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
def _open(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """The open file and its demuxer, told from its first bytes and never from its name."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        head = file.read(16)
        file.seek(0)
        for offset, magic, demuxer in MAGIC:
            if head[offset : offset + len(magic)] == magic:
                yield file, demuxer
                return
    raise ValueError(
        f"{path} starts with {head[:12]!r}: not mp4, mov, mkv, webm, avi, png, jpeg or webp"
    )


@contextmanager
def _picture(path: Path, file: BinaryIO) -> Iterator[Image.Image]:
    try:
        image = Image.open(file, formats=PICTURES)
    except OSError as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error
    with image:
        _check_size(path, image.height, image.width)
        yield image


@contextmanager
def _video(path: Path, file: BinaryIO, demuxer: str) -> Iterator[tuple]:
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
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{path}: does not decode ({error.strerror}); replace the file") from error


def _check_size(path: Path, height: int, width: int) -> None:
    if not 0 < max(height, width) <= MAX_SIDE:
        raise ValueError(f"{path} is {height}x{width}; at most {MAX_SIDE} pixels a side are read")


def _upright(frame: av.VideoFrame) -> Picture:
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
