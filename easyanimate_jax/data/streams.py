"""Videos in open files: the container's first video stream, or the frames of an animation.

A film has a `timeline` and a `walk` over its frames. Reading begins at the key frame before the
first wanted frame. Frames keep their numbers, which are derived from their time stamps.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from easyanimate_jax.data.pictures import MAX_SIDE, Animation, Picture, is_animated, open_picture
from easyanimate_jax.data.shown import Look, look_of, render
from easyanimate_jax.data.times import ClockError, header_timeline, read_timeline

CODECS = {
    *("av1", "ffv1", "flv", "h264", "hevc", "libdav1d", "mjpeg", "mpeg1video", "mpeg2video"),
    *("mpeg4", "prores", "vp8", "vp9"),
}

BYTES = 4  # of a film that take as long as a pixel, at most: the packets of a long film are many

Draw = Callable[[tuple[int, int] | None], Picture]  # return a frame as RGB, cropped to a size
Allow = Callable[[int], None]  # called with the number of pixels about to be decoded


def free(pixels: int) -> None:
    """Allow any amount of decoding."""


@contextmanager
def open_film(
    path: object, file: BinaryIO, demuxer: str, allow: Allow = free
) -> Iterator["Animation | Film"]:
    """Yield the film in an open file; FFmpeg's errors are raised as ValueError."""
    if demuxer == "image":
        with open_picture(path, file) as image:
            if not is_animated(image):
                raise ValueError(f"{path} is a picture, not a video; give it type 'image'")
            allow(image.n_frames * image.width * image.height)
            yield Animation(path, image)
            return
    try:
        yield Film(path, file, demuxer, allow)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: does not decode ({error.strerror}); replace the file") from error


class Film:
    """The first video stream of a file: its timeline, and its frames from a key frame on.

    Raises ValueError for a file without a readable video stream.
    """

    def __init__(self, path: object, file: BinaryIO, demuxer: str, allow: Allow):
        self.path, self.file, self.demuxer, self.allow = path, file, demuxer, allow
        self.scaler, timeline = VideoReformatter(), None
        allow(file.seek(0, io.SEEK_END) // BYTES)
        if demuxer == "mov":
            timeline = header_timeline(file)
        else:
            with self._opened() as (container, stream):
                try:
                    timeline = read_timeline(container, stream)
                except ClockError as error:
                    raise ValueError(f"{path}: {error}") from None
        if timeline is None:
            with self._opened():  # raises its own error if the stream is the reason
                raise ValueError(f"{path}: no frame could be decoded; replace the file")
        self.timeline = timeline

    def walk(self, first: int, last: int) -> Iterator[tuple[int, tuple[int, int], Draw]]:
        """Yield (number, displayed size, function that returns RGB) of frames `first` to `last`.

        It may begin before `first` and end after `last`. If a seek does not lead to an intact frame
        at or before `first`, reading restarts at the beginning.
        """
        key = self.timeline.key_before(first)
        if key is not None:
            frames = self._decoded(key, last)
            try:
                found = next(frames, None)
            except ValueError:
                found = None
            if found is not None and found[0] <= first:
                yield found
                yield from frames
                return
        yield from self._decoded(None, last)

    def _decoded(self, key: tuple[int, int] | None, last: int):
        """Yield the displayed frames from this key frame on; None begins at the first frame."""
        stamps, exact = self.timeline.stamps, self.timeline.exact
        with self._opened() as (container, stream):
            begin = 0
            if key is not None:
                begin = int(np.searchsorted(stamps, key[0]))
                container.seek(key[1], stream=stream)
            self.allow((last - begin + 1) * stream.height * stream.width)
            for number, frame in enumerate(container.decode(stream)):
                check_size(self.path, frame.height, frame.width)  # it may change in the stream
                if exact:
                    number = int(np.searchsorted(stamps, frame.pts or 0))
                    shown = number < len(stamps) and stamps[number] == frame.pts
                    if not shown or number < begin:
                        continue
                if frame.is_corrupt:  # the decoder invented parts of it
                    raise ValueError(f"{self.path}: frame {number} is damaged; replace the file")
                look = self._look(stream, frame)
                yield number, look.size, partial(render, self.scaler, frame, look)

    def _look(self, stream, frame: av.VideoFrame) -> Look:
        try:
            look = look_of(frame, stream.sample_aspect_ratio)
        except ValueError as error:
            raise ValueError(f"{self.path} {error}") from None
        check_size(self.path, *look.size)
        return look

    @contextmanager
    def _opened(self) -> Iterator[tuple]:
        """Yield the container at its beginning and its first video stream."""
        self.file.seek(0)
        with av.open(self.file, format=self.demuxer) as container:
            if not container.streams.video:
                raise ValueError(f"{self.path} holds no video stream")
            stream = container.streams.video[0]
            name = stream.codec_context.name
            if name not in CODECS:
                raise ValueError(f"{self.path} has codec {name}; use one of {sorted(CODECS)}")
            check_size(self.path, stream.height, stream.width)
            stream.codec_context.thread_count = 1  # more threads would idle and cost memory
            yield container, stream


def check_size(path: object, height: int, width: int) -> None:
    """Raise ValueError unless both sides have 1 to `MAX_SIDE` pixels."""
    if not 0 < max(height, width) <= MAX_SIDE:
        raise ValueError(f"{path} is {height}x{width}; use at most {MAX_SIDE} pixels a side")
