"""Compare the CPU time to read 49 frames at the end of a long film with that at its start.

    python benchmarks/seeking.py [--groups 21] [--rounds 3]

Prints a table in Markdown. The film is synthetic: moving noise in H.264, encoded by x264.
"""

import argparse
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from setting import setting

from easyanimate_jax.data import media
from easyanimate_jax.facts import FPS

RATE, GROUP, COUNT, SIZE = 24, 250, 49, (512, 512)


def main() -> None:
    """Time the reads, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=21)
    parser.add_argument("--height", type=int, default=1080)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write(path, options.groups, options.height, options.height * 16 // 9 // 2 * 2)
        seconds = options.groups * GROUP / RATE
        last = seconds - (COUNT - 1) / FPS - 1
        starts = {"at the start": 0.0, "in the middle": last / 2, "at the end": last}
        best = {
            name: min(reading(path, start) for _ in range(options.rounds))
            for name, start in starts.items()
        }
        group = min(whole_group(path) for _ in range(options.rounds))
        megabytes = path.stat().st_size / 1e6
    print(f"# Seeking\n\n{setting()}\n")
    print(
        f"{COUNT} frames at {FPS} a second of a film of {seconds:.0f} s, {options.height} "
        f"rows, {RATE} a second, {megabytes:.0f} MB, a key frame every {GROUP}; best of "
        f"{options.rounds}.\n\n| | CPU s | to the start |\n|---|---|---|"
    )
    for name, seconds in best.items():
        print(f"| {name} | {seconds:.2f} | {seconds / best['at the start']:.2f} |")
    print(f"| a group of pictures alone | {group:.2f} | {group / best['at the start']:.2f} |")


def write(path: Path, groups: int, height: int, width: int) -> None:
    """Write the film: encode one group of pictures, and write its packets again and again."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (height // 8 + 1, width // 8, 3), np.uint8)
    still = noise.repeat(8, 0).repeat(8, 1)[:height]
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        made = {"g": str(GROUP), "keyint_min": str(GROUP), "preset": "veryfast", "crf": "28"}
        stream = out.add_stream("libx264", rate=Fraction(RATE), options=made)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        packets = []
        for number in range(GROUP):
            moved = np.ascontiguousarray(np.roll(still, 2 * number, axis=1))
            packets += stream.encode(av.VideoFrame.from_ndarray(moved))
        packets += stream.encode()
        kept = [(bytes(p), p.pts, p.dts, p.is_keyframe, p.time_base) for p in packets]
        for group in range(groups):
            for content, pts, dts, key, base in kept:
                packet = av.Packet(content)
                shift = round(group * GROUP / RATE / base)
                packet.pts, packet.dts, packet.time_base = pts + shift, dts + shift, base
                packet.is_keyframe, packet.stream = key, stream
                out.mux(packet)


def reading(path: Path, start: float) -> float:
    """Return the CPU seconds to read the frames from `start` seconds on."""
    began = time.process_time()
    media.read_at(path, start, COUNT, SIZE)
    return time.process_time() - began


def whole_group(path: Path) -> float:
    """Return the time to decode one group of pictures without scaling."""
    began = time.process_time()
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, _ in enumerate(container.decode(video=0)):
            if number == GROUP - 1:
                break
    return time.process_time() - began


if __name__ == "__main__":
    main()
