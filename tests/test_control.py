"""Operators keep the interface and see what they are named for; rays are those of geometry."""

import json
import os

import numpy as np
import pytest

from easyanimate_jax.data import media
from easyanimate_jax.data.control import (
    OPERATORS,
    Camera,
    control_video,
    pluecker_rays,
    read_camera,
    sampled_camera,
    stretched_camera,
    trajectory_video,
    write_controls,
)


def square(frames=2, shade=255):
    """A white square on black: edges at rows and columns 16 and 48."""
    video = np.zeros((frames, 64, 64, 3), np.uint8)
    video[:, 16:48, 16:48] = shade
    return video


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_mark_the_outline_and_nothing_else(name):
    control = control_video(square(), name)
    assert control.shape == square().shape and control.dtype == np.uint8
    np.testing.assert_array_equal(control[..., 0], control[..., 2])
    near = np.zeros((64, 64), bool)
    near[8:56, 8:56] = True
    near[24:40, 24:40] = False
    outline = np.concatenate([control[0, 14:19, 24:40].max(0), control[0, 24:40, 45:51].max(1)])
    assert (outline[:, 0] > 60).mean() > 0.9
    assert control[0, ~near].max() < 40
    assert control_video(np.zeros_like(square()), name).max() == 0


def test_canny_sees_colours_that_are_equally_bright():
    video = np.full((1, 64, 64, 3), 128, np.uint8)
    video[:, 16:48, 16:48] = 175, 35, 205  # its grey is within 32 of the ground's
    assert 100 < (control_video(video, "canny")[..., 0] > 0).sum() < 300


def test_soft_edges_tell_contrast():
    strong, weak = (control_video(square(1, s), "soft_edge").max() for s in (255, 100))
    assert strong > 1.5 * weak > 0


def test_lines_are_straight_only():
    y, x = np.mgrid[:64, :64]
    disc = np.zeros((1, 64, 64, 3), np.uint8)
    disc[0, (y - 32) ** 2 + (x - 32) ** 2 < 49] = 255
    assert control_video(disc, "lines").sum() < control_video(square(1), "lines").sum() / 2


def test_any_callable_is_an_operator():
    assert (control_video(square(), lambda video: 255 - video) == 255 - square()).all()
    with pytest.raises(ValueError, match="choose of canny, soft_edge"):
        control_video(square(), "depth")
    with pytest.raises(ValueError, match="uint8 of the same shape"):
        control_video(square(), lambda video: video[..., :1])
    with pytest.raises(ValueError, match="uint8 of the same shape"):
        control_video(square(), lambda video: video.astype(np.float32))


def camera(*poses, intrinsics=(0.5, 0.5, 0.5, 0.5)):
    return Camera(np.tile(np.array(intrinsics), (len(poses), 1)), np.stack(poses))


STILL = np.eye(4)[:3]


def moved(x=0.0, y=0.0, z=0.0):
    """World to camera of a camera that stands at (x, y, z)."""
    pose = STILL.copy()
    pose[:, 3] = -x, -y, -z
    return pose


def test_rays_leave_through_the_centres_of_the_pixels():
    """A width of 4 at the films' own aspect (16:9 to a rounding): fx = 2 pixels."""
    rays = pluecker_rays(camera(STILL), 9, 16)[0]
    assert rays.shape == (9, 16, 6)
    np.testing.assert_array_equal(rays[..., :3], 0)  # all through the origin: no moment
    # pixel (row 4, column 8): x = (8.5 - 8) / 8, y = (4.5 - 4.5) / 4.5
    direction = np.array([0.0625, 0.0, 1.0])
    np.testing.assert_allclose(rays[4, 8, 3:], direction / np.sqrt(1.00390625), rtol=1e-5)
    # the upper left one: x = (0.5 - 8) / 8, y = (0.5 - 4.5) / 4.5
    direction = np.array([-0.9375, -8 / 9, 1.0])
    np.testing.assert_allclose(rays[0, 0, 3:], direction / np.linalg.norm(direction), rtol=1e-5)


def test_moments_are_origin_cross_direction_in_the_first_camera():
    rays = pluecker_rays(camera(moved(x=5), moved(x=7)), 9, 16)
    np.testing.assert_allclose(rays[0, ..., :3], 0, atol=1e-6)  # the first is the origin
    direction = rays[1, 4, 8, 3:]
    # (2, 0, 0) x (a, 0, c) = (0, -2 c, 0)
    np.testing.assert_allclose(rays[1, 4, 8, :3], [0, -2 * direction[2], 0], atol=1e-5)


