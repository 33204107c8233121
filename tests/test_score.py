"""The verifier passes ground truth of every size, survives blur and noise, fails wrong clips."""

import numpy as np
import pytest
from scipy import ndimage

from demos import world
from demos.score import (
    CHANCE,
    attributes,
    edge_f1,
    first_frame_error,
    known_error,
    last_frame_error,
    motion,
    moves_whole,
    object_path,
    path_distance,
    score,
    strict_attributes,
)
from demos.world import BACKGROUNDS, COLOURS, Attributes, caption, durations, prompts, render
from easyanimate_jax.data.control import canny


def clips(num_frames, height, width, count=60, split="seen"):
    rng = np.random.default_rng(0)
    asked = prompts(split, count, seed=3)
    asked = [p for p in asked if num_frames in durations(p.attributes, height, width)]
    return [render(p.attributes, num_frames, height, width, rng) for p in asked], asked


@pytest.mark.parametrize(
    "size", [(9, 64, 64), (9, 64, 96), (9, 128, 128), (13, 96, 128), (25, 128, 64), (9, 48, 80)]
)
def test_ground_truth_scores_everything(size):
    got = score(*clips(*size, split="heldout"))
    assert {name: got[name] for name in CHANCE} == dict.fromkeys(CHANCE, 1.0)


def test_blur_and_noise_do_not_fool_it():
    videos, asked = clips(9, 64, 64)
    rng = np.random.default_rng(1)
    blurred = [ndimage.gaussian_filter(np.float32(v), (0, 1.2, 1.2, 0)) for v in videos]
    noisy = [np.uint8(np.clip(v + rng.normal(0, 15, v.shape), 0, 255)) for v in blurred]
    got = score(noisy, asked)
    assert min(got[name] for name in CHANCE if name != "shape") == 1 and got["shape"] >= 0.95


def test_wrong_prompts_score_near_chance():
    videos, asked = clips(9, 64, 64, count=120)
    got = score(videos, asked[5:] + asked[:5])
    assert got["joint"] <= 0.05
    assert all(got[name] <= CHANCE[name] + 0.2 for name in CHANCE)


def test_each_attribute_is_scored_by_itself():
    videos, (prompt, *_) = clips(9, 64, 64, count=1)
    backwards = score([videos[0][::-1]], [prompt])
    assert (backwards["direction"], backwards["joint"]) == (0, 0)
    assert backwards["colour"] == backwards["background"] == backwards["shape"] == 1
    videos, asked = clips(9, 64, 64, count=10)
    quick = [p.attributes.speed for p in asked].index("quickly")
    video, prompt = videos[quick], asked[quick]
    slower = score([np.repeat(video, 3, axis=0)[:9]], [prompt])
    assert slower["direction"] == 1 and slower["speed"] == 0


def towards(direction, speed="slowly", count=12):
    """Clips that move to one direction."""
    rng = np.random.default_rng(2)
    looks = [(c, b, "circle") for c in COLOURS for b in BACKGROUNDS][:count]
    asked = [caption(Attributes(*look, direction, speed)) for look in looks]
    return [render(p.attributes, 9, 128, 128, rng) for p in asked], asked


@pytest.mark.parametrize("direction", ["northeast", "up", "left"])
@pytest.mark.parametrize("speed", ["slowly", "quickly"])
def test_the_strict_verifier_passes_ground_truth_and_its_blur(direction, speed):
    videos, asked = towards(direction, speed)
    blurs = [np.uint8(ndimage.gaussian_filter(np.float32(v), (0.5, 2, 2, 0))) for v in videos]
    for clips in (videos, blurs):
        got = score(clips, asked, strict_attributes)
        assert min(got[name] for name in CHANCE) == 1
        assert all(map(moves_whole, clips))


def drawn_at(centres, side=80):
    """A red square on grey, with its middle at these (y, x) pixels in each frame."""
    video = np.full((len(centres), 128, 128, 3), 128, np.uint8)
    corners = np.round(np.asarray(centres) - side / 2).astype(int)
    for frame, (y, x) in zip(video, corners, strict=True):
        frame[y : y + side, x : x + side] = COLOURS["red"]
    return video


UP = np.array([[-2.0, 0]] * 8)
RIGHT = UP[:, ::-1] * -1
START = np.array([72.0, 56])


def walk(*steps):
    return START + np.concatenate([np.zeros((1, 2)), np.cumsum(np.concatenate(steps), axis=0)])


