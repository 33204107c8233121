"""The verifier passes ground truth of every size, survives blur and noise, fails wrong clips."""

import numpy as np
import pytest
from scipy import ndimage

from easyanimate_jax.evaluation.score import (
    CHANCE,
    attributes,
    first_frame_error,
    motion,
    score,
)
from easyanimate_jax.evaluation.world import durations, prompts, render


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
