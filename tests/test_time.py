"""Time is counted in seconds: frames are those that a reader of every time stamp would choose."""

from fractions import Fraction

import av
import numpy as np
import pytest
from synthetic_films import OPEN_GOP, encode, make_films, number_of, steady, wandering

from easyanimate_jax.data import media


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return make_films(tmp_path_factory.mktemp("films"))


def every_frame(path):
    """Brute force: (stamps, numbers) of all that FFmpeg shows, by decoding all of it."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shown = [
            (frame.pts * stream.time_base, number_of(frame.to_ndarray(format="rgb24")))
            for frame in container.decode(stream)
            if not frame.is_corrupt
        ]
        unit = stream.time_base
    shown.sort()
    begin = shown[0][0]
    return [stamp - begin for stamp, _ in shown], [number for _, number in shown], unit


def chosen(stamps, numbers, unit, start, count):
    """The last frame whose stamp is at most the target, for each target."""
    slack = min(max(unit / 2, Fraction(1, 1000)), Fraction(5, 1000))
    targets = [start + Fraction(k, 8) for k in range(count)]
    return [max((s, n) for s, n in zip(stamps, numbers) if s <= t + slack)[1] for t in targets]


def test_frames_are_those_whose_time_stamps_a_brute_force_reader_gives(films):
    assert len(films) >= 60
    wrong = []
    for name, path in films.items():
        stamps, numbers, unit = every_frame(path)
        count = int((stamps[-1] + Fraction(1, 1000)) * 8) + 1
        probe = media.probe(path)
        if probe.num_frames != len(stamps):
            wrong.append((name, "frames", probe.num_frames, len(stamps)))
        for start in (Fraction(0), stamps[len(stamps) // 2], stamps[-1] / 3):
            some = int((stamps[-1] - start + Fraction(1, 1000)) * 8) + 1
            found = media.read_at(path, float(start), some)
            found, expected = list(map(number_of, found)), chosen(stamps, numbers, unit, start, some)
            if found != expected:
                wrong.append((name, float(start), found, expected))
        with pytest.raises(ValueError, match=f"{name}.*has {count} frames at 8 a second"):
            media.read_at(path, 0.0, count + 1)
    assert not wrong