def test_a_turned_camera_turns_its_rays():
    """A quarter turn about y, world to camera: what it sees ahead lies on one side of the first."""
    turn = np.array([[0.0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    rays = pluecker_rays(camera(STILL, turn), 9, 16)
    ahead = rays[0, 4, 8, 3:]
    np.testing.assert_allclose(rays[1, 4, 8, 3:], turn[:, :3].T @ ahead, atol=1e-6)
    assert abs(rays[1, 4, 8, 3]) > 0.9


@pytest.mark.parametrize(("height", "width", "x", "y"), [(9, 8, 1, 2), (9, 32, 2, 1)])
def test_intrinsics_are_corrected_to_the_aspect_of_the_video(height, width, x, y):
    """The field of view of the films fills the longer side, and pixels stay square."""
    direction = pluecker_rays(camera(STILL), height, width)[0, 0, 0, 3:]
    tangent = direction[:2] / direction[2]
    fx = 0.5 * width if width == 32 else 0.5 * 9 * 16 / 9
    fy = 0.5 * height if width == 8 else 0.5 * 32 * 9 / 16
    np.testing.assert_allclose(tangent, [(0.5 - width / 2) / fx, (0.5 - 4.5) / fy], rtol=1e-4)


def pose_line(x):
    return " ".join(map(str, [0, 0.5, 0.5, 0.5, 0.5, 0, 0, *moved(x).ravel()]))


def test_pose_files_are_read_and_thinned(tmp_path):
    path = tmp_path / "pose.txt"
    path.write_text("a title\n" + "\n".join(pose_line(x) for x in range(27)) + "\n\n")
    whole = read_camera(path)
    assert whole.poses.shape == (27, 3, 4) and whole.intrinsics[0].tolist() == [0.5] * 4
    taken = sampled_camera(whole, 9)
    assert taken.poses[:, 0, 3].tolist() == [-3.0 * i for i in range(9)]
    stretched = stretched_camera(sampled_camera(whole, 5), 9)
    np.testing.assert_allclose(stretched.poses[:, 0, 3], -1.5 * np.arange(9))
    with pytest.raises(ValueError, match="9 frames at 8 a second, and 13"):
        sampled_camera(whole, 13)


@pytest.mark.parametrize("fps", [6, 8, 10, 16, 24, 30])
def test_poses_are_taken_by_their_time(fps):
    """Of a file with 24 a second that lasts 4 seconds; the rates need not divide 24."""
    poses = np.tile(np.eye(4)[:3], (96, 1, 1))
    poses[:, 0, 3] = np.arange(96) / 24
    whole = Camera(np.ones((96, 4)), poses)
    count = 4 * fps // 4 * 4 - 3
    late = np.arange(count) / fps - sampled_camera(whole, count, fps).poses[:, 0, 3]
    assert late.min() > -1e-9 and late.max() < 1 / 24
    with pytest.raises(ValueError, match=f"{4 * fps} frames at {fps} a second"):
        sampled_camera(whole, 4 * fps + 5, fps)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no poses"),
        ("title\n1 2 3\n", "line 2 has 3 numbers"),
        ("title\n" + pose_line(1) + "\nx " + pose_line(1), "line 3.*x"),
        ("title\nnan " + pose_line(1)[2:], "line 2"),
    ],
)
def test_damaged_pose_files_are_named(tmp_path, text, message):
    (tmp_path / "pose.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_camera(tmp_path / "pose.txt")


def pose(intrinsics="0.5 0.5 0.5 0.5", turn=None):
    turn = STILL if turn is None else np.concatenate([turn, np.ones((3, 1))], axis=1)
    return f"0 {intrinsics} 0 0 {' '.join(map(str, turn.ravel()))}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            pose("532 532 640 360"),
            "line 3 has the intrinsics .* 532, 532, 640, 360.* divide pixels",
        ),
        (pose("0.5 0.5 32 32"), "line 3 has the intrinsics .* fractions of the picture"),
        (pose("0 0.5 0.5 0.5"), "line 3 has the intrinsics fx, fy, cx, cy 0, 0.5"),
        (pose("0.5 -0.5 0.5 0.5"), "line 3 has the intrinsics"),
        (pose("0.5 nan 0.5 0.5"), "line 3 has 19 numbers.* all finite"),
        (pose(turn=np.zeros((3, 3))), "line 3 has a matrix that does not turn .determinant 0"),
        (pose(turn=np.ones((3, 3))), "line 3 has a matrix that does not turn"),
        (pose(turn=2 * np.eye(3)), "line 3 has a matrix that does not turn .determinant 8"),
        (
            pose(turn=np.diag([1.0, 1, -1])),
            "line 3 has a matrix that does not turn .determinant -1",
        ),
    ],
)
def test_a_camera_that_is_none_is_named_by_its_line(tmp_path, line, message):
    (tmp_path / "pose.txt").write_text("title\n" + pose() + "\n" + line)
    with pytest.raises(ValueError, match=message):
        read_camera(tmp_path / "pose.txt")


