"""The frame table of the specification, and buckets that real clips fill."""

import itertools

import numpy as np
import pytest

from easyanimate_jax.data import buckets
from easyanimate_jax.data.buckets import (
    MULTIPLE,
    Budget,
    Clips,
    Shape,
    choose_all,
    fit_budget,
    fit_lengths,
    name_word,
)

SIZES = (256, 384, 512, 640, 768, 896, 1024, 1152, 1280)
TABLE_A = {
    3328: (49, 21, 13, 5, 5, 5, 1, 1, 1),
    13312: (49, 49, 49, 29, 21, 17, 13, 9, 5),
    53248: (49, 49, 49, 49, 49, 49, 49, 37, 29),
}
TABLE_B = {
    3328: (49, 21, 9, 5, 5, 1, 1, 1, 1),
    13312: (49, 49, 49, 29, 21, 13, 9, 9, 5),
    53248: (49, 49, 49, 49, 49, 49, 49, 37, 29),
}
DEMO = {48: range(64, 113, 16), 192: range(64, 257, 16), 768: range(96, 449, 16)}


@pytest.mark.parametrize("tokens", TABLE_A)
def test_frames_per_resolution_follow_both_formulas(tokens):
    budget = Budget(tokens, (2 * tokens,), SIZES).pixels
    for i, size in enumerate(SIZES):
        assert buckets.frames_for_budget_a(budget, size * size) == TABLE_A[tokens][i]
        assert buckets.frames_for_budget_b(budget, size * size) == TABLE_B[tokens][i]


def test_token_counts_of_the_specification():
    assert buckets.num_tokens(49, 384, 672) == 13104
    assert buckets.num_tokens(49, 512, 512) == 13312
    assert buckets.num_tokens(21, 768, 768) == 13824
    assert buckets.grid_of(49, 720 - 16, 1280) == (13, 44, 80)


def test_frames_must_be_4n_plus_1_and_sides_whole_tokens():
    with pytest.raises(ValueError, match=r"48 frames.*use 45"):
        buckets.latent_frames(48)
    with pytest.raises(ValueError, match="multiples of 16"):
        buckets.grid_of(1, 720, 1280 - 8)


def test_the_aspect_table_has_forty_entries_of_about_one_area():
    assert len(buckets.ASPECTS) == 40
    for key, (height, width) in buckets.ASPECTS.items():
        assert abs(height / width - key) < 0.0051
        assert 0.9 < height * width / 512**2 <= 1.0
    assert buckets.aspect_sizes(512) == buckets.ASPECTS
    assert buckets.aspect_sizes(256)[1.0] == (256, 256)
    assert buckets.aspect_sizes(256)[0.57] == (192, 336)


def test_candidates_keep_aspect_duration_and_scale():
    budget = Budget(13312, (13312, 13824), SIZES)
    assert budget.candidates(49, 1080, 1080)[2:7] == [
        Shape(49, 512, 512),
        Shape(29, 640, 640),
        Shape(21, 768, 768),
        Shape(13, 896, 896),
        Shape(9, 1024, 1024),
    ]
    assert {shape.frames for shape in budget.candidates(12, 512, 512)} == {9}
    assert max(s.height for s in budget.candidates(49, 512, 512)) == 640  # 1.25 times
    assert all(h < w for _, h, w in budget.candidates(49, 720, 1280))


def test_a_strict_capacity_shortens_the_clip():
    assert Shape(17, 768, 768) in Budget(13312, (13312,), SIZES).candidates(49, 900, 900)


def test_good_fills_mix_by_name_and_a_name_always_gives_the_same():
    budget = Budget(13312, (12288, 13312, 13824), (512, 768, 1024))
    chosen = [budget.choose(49, 1080, 1080, f"{i}.mp4") for i in range(30)]
    assert set(chosen) == {Shape(49, 512, 512), Shape(21, 768, 768), Shape(9, 1024, 1024)}
    assert chosen == [budget.choose(49, 1080, 1080, f"{i}.mp4") for i in range(30)]


def test_a_clip_that_cannot_fill_a_length_is_left_out():
    assert Budget(768, (768,), (256,)).choose(1, 64, 64, "small") is None


