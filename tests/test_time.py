"""Time is counted in seconds: frames are those that a reader of every time stamp would choose."""

import os
import signal
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from synthetic_films import OPEN_GOP, encode, make_films, number_of, picture, steady, trim

from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget, Shape
from easyanimate_jax.data.decode import Decoders
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.data.sources.rows import Clip
from easyanimate_jax.generation import inputs
from easyanimate_jax.generation.request import SampleRequest
from easyanimate_jax.prepare import clips


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


def chosen(stamps, numbers, unit, start, count, fps=8):
    """The last frame whose stamp is at most the target, for each target."""
    slack = min(max(unit / 2, Fraction(1, 1000)), Fraction(5, 1000))
    targets = [start + Fraction(k, fps) for k in range(count)]
    shown = list(zip(stamps, numbers, strict=True))
    return [max(frame for frame in shown if frame[0] <= t + slack)[1] for t in targets]


def test_frames_are_those_whose_time_stamps_a_brute_force_reader_gives(films):
    assert len(films) >= 60
    wrong = []
    for name, path in films.items():
        stamps, numbers, unit = every_frame(path)
        count = int((stamps[-1] + Fraction(1, 1000)) * 8) + 1
        probe = media.probe(path)
        if probe.num_frames != len(stamps):
            wrong.append((name, "frames", probe.num_frames, len(stamps)))
        for start in (Fraction(0), stamps[len(stamps) // 2]):
            some = int((stamps[-1] - start + Fraction(1, 1000)) * 8) + 1
            found = media.read_at(path, float(start), some)
            found, expected = (
                list(map(number_of, found)),
                chosen(stamps, numbers, unit, start, some),
            )
            if found != expected:
                wrong.append((name, float(start), found, expected))
        with pytest.raises(ValueError, match=f"{name}.*has {count} frames at 8 a second"):
            media.read_at(path, 0.0, count + 1)
    assert not wrong


BLANK = np.zeros((9, 32, 64, 3), np.uint8)  # an own control needs no frames of its clip


def job_of(path, shape=(9, 32, 64), seed=0, **options):
    """A drawn job of a film as a clip, with what its set says."""
    latent_set = LatentSet("set", Budget(72, (72,), (32,), frames=shape[0]), **options)
    probe = media.probe(path)
    control = path.parent / f"control_{path.name}" if "file" in latent_set.control else None
    size = probe.num_frames, probe.height, probe.width, probe.fps
    clip = Clip(path.name, path, "video", ("a",), *size, control=control)
    return clips.make_job(latent_set, clip, Shape(*shape), np.random.default_rng(seed))


def numbers_of(frames):
    return list(map(number_of, frames))


@pytest.mark.parametrize("name", ["rate12.mp4", "rate20.mp4", "slowing.mp4", "rate7.5.mp4"])
def test_a_clip_is_prepared_by_time_stamps(films, name):
    stamps, numbers, unit = every_frame(films[name])
    for seed in range(3):
        job = job_of(films[name], seed=seed)
        found = numbers_of(clips._read_frames(job))
        assert found == chosen(stamps, numbers, unit, Fraction(job.start), 9)


@pytest.mark.parametrize("name", ["rate30.mp4", "slowing.mp4", "rate23.976.mp4"])
def test_a_set_may_have_a_rate_of_its_own(films, name, tmp_path):
    stamps, numbers, unit = every_frame(films[name])
    for fps in (4, 15):
        job = job_of(films[name], shape=(5, 32, 64), fps=fps)
        found = numbers_of(clips._read_frames(job))
        assert found == chosen(stamps, numbers, unit, Fraction(job.start), 5, fps)
        latent_set = LatentSet("set", Budget(72, (72,), (32,), frames=5), fps=fps)
        offered = clips.frames_of(latent_set, job.clip)
        media.read_at(job.clip.path, 0, offered, fps=fps)
        with pytest.raises(ValueError, match=f"frames at {fps} a second"):
            media.read_at(job.clip.path, 0, offered + 1, fps=fps)


def test_a_control_of_a_set_with_a_rate_of_its_own_stays_with_its_clip(tmp_path):
    film = tmp_path / "a.mp4"
    encode(film, steady(61, 30))
    encode(tmp_path / "control_a.mp4", steady(49, 24))
    for seed in range(3):
        job = job_of(film, seed=seed, control="file", fps=12)
        of_film = np.array(numbers_of(clips._read_frames(job))) / 30
        of_control = np.array(numbers_of(clips._read_control(job, "file", BLANK))) / 24
        assert np.abs(of_film - of_control).max() <= 1 / 24
        np.testing.assert_allclose(np.diff(of_film), 1 / 12, atol=1 / 30 + 1e-6)


def test_the_rate_of_the_reference_has_no_other(films):
    with pytest.raises(ValueError, match="reference_rate reads about 8 frames a second"):
        LatentSet("x", Budget(72, (72,), (32,), frames=9), reference_rate=True, fps=16)


def test_the_rate_of_the_reference_is_an_option(films):
    for name, stride in (("rate12.mp4", 2), ("rate20.mp4", 2), ("rate30.mp4", 4)):
        job = job_of(films[name], reference_rate=True)
        found = numbers_of(clips._read_frames(job))
        assert job.stride == stride and set(np.diff(found)) == {stride}
        assert (
            len(found)
            == 9
            <= clips.frames_of(
                LatentSet("x", Budget(72, (72,), (32,), frames=9), reference_rate=True), job.clip
            )
        )


def test_the_set_offers_as_many_frames_as_its_clips_have_eighths_of_a_second(films):
    latent_set = LatentSet("set", Budget(72, (72,), (32,), frames=9))
    for name in ("rate5.mp4", "rate23.976.mp4", "slowing.mkv", "trim1.mp4"):
        job = job_of(films[name], shape=(5, 32, 64))
        offered = clips.frames_of(latent_set, job.clip)
        media.read_at(job.clip.path, 0, offered)
        with pytest.raises(ValueError, match="frames at 8 a second"):
            media.read_at(job.clip.path, 0, offered + 1)


@pytest.mark.parametrize(
    "rate, count", [(24, 61), (Fraction(30_000, 1001), 76), (8, 21), (60, 151)]
)
def test_a_control_film_is_read_at_the_times_of_its_clip(tmp_path, rate, count):
    """Of any rate, one that was thinned to 8 a second among them."""
    film = encode(tmp_path / "a.mp4", steady(61, 24))
    encode(tmp_path / "control_a.mp4", steady(count, rate))
    for seed in range(4):
        job = job_of(film, seed=seed, control="file")
        of_film = np.array(numbers_of(clips._read_frames(job))) / 24
        of_control = np.array(numbers_of(clips._read_control(job, "file", BLANK))) / float(rate)
        assert np.abs(of_film - of_control).max() <= max(1 / 24, 1 / rate) * 0.999
        if rate == 8:
            np.testing.assert_allclose(of_film, of_control)


@pytest.mark.parametrize(
    "stamps, size, says",
    [
        (steady(61, 30), (32, 64), r"control_a.mp4 lasts 2.00 s .* and a.mp4 2.50 s"),
        (steady(61, 8), (32, 64), r"control_a.mp4 lasts 7.50 s"),
        (steady(48, 24), (32, 64), r"control_a.mp4 lasts 1.96 s"),
        (steady(61, 24), (64, 64), r"control_a.mp4 is 64x64, and a.mp4 32x64: .* another aspect"),
    ],
)
def test_a_control_of_another_length_or_aspect_is_refused_by_name(tmp_path, stamps, size, says):
    film = encode(tmp_path / "a.mp4", steady(61, 24))
    frames = [picture(n, *size) for n in range(len(stamps))]
    encode(tmp_path / "control_a.mp4", stamps, frames=frames)
    with pytest.raises(ValueError, match=says):
        clips._read_control(job_of(film, control="file"), "file", BLANK)


NTSC = Fraction(24_000, 1001)


@pytest.mark.parametrize("rate", [NTSC, Fraction(30_000, 1001), 30, 12, 60])
def test_a_film_to_generate_from_plays_at_its_speed_and_its_mask_with_it(tmp_path, rate):
    """Their rates may differ: 23.976 beside 24, 12 beside 24."""
    film = encode(tmp_path / "a.mp4", steady(int(4 * rate) + 2, rate))
    white = [np.full((32, 64, 3), 255 if n < 48 else 0, np.uint8) for n in range(100)]
    encode(tmp_path / "mask.mp4", steady(100, 24), frames=white, options={"crf": "0"})
    film, mask = str(film), str(tmp_path / "mask.mp4")
    asked = SampleRequest(video=film, mask=mask, frames=33, height=32, width=64, fps=8)
    assert inputs.film_frames(film) == 33
    times = np.array(numbers_of(inputs.read_film(film, asked))) / float(rate)
    late = np.arange(33) / 8 - times
    assert late.min() > -0.002 and late.max() < 1 / rate
    mask = inputs.read_mask(asked)[:, 0, 0, 0]
    assert mask[:16].all() and not mask[16:].any()  # 2 s
    encode(tmp_path / "mask.mp4", steady(90, 24), frames=white[:90])
    with pytest.raises(ValueError, match="30 frames at 8 a second, and --frames is 33"):
        inputs.read_mask(asked)


@pytest.mark.parametrize("first, seconds, shown", [(30, 1, 24), (12, None, 84), (37, 2, 48)])
def test_of_a_trimmed_film_what_can_be_shown_is_counted(films, tmp_path, first, seconds, shown):
    whole = films["trim0.mp4"].parent / "whole.mp4"
    path = trim(whole, tmp_path / "trim.mp4", Fraction(first, 24), seconds)
    assert media.probe(path).num_frames == shown
    assert numbers_of(media.read_clip(path, 0, shown)) == list(range(first, first + shown))


@pytest.mark.parametrize("ending", ["ts", "flv"])
def test_recordings_in_one_file_are_not_mixed(tmp_path, ending):
    """Of one clock they are a film; a clock that begins again is named."""
    how = {"clock": Fraction(1, 1000 if ending == "flv" else 90_000), "options": {"bf": "0"}}
    one, later, again = (
        encode(tmp_path / f"{i}.{ending}", steady(48, 24, start), **how).read_bytes()
        for i, start in enumerate((0, 2, 0))
    )
    flags = 13 * (ending == "flv")  # the header of a second FLV and its empty tag
    (tmp_path / "x").write_bytes(one + again[flags:])
    for read in (media.probe, lambda path: media.read_at(path, 0, 9)):
        with pytest.raises(ValueError, match=r"x: its clock runs back after \d\.\d s: several rec"):
            read(tmp_path / "x")
    if ending == "ts":
        (tmp_path / "x").write_bytes(one + later)
        assert media.probe(tmp_path / "x").num_frames == 96
        assert numbers_of(media.read_at(tmp_path / "x", 1.5, 8))[:5] == [36, 39, 42, 45, 0]


@pytest.mark.parametrize("name", ["frag.mp4", "frag_first.mp4", "dash.mp4"])
def test_all_frames_of_a_fragmented_film_are_there(films, name):
    assert media.probe(films[name])[:2] == ("video", 72)
    assert numbers_of(media.read_clip(films[name], 0, 72)) == list(range(72))


@pytest.mark.parametrize(
    "ending, options", [("mp4", OPEN_GOP), ("mkv", {"g": "12"}), ("ts", OPEN_GOP)]
)
def test_reading_begins_at_the_key_frame_before_and_keeps_exact_numbers(tmp_path, ending, options):
    """Any frame number, and as much decoding as a group of pictures."""
    clock = Fraction(1, 1000) if ending == "mkv" else Fraction(1, 90_000)
    path = encode(tmp_path / f"a.{ending}", steady(120, 24), options=options, clock=clock)
    work = []
    for first in range(0, 116, 3):
        found = numbers_of(media.read_clip(path, first, 4, allow=work.append))
        assert found == list(range(first, first + 4))
    assert max(work) <= (12 + 4 + 3) * 32 * 64  # an open group's B frames come before its key


def test_a_film_without_sound_seeks_is_read_from_its_beginning(tmp_path):
    """Intra refresh has points to begin at where pictures are not whole yet."""
    options = {"x264-params": "intra-refresh=1:keyint=20", "crf": "20"}
    path = encode(tmp_path / "a.mp4", steady(100, 24), options=options)
    every = media.read_clip(path, 0, 100)
    for first in (21, 43, 66):  # the points are 20, 40 and 64, and whole five frames later
        np.testing.assert_array_equal(media.read_clip(path, first, 5), every[first : first + 5])


def test_a_span_of_a_table_is_not_left(films):
    """Tables hold the first frame and the number of frames; nothing behind them is shown."""
    stamps, numbers, unit = every_frame(films["slowing.mp4"])
    found = numbers_of(media.read_at(films["slowing.mp4"], 0.5, 8, first=12, end=60))
    assert found == chosen(stamps, numbers, unit, stamps[12] + Fraction(1, 2), 8)
    with pytest.raises(ValueError, match=r"has 9 frames at 8 a second from second 0\.5 on"):
        media.read_at(films["slowing.mp4"], 0.5, 10, first=12, end=60)
    with pytest.raises(ValueError, match="has 80 frames, and 12 to 99 are asked for"):
        media.read_at(films["slowing.mp4"], 0, 2, first=12, end=99)


def test_samples_are_the_pictures_of_whole_reads(films, tmp_path):
    """Of several sizes of one frame, too; a worker that is left early serves the next request."""
    workers, size = Decoders(1), (24, 40)
    still = np.random.default_rng(0).integers(0, 255, (32, 64, 3), np.uint8)
    media.write_gif(tmp_path / "a.gif", np.stack([np.roll(still, i, 1) for i in range(12)]))
    try:
        for path in (films["slowing.mp4"], tmp_path / "a.gif"):
            whole, large = media.read_clip(path, 0, 12, 1, size), media.read_frames(path, [3], 48)
            samples = [(2, size), (3, 48), (3, size), (3, size), (11, size)]
            for read in (media.read_samples, workers.read_samples):
                a, b, c, d, e = read(path, samples)
                np.testing.assert_array_equal(np.stack([a, c, d, e]), whole[[2, 3, 3, 11]])
                np.testing.assert_array_equal(b, large[0])
            worker = workers.free.queue[-1]
            some = workers.read_samples(path, [(i, size) for i in range(12)])
            for _ in range(12):
                next(some)
            some.close()
            assert workers.free.queue[-1] is worker  # it had sent all
            some = workers.read_samples(path, [(i, size) for i in range(12)])
            next(some)
            some.close()
            np.testing.assert_array_equal(workers.read_clip(path, 0, 12, 1, size), whole)
            assert list(workers.read_samples(path, [])) == []
            with pytest.raises(ValueError, match=rf"{path.name}: .*frame (12|9999) "):
                list(workers.read_samples(path, [(0, size), (9999, size)]))
    finally:
        workers.close()


def test_the_bytes_of_a_film_extend_the_limit_of_a_decoder(films):
    """All packets of a long film are read for its times, before one is decoded."""
    for name in ("slowing.mp4", "slowing.mkv"):
        allowed = []
        media.read_seconds(films[name], allowed.append)
        assert sum(allowed) == films[name].stat().st_size // 4


def test_the_limit_of_a_decoder_is_its_own_processor_time_and_grows_with_the_work(tmp_path):
    still = np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8)
    long = encode(tmp_path / "long.mp4", steady(200, 24), frames=[still] * 200)
    noise = np.random.default_rng(0).integers(0, 255, (2000, 2000, 3), np.uint8)
    slow = {"quality": 95, "progressive": True}  # about six times the limit below
    Image.fromarray(noise).save(tmp_path / "big.jpg", **slow)
    workers = Decoders(1, seconds=0.05)
    # As libtpu does; it is inherited. It stays so: once libtpu is loaded, its timer sends the
    # signal to this process, and the default would end it.
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        with pytest.raises(ValueError, match=r"big.jpg: not decoded within 0.05 seconds of proc"):
            workers.read_image(tmp_path / "big.jpg")
        assert workers.read_clip(long, 0, 200, 1, (32, 32)).shape == (200, 32, 32, 3)
        worker = workers.free.queue[-1]
        os.kill(worker.pid, signal.SIGSTOP)  # for longer than its processor time
        threading.Timer(1.0, os.kill, (worker.pid, signal.SIGCONT)).start()
        assert workers.probe(long).num_frames == 200
    finally:
        workers.close()