@pytest.mark.parametrize("title", ["", "https://films/1\n", "42\n", "1280 720\n", "\n"])
def test_a_pose_file_may_lack_its_title(tmp_path, title):
    lines = "\n".join(pose_line(x) for x in range(3))
    (tmp_path / "pose.txt").write_text(title + lines, encoding="utf-8-sig")
    assert read_camera(tmp_path / "pose.txt").poses[:, 0, 3].tolist() == [0, -1, -2]
    (tmp_path / "pose.txt").write_text(pose_line(0)[:-4] + "\n" + lines)
    with pytest.raises(ValueError, match="line 1 has 18 numbers"):
        read_camera(tmp_path / "pose.txt")
    (tmp_path / "pose.txt").write_text(pose_line(0).replace("0", "O") + "\n" + lines)
    with pytest.raises(ValueError, match="line 1: could not convert string to float"):
        read_camera(tmp_path / "pose.txt")


def test_poses_that_face_away_from_each_other_have_none_between_them():
    behind = np.diag([-1.0, 1, -1, 0])[:3]
    with pytest.raises(ValueError, match="turns by almost 180 degrees"):
        stretched_camera(camera(STILL, behind), 5)
    aside = np.array([[0.0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    assert np.isfinite(pluecker_rays(stretched_camera(camera(STILL, aside), 5), 9, 16)).all()


def test_a_missing_pose_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"lost\.txt cannot be read"):
        read_camera(tmp_path / "lost.txt")


def test_the_spot_of_a_trajectory_is_where_the_path_is():
    path = np.array([[10.0, 20.0], [50.0, 20.0]])
    video = trajectory_video([path], 5, 64, 64)
    assert video.shape == (5, 64, 64, 3)
    for frame, x in zip(video[..., 0], (10, 20, 30, 40, 50), strict=True):
        rows, columns = np.nonzero(frame >= 0.9 * frame.max())
        assert abs(rows.mean() - 20) <= 1 and abs(columns.mean() - x) <= 1
    both = trajectory_video([path, path[::-1]], 5, 64, 64)
    np.testing.assert_array_equal(both, np.maximum(video, video[::-1]))
    assert trajectory_video([path + 100], 5, 64, 64).max() == 0  # outside


@pytest.mark.parametrize(
    "size, half, wide", [((720, 1280), None, 50), ((180, 320), None, 12), ((128, 128), 40, 40)]
)
def test_a_spot_is_as_wide_as_asked_or_as_the_released_models_saw(size, half, wide):
    frame = trajectory_video([np.array([[64.0, 64.0]])], 1, *size, half)[0, ..., 0]
    half_way = frame[64, 64 + wide // 2 - 1 : 64 + wide // 2 + 1].mean()  # pixels are between
    sigmas = 0.5 / 0.4  # of 40 in 100 pixels
    assert abs(half_way - 255 * np.exp(-0.5 * sigmas**2)) <= 255 * 0.02
    assert frame[64, 64 + wide :].max() == 0 < frame[64, 64 + wide - 2]


def test_a_folder_gets_its_control_files(tmp_path, caplog):
    media.write_video(tmp_path / "a.mp4", square(5))
    media.write_png(tmp_path / "b.png", square(1)[0])
    names = ("a.mp4", "a.mp4", "b.png", "lost.mp4")
    rows = [{"file_path": name, "text": "x", "type": "video"} for name in names]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    assert write_controls(tmp_path, "canny") == 2
    assert "left out: " in caplog.text and "lost.mp4" in caplog.text
    made = json.loads((tmp_path / "metadata.json").read_text())
    paths = [row.get("control_file_path") for row in made]
    assert paths == ["control_canny/a.mp4"] * 2 + ["control_canny/b.png", None]
    edges = media.read_clip(tmp_path / "control_canny" / "a.mp4", 0, 5)
    assert np.abs(edges.astype(int) - control_video(square(5), "canny")).mean() < 8
    assert write_controls(tmp_path, "canny") == 0


def test_the_control_of_a_clip_that_changed_is_made_again(tmp_path):
    """And that of another's making stays; clips that differ in their endings have one each."""
    for name in ("a.png", "b.png", "c.png"):
        media.write_png(tmp_path / name, square(1)[0])
    os.link(tmp_path / "a.png", tmp_path / "a.tif")
    names = ("a.png", f"{tmp_path}/b.png", "c.png", "a.tif")
    rows = [{"file_path": name, "text": "x"} for name in names]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    made = tmp_path / "control_canny"
    made.mkdir()
    (made / "c.png").write_text("somebody's")
    assert write_controls(tmp_path, "canny") == 3
    paths = [
        row["control_file_path"] for row in json.loads((tmp_path / "metadata.json").read_text())
    ]
    assert paths == [f"control_canny/{n}" for n in ("a.png", "b.png", "c.png", "a.tif.png")]
    before = media.read_image(made / "b.png")
    for name in ("b.png", "c.png"):
        media.write_png(tmp_path / name, np.roll(square(1)[0], 7, axis=1))
    assert write_controls(tmp_path, "canny") == 1
    assert (media.read_image(made / "b.png") != before).any()
    assert (made / "c.png").read_text() == "somebody's"
    assert not (tmp_path / "lock").exists()
