"""The verifier as a reward, in the process and behind HTTP, and the judge that has a gradient."""

import threading
from http.server import ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from demos import judge, preference_report, prompts, verifier, world
from demos.world import Attributes, caption
from easyanimate_jax.evaluation.rewards import RewardServer

SIZE = 9, 64, 64
WIDTH = 16  # of the text states of these tests
RED = Attributes("red", "black", "square", "right", "slowly")


def clip(**changes):
    """A clip of the red square on black that moves right slowly, or of another object."""
    return world.render(RED._replace(**changes), *SIZE, np.random.default_rng(0))


@pytest.fixture(scope="module")
def weights():
    """A judge whose text states name the attributes by ones, and a random network."""
    found, first = {}, 0
    for name, values in judge.NAMES.items():
        kernel = np.zeros((64, len(values)), np.float32)
        kernel[first + np.arange(len(values)), np.arange(len(values))] = 60
        found[f"text.{name}.kernel"], first = kernel, first + len(values)
        found[f"text.{name}.bias"] = np.zeros(len(values), np.float32)
    return found | judge.shape_weights(np.random.default_rng(0))


def texts_of(attributes):
    """The states of two encoders that the judge of these tests reads, with one row."""
    values = [v for name in judge.NAMES for v in judge.NAMES[name]]
    ones = np.array([float(v in attributes) for v in values], np.float32)
    states = np.pad(ones, (0, 64 - len(ones)))
    return tuple(np.tile(part, (1, 3, 1)) for part in (states[None, :WIDTH], states[None, WIDTH:]))


COMPONENTS = jax.jit(judge.components)


def components(weights, video, attributes=RED):
    found = COMPONENTS(weights, judge.as_frames(video[None]), texts_of(attributes))
    return {name: float(value[0]) for name, value in found.items()}


def test_every_prompt_of_the_world_is_known_and_is_its_own():
    known = world.by_text()
    for prompt in world.every_prompt():
        assert known[prompt.en] == known[prompt.zh] == prompt
    assert len(known) == 2 * len(list(world.every_prompt())) == 2 * 6 * 3 * 14 * (4 * 2 + 1)


def test_a_rating_is_high_for_the_right_video_and_falls_with_each_wrong_attribute():
    right = verifier.rating(clip(), RED)
    assert 0.95 < right <= sum(verifier.WEIGHTS.values()) == pytest.approx(1)
    wrong = {"colour": "blue", "background": "white", "shape": "cross", "direction": "up"}
    for name, value in (wrong | {"speed": "quickly"}).items():
        found = verifier.parts(clip(**{name: value}), RED)
        assert [part for part in RED._fields if not found[part]] == [name]
        assert verifier.rating(clip(**{name: value}), RED) < right - 0.09
    assert verifier.rating(np.full((*SIZE, 3), 128, np.uint8), RED) == 0


def test_ratings_are_graded_so_that_equal_attributes_differ():
    video = clip()
    blurred = np.uint8(ndimage.gaussian_filter(np.float32(video), (0, 3, 3, 0)))
    assert 0 < verifier.rating(video, RED) - verifier.rating(blurred, RED) < 0.1


