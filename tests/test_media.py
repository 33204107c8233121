"""Files become frames, or a `ValueError` that names the file."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageCms
from synthetic_films import encode, number_of, steady

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


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff", "a.avif"])
def test_a_turned_picture_has_its_upright_size_and_corner(tmp_path, name):
    """Pillow turns some formats itself; one corner of the picture is white."""
    picture, corner = np.zeros((24, 32, 3), np.uint8), np.zeros((2, 2), int)
    picture[:12, :16], corner[0, 0] = 255, 1
    turned = (corner, corner[:, ::-1], corner[::-1, ::-1], corner[::-1], corner.T,
              np.rot90(corner, -1), corner.T[::-1, ::-1], np.rot90(corner))  # fmt: skip
    for orientation, expected in enumerate(turned, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture).save(tmp_path / name, exif=exif)
        found = media.read_image(tmp_path / name)
        height, width = (24, 32) if orientation < 5 else (32, 24)
        assert media.probe(tmp_path / name) == ("image", 1, height, width, 0.0)
        assert found.shape == (height, width, 3)
        np.testing.assert_array_equal(found[4::16, 4::16, 0] > 128, expected == 1)


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


def save(path, image, **options):
    image.save(path, **options)
    return path


RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(4, 0)


@pytest.mark.parametrize(
    "name, image",
    [
        ("grey.png", Image.fromarray(RAMP)),
        ("grey.tiff", Image.fromarray(RAMP)),
        ("float.tiff", Image.fromarray((RAMP / 65535).astype(np.float32))),
        ("int.tiff", Image.fromarray(RAMP.astype(np.int32))),
    ],
)
def test_grey_of_more_than_eight_bits_is_scaled(tmp_path, name, image):
    found = media.read_image(save(tmp_path / name, image))
    expected = np.rint(RAMP / 257).astype(np.uint8)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(media.read_image(tmp_path / name, mask=True), expected)


def test_grey_of_no_stated_white_is_refused(tmp_path):
    path = save(tmp_path / "a.tiff", Image.fromarray(np.full((4, 4), 7.5, np.float32)))
    with pytest.raises(ValueError, match=r"a.tiff has grey levels from 7.5 to 7.5"):
        media.read_image(path)


def see_through():
    """Red, hidden red and half red, as RGBA."""
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., 0], pixels[:, 0, 3], pixels[:, 2, 3] = 255, 255, 128
    return Image.fromarray(pixels)


def in_palette():
    image = Image.fromarray(np.array([[0, 1, 0]] * 2, np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image


@pytest.mark.parametrize(
    "name, image, options, expected, mask",
    [
        ("a.png", see_through(), {}, [(255, 0, 0), (255,) * 3, (255, 127, 127)], (255, 0, 128)),
        ("a.webp", see_through(), {"lossless": True, "exact": True},
         [(255, 0, 0), (255,) * 3, (255, 127, 127)], (255, 0, 128)),
        ("p.png", in_palette(), {"transparency": 1}, [(255, 0, 0), (255,) * 3, (255, 0, 0)],
         (255, 0, 255)),
        ("p8.png", in_palette(), {}, [(255, 0, 0), (0, 0, 255), (255, 0, 0)], None),
        ("la.png", see_through().convert("LA"), {}, [(76,) * 3, (255,) * 3, (165,) * 3],
         (255, 0, 128)),
    ],
)  # fmt: skip
def test_what_is_transparent_lies_on_white_and_is_a_mask(
    tmp_path, name, image, options, expected, mask
):
    path = save(tmp_path / name, image, **options)
    found = media.read_image(path).astype(int)
    assert np.abs(found[0] - np.array(expected)).max() <= 1
    if mask:
        np.testing.assert_array_equal(media.read_image(path, mask=True)[1, :, 0], mask)
    else:
        np.testing.assert_array_equal(media.read_image(path, mask=True), found)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_is_refused_by_its_name(tmp_path, brand):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(300))
    for read in (media.probe, media.read_image):
        with pytest.raises(ValueError, match=r"a.jpg is a HEIC picture; save it as PNG or JPEG"):
            read(tmp_path / "a.jpg")


def test_avif_is_a_picture(tmp_path):
    path = save(tmp_path / "a.avif", Image.new("RGB", (64, 48), (200, 100, 50)))
    assert media.probe(path) == ("image", 1, 48, 64, 0.0)
    assert np.abs(media.read_image(path).astype(int) - (200, 100, 50)).max() <= 4


def test_press_and_profile_colours_become_srgb(tmp_path):
    red = np.zeros((4, 4, 4), np.uint8)
    red[..., 1:3] = 255  # magenta and yellow
    path = save(tmp_path / "a.jpg", Image.fromarray(red, "CMYK"), quality=95)
    assert np.abs(media.read_image(path).astype(int) - (255, 0, 0)).max() <= 3
    path = save(tmp_path / "b.png", Image.new("RGB", (4, 4), (100, 100, 100)))
    plain = media.read_image(path)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(path, Image.new("RGB", (4, 4), (100, 100, 100)), icc_profile=profile)
    np.testing.assert_array_equal(media.read_image(path), plain)
    save(path, Image.new("RGB", (4, 4), (100, 100, 100)), icc_profile=b"damaged")
    np.testing.assert_array_equal(media.read_image(path), plain)


@pytest.mark.parametrize(
    "name, mode, size",
    [("a.png", "1", (12_000, 300)), ("a.jpg", "RGB", (300, 9000)), ("a.png", "I;16", (6000, 40))],
)
def test_large_pictures_are_scaled_down(tmp_path, name, mode, size):
    path = save(tmp_path / name, Image.new(mode, size, 1 if mode == "1" else 0))
    probe, found = media.probe(path), media.read_image(path)
    assert found.shape == (probe.height, probe.width, 3) and max(found.shape) == 4096
    assert abs(probe.width / probe.height / (size[0] / size[1]) - 1) < 0.02
    assert (found == (255 if mode == "1" else 0)).all()


def animation(lasts):
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
    return [Image.new("RGB", (32, 16), colour) for colour in colours[: len(lasts)]]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
@pytest.mark.parametrize(
    "lasts, shown",
    [((120, 130, 250, 120), [0, 1, 2, 2, 3]), ((500, 500), [0, 0, 0, 0, 1]), ((130, 120), [0, 1])],
)
def test_animations_are_films(tmp_path, name, lasts, shown):
    first, *rest = images = animation(lasts)
    options = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=list(lasts), **options)
    probe = media.probe(tmp_path / name)
    assert probe[:4] == ("video", len(lasts), 16, 32)
    if name != "a.gif" and lasts == (130, 120):  # only a GIF's clock is as coarse as that
        shown = [0]
    found = media.read_at(tmp_path / name, 0, len(shown), (8, 16))
    for frame, number in zip(found, shown, strict=True):
        assert np.abs(frame.astype(int) - np.asarray(images[number])[:8, :16]).max() <= 2
    with pytest.raises(ValueError, match="is a video"):
        media.read_image(tmp_path / name)


def test_a_still_gif_is_a_picture_and_ours_has_eight_frames_a_second(tmp_path):
    save(tmp_path / "a.gif", Image.new("RGB", (8, 6), (255, 0, 0)))
    assert media.probe(tmp_path / "a.gif") == ("image", 1, 6, 8, 0.0)
    media.write_gif(tmp_path / "b.gif", ramp(9, 16, 16))
    assert media.probe(tmp_path / "b.gif") == ("video", 9, 16, 16, 8.0)


QUARTERS = [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)]
QUARTERS += [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", QUARTERS)
def test_the_whole_display_matrix_is_applied(tmp_path, matrix):
    """x' = a x + c y and y' = b x + d y, moved back to the corner."""
    a, b, c, d = matrix
    corners = np.zeros((32, 48, 3), np.uint8)
    corners[:16, :24], corners[:16, 24:], corners[16:, :24] = 60, 120, 180
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    path = encode(tmp_path / "a.mp4", steady(2, 8), frames=[corners, corners],
                  options={"crf": "1"}, setup=lambda s: s.set_display_matrix(values))  # fmt: skip
    y, x = np.mgrid[:32, :48]
    over, down = a * x + c * y, b * x + d * y
    expected = np.zeros((48, 32, 3) if b else (32, 48, 3), np.uint8)
    expected[down - down.min(), over - over.min()] = corners
    found = media.read_clip(path, 0, 1)[0]
    assert found.shape == expected.shape == (*media.probe(path)[2:4], 3)
    assert np.abs(found.astype(int) - expected).mean() < 3


def test_a_turn_that_is_no_quarter_is_refused(tmp_path):
    path = encode(tmp_path / "a.mp4", steady(2, 8), setup=lambda s: s.set_display_rotation(30))
    with pytest.raises(ValueError, match=r"a.mp4 is turned by a matrix that is no quarter"):
        media.probe(path)


@pytest.mark.parametrize("aspect, width", [("64:45", 91), ("16:15", 68), ("1:2", 32)])
def test_pixels_become_square(tmp_path, aspect, width):
    aspect = Fraction(aspect.replace(":", "/"))

    def wide(stream):
        stream.codec_context.sample_aspect_ratio = aspect

    path = encode(tmp_path / "a.mp4", steady(2, 8), setup=wide)
    assert media.probe(path)[2:4] == (32, width)
    assert media.read_clip(path, 0, 1).shape == (1, 32, width, 3)
    assert number_of(media.read_clip(path, 1, 1, 1, (32, 64 if width > 64 else 32))[0]) >= 0


@pytest.mark.parametrize(
    "transfer, level, expected",
    [(16, 148, 255), (16, 0, 0), (16, 112, 142), (18, 191, 255), (18, 0, 0), (18, 128, 143)],
)
def test_high_dynamic_range_becomes_ordinary(tmp_path, transfer, level, expected):
    """The white of 203 cd/m2 is 255; 50 of them are 142."""

    def tagged(stream):
        stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, 9

    frames = [np.full((32, 64, 3), level, np.uint8)] * 2
    path = encode(tmp_path / "a.mp4", steady(2, 8), frames=frames, setup=tagged)
    found = media.read_clip(path, 0, 1)
    assert abs(found.astype(int).mean() - expected) <= 4


@pytest.mark.parametrize(
    "name, how",
    [
        ("a.ts", {}),
        ("a.m2ts", {"muxer": {"mpegts_m2ts_mode": "1"}, "container": "mpegts"}),
        ("a.flv", {"codec": "flv", "clock": Fraction(1, 1000)}),
        ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("a.mjpeg", {"codec": "mjpeg", "pix_fmt": "yuvj420p", "container": "mjpeg"}),
    ],
)
def test_other_containers_are_read(tmp_path, name, how):
    how = {"clock": Fraction(1, 25), "rate": Fraction(25)} | how
    path = encode(tmp_path / name, steady(20, 25), **how)
    assert media.probe(path)[:2] == ("video", 20)
    assert [number_of(x) for x in media.read_at(path, 0, 7)] == [0, 3, 6, 9, 12, 15, 18]


def test_our_mp4_is_tagged_bt709_and_plays_while_it_loads(tmp_path):
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    frames[..., 1] = 255
    media.write_video(tmp_path / "a.mp4", frames, crf=1, comment="settings: 00000001.json")
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == "settings: 00000001.json"
        frame = next(container.decode(video=0))
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)
        assert codec.color_range == 1
        assert abs(int(np.asarray(frame.to_ndarray())[0, 0]) - (16 + 219 * 0.7152)) <= 1
    assert np.abs(media.read_clip(tmp_path / "a.mp4", 0, 1).astype(int) - frames[:1]).max() <= 3
    media.write_video(tmp_path / "b.mp4", frames)
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert "comment" not in container.metadata
    media.write_video(tmp_path / "long.mp4", ramp(31, 16, 16).repeat(20, 0), comment="x" * 5000)
    assert media.probe(tmp_path / "long.mp4").num_frames == 620
