"""Synthetic films whose frames tell their number, of every way that time is written in files.

A frame of number n has the bits of n as columns; `number_of` reads it back.
"""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH = 32, 64


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A frame whose eight columns are the bits of its number."""
    bits = np.array([number >> i & 1 for i in range(8)], np.uint8) * 160 + 40
    return np.repeat(np.broadcast_to(bits.repeat(width // 8), (height, width))[..., None], 3, -1)


def number_of(frame: np.ndarray) -> int:
    """The number that a frame tells, however it was scaled."""
    columns = frame.astype(float).mean((0, 2)).reshape(8, -1).mean(1)
    return int(sum(1 << i for i, level in enumerate(columns) if level > 120))


def encode(
    path: Path,
    stamps: list[Fraction],
    codec: str = "libx264",
    options: dict | None = None,
    muxer: dict | None = None,
    clock: Fraction = Fraction(1, 90_000),
    rate: Fraction = Fraction(24),
    container: str | None = None,
    pix_fmt: str = "yuv420p",
    setup=None,
    frames=None,
) -> Path:
    """A film of frames shown at `stamps` seconds."""
    with av.open(str(path), "w", format=container, options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = clock
        stream.height, stream.width = (HEIGHT, WIDTH) if frames is None else frames[0].shape[:2]
        if setup:
            setup(stream)
        for number, stamp in enumerate(stamps):
            pixels = picture(number) if frames is None else frames[number]
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = round(stamp / clock), clock
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def steady(count: int, rate: Fraction | int, start: Fraction | int = 0) -> list[Fraction]:
    """The stamps of a constant rate."""
    return [Fraction(start) + n / Fraction(rate) for n in range(count)]


def wandering(count: int, seed: int) -> list[Fraction]:
    """Stamps 8 to 200 ms apart."""
    gaps = np.random.default_rng(seed).integers(8, 200, count)
    return [Fraction(int(x), 1000) for x in np.cumsum(gaps) - gaps[0]]


def trim(source: Path, target: Path, first: Fraction, seconds: Fraction | None) -> Path:
    """A copy of an mp4 with one edit that begins `first` seconds after its first frame."""
    content = bytearray(source.read_bytes())
    at, scale = content.index(b"elst"), _scale(content)
    count, version = struct.unpack(">I", content[at + 8 : at + 12])[0], content[at + 4]
    assert count == 1 and version == 0
    length, begin = struct.unpack(">Ii", content[at + 12 : at + 20])
    length = length if seconds is None else round(seconds * 1000)  # mvhd counts thousandths
    struct.pack_into(">Ii", content, at + 12, length, begin + round(first * scale))
    target.write_bytes(content)
    return target


def hide(source: Path, target: Path, numbers: tuple[int, ...]) -> Path:
    """A copy of a VP8 film in which some frames are decoded and not shown, as alternate ones."""
    with av.open(str(source)) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    content = bytearray(source.read_bytes())
    for number in numbers:
        content[content.index(packets[number])] &= ~0x10  # show_frame
    target.write_bytes(content)
    return target


def _scale(content: bytes) -> int:
    """The ticks a second of an mp4's first track."""
    at = content.index(b"mdhd")
    return struct.unpack(">I", content[at + 16 : at + 20])[0]


X264 = {"crf": "20", "preset": "ultrafast"}
OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:b-adapt=0", "g": "12", "crf": "20"}
X265 = {"x265-params": "keyint=12:open-gop=1:bframes=3:log-level=none", "preset": "ultrafast"}
RATES = (5, 6, 7.5, 8, 10, 12, 12.5, 15, 16, 20, 23.976, 24, 25, 29.97, 30, 48, 50, 59.94, 60, 120)