def test_the_server_answers_what_the_function_gives_and_null_for_an_unknown_prompt():
    prompt = caption(RED)
    asked = [prompt.en, prompt.zh, prompt.en, "a red fox runs over snow"]
    frames = np.stack([clip(), clip(shape="cross"), clip(speed="quickly"), clip()])
    expected = verifier.rate(frames, asked)
    assert np.isnan(expected).tolist() == [False, False, False, True]
    with ThreadingHTTPServer(("127.0.0.1", 0), verifier.Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        reward = RewardServer(address, tries=1, format="npz", batch=3)
        reward.check()
        np.testing.assert_array_equal(reward(frames, asked), expected)
        film = RewardServer(address, tries=1, format="mp4")(frames, asked)
        np.testing.assert_allclose(film, expected, atol=0.1)
        answer, reason = reward._ask([{"id": "0", "prompt": prompt.en, "video": "no base64"}])
        assert answer is None and "400" in reason
        server.shutdown()


def test_the_judge_reacts_to_the_attribute_that_is_wrong(weights):
    right = components(weights, clip())
    assert all(right[name] > -0.2 for name in judge.NAMES if name != "shape")
    wrong = {"colour": "blue", "background": "white", "direction": "up", "speed": "quickly"}
    for name, value in wrong.items():
        found = components(weights, clip(**{name: value}))
        fell = [other for other in wrong if right[other] - found[other] > 1]
        assert fell == [name]
        assert components(weights, clip(), RED._replace(**{name: value}))[name] < right[name] - 1
    assert components(weights, clip(shape="cross"))["shape"] != right["shape"]


def test_an_object_is_cut_out_alike_wherever_it_is_and_however_large():
    videos = [
        world.render(RED._replace(direction=None), 1, 128, 128, np.random.default_rng(seed))
        for seed in range(4)
    ]
    cuts = judge.cuts_of(np.stack(videos))
    assert cuts.max() <= 1 and 0.25 < cuts.mean() < 0.45
    assert np.abs(cuts - cuts[:1]).mean() < 0.02


def test_a_small_network_learns_two_shapes_from_a_few_pictures():
    rng = np.random.default_rng(0)
    names = ["circle", "cross"] * 24
    pictures = [
        world.render(RED._replace(shape=name, direction=None), 1, *SIZE[1:], rng) for name in names
    ]
    pictures = np.stack([judge.worn(picture[0], rng)[None] for picture in pictures])
    labels = np.array([judge.SHAPES.index(name) for name in names])
    cuts = judge.cuts_of(pictures)
    found = judge.shape_logits(judge.train_shape(cuts[:32], labels[:32], 30), cuts[:, None])
    assert (np.argmax(found[32:, 0], axis=-1) == labels[32:]).all()


def test_the_gradient_is_finite_everywhere_and_moves_the_object(weights):
    texts = texts_of(RED._replace(speed="quickly"))
    gradient = jax.jit(jax.grad(lambda x: judge.reward(weights, x, texts).sum()))
    frames = judge.as_frames(clip()[None])
    found = gradient(frames)
    assert np.isfinite(found).all() and np.abs(found[0, 0]).max() > 0
    red = jnp.mean(found[..., 0], axis=(0, 2))  # (F, W): more red behind in frame 0, ahead in 8
    half = np.arange(SIZE[2]) < SIZE[2] / 2
    assert red[0, half].sum() > red[0, ~half].sum() and red[8, ~half].sum() > red[8, half].sum()
    for value in (-1.0, 0.1):
        assert np.isfinite(gradient(jnp.full_like(frames, value))).all()


def test_missing_weights_name_the_file_and_the_command_and_saved_ones_are_the_same(
    weights, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"judge\.safetensors is missing: .*-m demos\.judge"):
        judge.reward.load()
    turned = {name: np.asfortranarray(value) for name, value in weights.items()}
    judge.save(turned)
    found = judge.reward.load()
    assert found.keys() == weights.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)


def test_the_file_of_prompts_holds_different_prompts_of_both_languages(tmp_path):
    prompts.main(tmp_path / "sub" / "prompts.txt", count=20)
    found = (tmp_path / "sub" / "prompts.txt").read_text("utf-8").splitlines()
    known = [world.by_text()[text] for text in found]
    assert len(set(known)) == 20 and sum(text.isascii() for text in found) == 10
    assert not {(p.attributes[0], p.attributes[1], p.attributes[3]) for p in known} & set(
        world.held_out()
    )
    with pytest.raises(ValueError, match="ask for fewer"):
        prompts.main(tmp_path / "prompts.txt", count=5000)


def test_a_tie_is_half_a_win_and_blur_lowers_the_edges():
    before = np.stack([clip()] * 4)
    blurred = np.uint8(ndimage.gaussian_filter(np.float32(before), (0, 0, 2, 2, 0)))
    found = preference_report.compared(before, [0.1, 0.2, 0.3, 0.4], blurred, [0.2, 0.2, 0.4, 0.3])
    assert found["wins"] == (1 + 0.5 + 1) / 4
    assert found["change"] == pytest.approx(0.025) and found["edges after / before"] < 0.6