@pytest.mark.parametrize("tokens", DEMO)
def test_small_budgets_are_filled_at_any_aspect_and_duration(tokens):
    budget = Budget(tokens, (tokens,), tuple(DEMO[tokens]))
    fills = []
    for short, aspect, frames in itertools.product(
        (64, 96, 128, 192, 256), (1.0, 0.75, 1.33, 0.67, 1.5, 0.5, 2.0), (1, 5, 9, 13, 17, 25)
    ):
        height, width = (short, int(short / aspect)) if aspect < 1 else (int(short * aspect), short)
        shape = budget.choose(frames, height, width, f"{short}-{aspect}-{frames}")
        if shape:
            assert shape.frames <= frames and (shape.frames > 1 or frames == 1)
            assert buckets.num_tokens(*shape) <= tokens
            assert max(shape.height / height, shape.width / width) <= 1.25
            assert abs(np.log(shape.height / shape.width / (height / width))) < np.log(1.151)
            fills.append(budget.fill(shape))
    assert len(fills) > 80 and np.mean(fills) >= 0.96


def test_describe_lists_every_resolution_with_its_frames():
    rows = Budget(13312, (13312, 13824), (512, 768)).describe()
    assert (Shape(49, 512, 512), 13312, 13312) in rows
    assert (Shape(21, 768, 768), 13824, 13824) in rows
    assert (Shape(49, 384, 672), 13104, 13312) in rows
    assert len(rows) == 80


@pytest.mark.parametrize("wrong", [{"lengths": ()}, {"lengths": (9, 4)}, {"sizes": ()}])
def test_contradictions_are_refused(wrong):
    with pytest.raises(ValueError, match="Budget"):
        Budget(**({"tokens": 48, "lengths": (48,), "sizes": (64,)} | wrong))


def padded(tokens, counts, lengths):
    return np.dot(np.array(lengths)[np.searchsorted(lengths, tokens)], counts)


def test_fitted_lengths_pad_least_of_all():
    rng = np.random.default_rng(0)
    for most in (1, 2, 3):
        tokens = rng.integers(1, 9 * MULTIPLE, 12)
        counts = rng.integers(1, 100, 12)
        ends = np.unique(-(-tokens // MULTIPLE) * MULTIPLE)
        best = min(
            padded(tokens, counts, [*some, ends[-1]])
            for n in range(most)
            for some in itertools.combinations(ends[:-1], n)
        )
        fitted = fit_lengths(tokens, counts, most)
        assert (
            len(fitted) <= most
            and fitted[-1] == ends[-1]
            and padded(tokens, counts, fitted) == best
        )


def test_a_handful_of_samples_gets_no_length_of_its_own():
    tokens, counts = np.array([100, 5000, 9000]), np.array([1, 50_000, 50_000])
    assert fit_lengths(tokens, counts) == (5120, 9216)


def source_clips(number=4000):
    rng = np.random.default_rng(0)
    sizes = np.array([(1080, 1920), (720, 1280), (1920, 1080), (480, 854), (960, 1280)])
    height, width = sizes[rng.integers(0, len(sizes), number)].T
    odd = rng.random(number) < 0.1
    height = np.where(odd, rng.integers(100, 2000, number), height)
    frames = np.where(rng.random(number) < 0.2, 1, rng.integers(2, 90, number))
    words = [name_word(f"{i}.mp4") for i in range(number)]
    return Clips(frames, height, width, np.array(words, np.uint64))


@pytest.fixture(scope="module")
def fitted():
    return fit_budget(Budget(13312, (1,), tuple(range(256, 1025, 128))), source_clips())


def test_many_clips_become_what_each_alone_would(fitted):
    clips = source_clips(1500)
    choice = choose_all(fitted, clips)
    for i, (frames, height, width, _) in enumerate(zip(*clips, strict=True)):
        alone = fitted.choose(int(frames), int(height), int(width), f"{i}.mp4")
        assert alone == (choice.shapes[choice.shape[i]] if choice.shape[i] >= 0 else None)
        assert bool(choice.reasons[choice.reason[i]]) == (alone is None)


def test_fitted_lengths_are_filled(fitted):
    assert len(fitted.lengths) <= 6 and all(length % MULTIPLE == 0 for length in fitted.lengths)
    choice = choose_all(fitted, source_clips())
    used = choice.shape >= 0
    tokens = np.array([buckets.num_tokens(*s) for s in choice.shapes])[choice.shape[used]]
    padded = np.array(fitted.lengths)[np.searchsorted(fitted.lengths, tokens)]
    assert used.mean() > 0.95 and tokens.sum() / padded.sum() >= 0.97