def make_films(folder: Path) -> dict[str, Path]:
    """The films by name: 60 ways and more."""
    made = {}

    def film(name: str, stamps, **how) -> Path:
        made[name] = encode(folder / name, stamps, **({"options": X264} | how))
        return made[name]

    def length(rate: float) -> int:
        return min(255, int(1.7 * rate) + 1)

    for rate in RATES:
        exact = Fraction(round(rate) * 1000, 1001) if rate in (23.976, 29.97, 59.94) else rate
        film(f"rate{rate}.mp4", steady(length(rate), Fraction(exact)), rate=Fraction(exact))
    for i, ending in enumerate(("mp4", "mkv", "mov", "ts", "flv")):
        clock = Fraction(1, 1000) if ending in ("mkv", "flv") else Fraction(1, 90_000)
        film(f"wandering.{ending}", wandering(40, i), clock=clock)
        film(f"ntsc.{ending}", steady(60, Fraction(30_000, 1001)), clock=clock)
        film(f"reordered.{ending}", steady(60, 24), clock=clock, options=OPEN_GOP)
    slowing = steady(60, 30) + steady(20, 5, 2)
    for name, how in {
        "slowing.mp4": {},
        "slowing_reordered.mp4": {"options": OPEN_GOP},
        "slowing.mkv": {"clock": Fraction(1, 1000)},
    }.items():
        film(name, slowing, **how)
    for kind, flags in {
        "frag": "frag_keyframe+empty_moov",
        "frag_first": "frag_keyframe",
        "dash": "dash+frag_keyframe",
        "cmaf": "cmaf+frag_keyframe+empty_moov+delay_moov",
    }.items():
        film(f"{kind}.mp4", steady(72, 24), options=OPEN_GOP, muxer={"movflags": flags})
        film(f"{kind}_wandering.mp4", wandering(40, 9), muxer={"movflags": flags})
    for i, start in enumerate((-1, Fraction(-1, 3), 5)):
        film(f"start{i}.mp4", steady(48, 24, start), options=OPEN_GOP)
        film(f"start{i}.mkv", steady(48, 24, start), clock=Fraction(1, 1000))
        film(f"start{i}.ts", steady(48, 25, start), options=OPEN_GOP)
    film("negative.mp4", steady(48, 24, -1), muxer={"avoid_negative_ts": "disabled"})
    whole = encode(folder / "whole.mp4", steady(96, 24), options=OPEN_GOP)
    for i, (first, seconds) in enumerate(((12, None), (30, 1), (31, 2), (37, 1), (50, None))):
        made[f"trim{i}.mp4"] = trim(whole, folder / f"trim{i}.mp4", Fraction(first, 24), seconds)
    film("hevc.mp4", steady(60, 24), codec="libx265", options=X265)
    film(
        "hevc_wandering.mkv",
        wandering(40, 3),
        codec="libx265",
        options=X265,
        clock=Fraction(1, 1000),
    )
    film(
        "vp9.webm",
        steady(40, 20),
        codec="libvpx-vp9",
        clock=Fraction(1, 1000),
        options={"deadline": "realtime", "cpu-used": "8"},
    )
    film(
        "vp8.webm",
        steady(60, 24),
        codec="libvpx",
        clock=Fraction(1, 1000),
        options={"auto-alt-ref": "1", "lag-in-frames": "16", "g": "24", "b": "200k"},
    )
    made["hidden.webm"] = hide(made["vp8.webm"], folder / "hidden.webm", (7, 30))
    film(
        "mpeg4.avi",
        steady(40, 12),
        codec="mpeg4",
        clock=Fraction(1, 12),
        rate=Fraction(12),
        options={"g": "10"},
    )
    film(
        "mpeg2.ts",
        steady(60, 25),
        codec="mpeg2video",
        clock=Fraction(1, 25),
        rate=Fraction(25),
        options={"bf": "2", "g": "12"},
    )
    film(
        "mjpeg.avi",
        steady(40, 15),
        codec="mjpeg",
        clock=Fraction(1, 15),
        rate=Fraction(15),
        pix_fmt="yuvj420p",
        options={},
    )
    film("flv1.flv", steady(60, 30), codec="flv", clock=Fraction(1, 1000), options={})
    return made