def test_only_an_object_that_moves_northeast_as_a_whole_moves_northeast():
    true, jump = walk(UP + RIGHT), walk(UP * 0)
    jump[4:] += (-16, 16)
    ghosts, other = drawn_at(walk(UP)), drawn_at(walk(RIGHT))
    ghosts = np.where(other == 128, ghosts, other)
    jitter = START + np.random.default_rng(0).normal(0, 3, (9, 2))
    growing = np.concatenate([drawn_at(true[i : i + 1], side=48 + 4 * i) for i in range(9)])
    lost = drawn_at(true)
    lost[3] = 128
    assert strict_attributes(drawn_at(true)).direction == "northeast"
    assert strict_attributes(drawn_at(true)[::-1]).direction == "southwest"
    assert strict_attributes(drawn_at(walk(UP))).direction == "up"
    assert strict_attributes(drawn_at(walk(UP + RIGHT * 0.25))).direction == "up"
    assert strict_attributes(drawn_at(walk(UP + RIGHT * 0.6))).direction == "northeast"
    wrong = {
        "a corner": drawn_at(walk(UP[:4] * 2, RIGHT[:4] * 2)),
        "a jump": drawn_at(jump),
        "a jitter": drawn_at(jitter),
        "still": drawn_at(walk(UP * 0)),
        "lost in a frame": lost,
    }
    for name, video in wrong.items():
        assert strict_attributes(video).direction is None, name
    for name in ("a corner", "a jump", "lost in a frame"):
        assert attributes(wrong[name]).direction is not None, name
    assert moves_whole(drawn_at(true)) and not moves_whole(wrong["still"])
    assert not moves_whole(ghosts) and not moves_whole(growing)


def test_what_cannot_be_told_is_none():
    empty = attributes(np.full((9, 64, 64, 3), 130, np.uint8))
    assert empty == (None, "grey", None, None, None)
    videos, asked = clips(9, 64, 64, count=1)
    frozen = attributes(np.repeat(videos[0][:1], 9, axis=0))
    assert frozen[:3] == asked[0].attributes[:3] and frozen[3:] == (None, None)
    assert attributes(videos[0][:1]) == frozen
    vanished = videos[0].copy()
    vanished[2:] = vanished[0, 0, 0]
    assert attributes(vanished).colour is None or attributes(vanished).direction is None


def test_errors_and_motion_are_shares_of_the_value_range():
    video = np.zeros((3, 4, 4, 3), np.uint8)
    video[1] = 51
    assert first_frame_error(video, np.full((4, 4, 3), 255, np.uint8)) == 1
    assert motion(video) == pytest.approx(0.2)


def blurred(video):
    return np.uint8(ndimage.gaussian_filter(np.float32(video), (0, 1.2, 1.2, 0)))


def test_the_path_of_every_shape_is_found():
    videos, paths = world.clips(prompts("heldout", 40, seed=1), 9, 96, 64, seed=2)
    distances = [path_distance(v, path) for v, path in zip(videos, paths, strict=True)]
    assert max(distances) < 0.8
    assert max(path_distance(blurred(v), p) for v, p in zip(videos, paths, strict=True)) < 2


def test_distance_is_in_pixels_and_a_lost_object_is_far():
    (video,), (path,) = world.clips(prompts("seen", 1, seed=0), 9, 64, 64, seed=0)
    assert path_distance(video, path + np.float32([3, 4])) == pytest.approx(5, abs=0.5)
    backwards = np.linalg.norm(path - path[::-1], axis=1).mean()
    assert path_distance(video[::-1], path) == pytest.approx(backwards, abs=0.5)
    lost = video.copy()
    lost[6:] = video[0, 0, 0]
    assert np.isnan(object_path(lost)[6:]).all() and not np.isnan(object_path(lost)[:6]).any()
    assert path_distance(np.full_like(video, 240), path) == 32


def test_edges_match_where_they_lie_and_no_further():
    (video,), _ = world.clips(prompts("seen", 1, seed=0), 9, 128, 128, seed=0)
    edges = canny(video)
    assert edge_f1(video, edges) == 1
    assert edge_f1(blurred(video), edges) > 0.95
    assert edge_f1(np.roll(video, 1, axis=1), edges) > 0.95
    assert edge_f1(np.roll(video, 8, axis=(1, 2)), edges) < 0.35
    assert edge_f1(np.full_like(video, 128), edges) == 0
    half = edges.copy()
    half[4:] = 0  # all that is asked for is there: a precision of 4 / 9 at a recall of 1
    assert edge_f1(video, half) == pytest.approx(8 / 13, abs=0.02)


def test_known_pixels_are_those_outside_the_mask():
    source, video = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
    mask = np.zeros((2, 4, 4, 1), np.uint8)
    mask[:, :2], video[:, :2] = 1, 200
    assert known_error(video, source, mask) == 0
    video[:, 2] = 51
    assert known_error(video, source, mask) == pytest.approx(0.1)
    assert last_frame_error(video[::-1], source[0]) == first_frame_error(video, source[0]) > 0
