"""Files become frames, or a `ValueError` that names the file."""

import os

import av
import numpy as np
import pytest
from PIL import Image

from easyanimate_jax.data import media, paths


def ramp(num_frames, height, width):
    """Smooth frames whose brightness tells their index."""
    y = np.linspace(0, 60, height)[:, None, None] * np.ones((1, width, 3))
    return np.stack([y + 8 * f for f in range(num_frames)]).astype(np.uint8)


@pytest.fixture
def clip(tmp_path):
    media.write_video(tmp_path / "a.mp4", ramp(13, 48, 64), crf=10)
    return tmp_path / "a.mp4"


def test_a_written_video_reads_back(clip):
    assert media.probe(clip) == ("video", 13, 48, 64, 8.0)
    frames = media.read_clip(clip, 0, 13)
    assert np.abs(frames.astype(int) - ramp(13, 48, 64)).mean() < 3


def test_equal_frames_give_equal_bytes(tmp_path):
    """Small moving blocks, where x264's macroblock tree gave another file in most runs."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.stack([np.roll(picture, 2 * f, 1) for f in range(20)])
    written = set()
    for _ in range(20):
        media.write_video(tmp_path / "a.mp4", frames)
        written.add((tmp_path / "a.mp4").read_bytes())
    assert len(written) == 1


def test_start_and_stride_pick_the_named_frames(clip):
    every = media.read_clip(clip, 0, 13)
    np.testing.assert_array_equal(media.read_clip(clip, 2, 4, 3), every[2:12:3])


def test_fewer_frames_than_wanted_is_an_error(clip):
    with pytest.raises(ValueError, match=r"a\.mp4: 4 frames decoded of 5"):
        media.read_clip(clip, 9, 5)


def test_a_video_is_h264_yuv420p_and_needs_even_sizes(clip, tmp_path):
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
    with pytest.raises(ValueError, match="even sizes"):
        media.write_video(tmp_path / "b.mp4", ramp(1, 47, 64))


def test_rotation_is_applied(tmp_path):
    with av.open(str(tmp_path / "r.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)
        for frame in ramp(2, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    assert media.probe(tmp_path / "r.mp4")[2:4] == (64, 48)
    frame = media.read_clip(tmp_path / "r.mp4", 0, 1)[0]
    assert frame.shape == (64, 48, 3)
    assert frame[:, -1].mean() > frame[:, 0].mean() + 40  # the bottom turned counterclockwise


def test_a_container_without_frame_count_is_counted(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in ramp(5, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    assert media.probe(tmp_path / "a.mkv").num_frames == 5


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>404</html>", b"ffconcat version 1.0\nfile a.mp4\n", b"#EXTM3U\n", bytes(100)],
)
def test_what_is_not_media_is_refused_by_content(tmp_path, content):
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.mp4"):
        media.probe(path)


def test_a_damaged_file_is_an_error(clip):
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.mp4"):
        media.read_clip(clip, 0, 13)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match="regular"):
        media.probe(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match="No such file"):
        media.probe(tmp_path / "none.mp4")


def test_a_huge_picture_is_refused_from_its_header(tmp_path):
    Image.new("1", (12_001, 10)).save(tmp_path / "big.png")
    with pytest.raises(ValueError, match="10x12001"):
        media.read_image(tmp_path / "big.png")


def test_pictures_read_back_upright(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    media.write_png(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), picture)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert media.probe(tmp_path / "turned.png") == ("image", 1, 8, 6, 0.0)
    assert media.read_image(tmp_path / "turned.png").shape == (8, 6, 3)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "link/x",
        "http://h/x",
        "file:x",
        "concat:a|b",
        "a\0b",
        "",
    ],
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/")
    with pytest.raises(ValueError, match="file name"):
        paths.safe_path(root, name)


def test_names_inside_the_folder_pass(tmp_path):
    assert paths.safe_path(tmp_path, "a/b.mp4") == tmp_path.resolve() / "a" / "b.mp4"


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (64, 16), (48, 64), (80, 96)])
def test_resize_covers_and_crops_the_centre(size):
    cropped = media.resize_crop(ramp(2, 48, 64), *size)
    assert cropped.shape == (2, *size, 3)
    assert abs(cropped[0].mean() - ramp(2, 48, 64)[0].mean()) < 2


@pytest.mark.parametrize("turn", [0, 90])
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (64, 16), (80, 96)])
def test_a_clip_is_resized_while_decoding_as_its_frames_would_be(tmp_path, size, turn):
    picture = np.random.default_rng(0).integers(0, 255, (12, 16, 1), np.uint8).repeat(3, 2)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.set_display_rotation(turn)
        frame = av.VideoFrame.from_ndarray(picture.repeat(8, 0).repeat(8, 1))
        container.mux([*stream.encode(frame), *stream.encode()])
    small = media.read_clip(tmp_path / "a.mp4", 0, 1, 1, size).astype(int)
    expected = media.resize_crop(media.read_clip(tmp_path / "a.mp4", 0, 1), *size)
    assert small.shape == (1, *size, 3)
    assert np.abs(small - expected).mean() < 1 and abs((small - expected).mean()) < 0.5


def test_a_contact_sheet_shows_first_and_last_frames():
    videos = np.stack([ramp(13, 16, 32), ramp(13, 16, 32)])
    sheet = media.contact_sheet(videos, columns=4)
    assert sheet.shape == (2 * 16, 4 * 32, 3)
    np.testing.assert_array_equal(sheet[16:, :32], videos[1, 0])
    np.testing.assert_array_equal(sheet[:16, -32:], videos[0, -1])
