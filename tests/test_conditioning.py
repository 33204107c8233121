import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easyanimate_jax.diffusion import conditioning
from easyanimate_jax.diffusion.conditioning import (
    draw_mask,
    guide,
    inpaint_condition,
    masked_video,
    noised_reference,
    random_mask,
    reference_noise,
    resize_mask,
)
from easyanimate_jax.prepare import clips

FRAMES, HEIGHT, WIDTH = 17, 32, 48


def given(*frames, total=13):
    """The channel that enters the network, per latent frame, when whole frames are given."""
    mask = np.ones((1, total, 16, 16, 1), np.float32)
    mask[:, list(frames)] = 0
    return np.asarray(resize_mask(1 - jnp.asarray(mask)))[0, :, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([0], [1, 0, 0, 0]),
        ([0, 1], [1, 0, 0, 0]),
        ([0, 1, 2], [1, 0.5, 0, 0]),
        ([0, 1, 2, 3], [1, 1, 0, 0]),
        ([0, -1], [1, 0, 0, 0]),  # the end image is not seen in the mask
        ([-1, -2], [0, 0, 0, 0.5]),
        ([-1, -2, -3], [0, 0, 0, 1]),
        ([-1, -2, -3, -4], [0, 0, 0, 1]),
    ],
)
def test_given_frames_reach_the_latent_mask_as_in_the_reference(frames, expected):
    assert given(*frames) == expected


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_masks_shrink_like_trilinear_torch(frames):
    mask = np.random.default_rng(0).random((2, frames, 24, 32, 1)).astype(np.float32)
    torch_mask = torch.from_numpy(mask).permute(0, 4, 1, 2, 3)
    parts = [torch.nn.functional.interpolate(torch_mask[:, :, :1], (1, 3, 4), mode="trilinear")]
    if frames > 1:
        size = ((frames - 1) // 4, 3, 4)
        rest = torch.nn.functional.interpolate(torch_mask[:, :, 1:], size, mode="trilinear")
        parts.append(rest)
    expected = torch.cat(parts, dim=2).permute(0, 2, 3, 4, 1)
    np.testing.assert_allclose(resize_mask(jnp.asarray(mask)), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16, 1), (1, 5, 20, 16, 1), (1, 5, 16, 12, 1)])
def test_masks_that_do_not_fit_the_latents_are_refused(shape):
    with pytest.raises(ValueError, match="frames must be 4n"):
        resize_mask(jnp.ones(shape))


def test_the_condition_holds_the_scaled_mask_and_the_latents():
    mask = jnp.ones((1, 9, 16, 16, 1)).at[:, :3].set(0)
    latents = jnp.full((1, 3, 2, 2, 16), 7.0)
    condition = np.asarray(inpaint_condition(mask, latents))
    assert condition.shape == (1, 3, 2, 2, 17)
    np.testing.assert_allclose(condition[0, :, 0, 0, 0], [0.7125, 0.35625, 0])
    assert (condition[..., 1:] == 7).all()


def test_unknown_pixels_are_exactly_minus_one_and_stay_so():
    video = jax.random.uniform(jax.random.key(0), (2, 5, 16, 16, 3), minval=-0.9)
    video = video.at[:, 0, 0, 0].set(-1)  # black, although given
    mask = jnp.ones((2, 5, 16, 16, 1)).at[:, 0].set(0)
    masked = masked_video(video, mask)
    noised = reference_noise(jax.random.key(1), masked, jnp.array([0.0, 0.5]))
    assert (masked[:, 1:] == -1).all() and (masked[:, 0] == video[:, 0]).all()
    assert (noised[:, 1:] == -1).all() and (noised[:, 0, 0, 0] == -1).all()
    np.testing.assert_array_equal(noised[0], masked[0])
    change = (noised - masked)[1, 0].ravel()[3:]
    assert (change != 0).all() and abs(change.std() - 0.5) < 0.05


@pytest.fixture(scope="module")
def conditions():
    """What `prepare` and training draw of a grey clip with black spots, a generator each."""
    video = np.zeros((5, 16, 16, 3), np.float32)
    video[:, 3:5, 3:5] = -1  # black, although it may be given
    return [clips._condition(np.random.default_rng([7, seed]), video) for seed in range(3000)]


def test_training_noise_is_log_normal_and_drawn_for_each_clip(conditions):
    known = [c.given[c.given != -1] for c in conditions]
    logs = np.log([values.std() for values in known if values.size > 500])
    assert len(logs) > 1500
    error = 0.5 / np.sqrt(len(logs))
    assert abs(logs.mean() + 3) < 3 * error and abs(logs.std() - 0.5) < 3 * error


def test_training_noise_spares_unknown_and_black_pixels(conditions):
    rng, mask = np.random.default_rng(0), np.ones((5, 16, 16, 1), np.float32)
    mask[0] = 0
    video = rng.uniform(-0.9, 1, (5, 16, 16, 3)).astype(np.float32)
    video[0, 0, 0] = -1  # black, although given
    given = noised_reference(rng, video, mask)
    assert given.dtype == np.float32
    assert (given[1:] == -1).all() and (given[0, 0, 0] == -1).all()
    assert (given[0].ravel()[3:] != video[0].ravel()[3:]).all()
    assert all((c.given[:, 3:5, 3:5] == -1).all() for c in conditions)


def test_guidance_of_one_is_the_conditional_prediction():
    u, c = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    np.testing.assert_allclose(guide(u, c, 1.0), c, atol=1e-6)
    np.testing.assert_allclose(guide(u, c, 6.0), u + 6 * (c - u), atol=1e-6)


def test_rescaled_guidance_follows_the_formula_of_diffusers():
    u, c = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    guided, text = (torch.from_numpy(np.array(x)) for x in (guide(u, c, 6.0), c))
    std_text, std_guided = (x.std(dim=(1, 2), keepdim=True) for x in (text, guided))
    expected = 0.7 * guided * (std_text / std_guided) + 0.3 * guided
    np.testing.assert_allclose(guide(u, c, 6.0, 0.7), expected, atol=1e-5)


def test_padding_does_not_enter_the_rescaling():
    u, c = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    real = jnp.arange(6)[None, :, None] < 4
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 2), (0, 0)), constant_values=9)  # noqa: E731
    padded = guide(pad(u), pad(c), 6.0, 0.7, where=jnp.broadcast_to(real, (3, 6, 5)))
    np.testing.assert_allclose(padded[:, :4], guide(u, c, 6.0, 0.7), rtol=1e-5)


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_kinds_come_as_often_as_in_the_reference(frames, monkeypatch):
    def record(_, kind, *shape):
        kinds.append(kind)
        return np.zeros((*shape, 1), np.float32)

    kinds = []
    monkeypatch.setattr(conditioning, "draw_mask", record)
    rng, draws = np.random.default_rng(0), 10_000
    for _ in range(draws):
        random_mask(rng, frames, HEIGHT, WIDTH)
    expected = [0.2, 0.8] if frames == 1 else [0.05, 0.2, 0.2, 0.2, *[0.05] * 3, 0.1, 0.05, 0.05]
    share = np.bincount(kinds, minlength=len(expected)) / draws
    np.testing.assert_allclose(share, expected, atol=0.015)


def transcribed(rng, kind, frames, height, width):
    """The table of the specification, pixel by pixel, as the reference computes it."""
    draw = lambda low, high: int(rng.integers(low, high))  # noqa: E731
    mask = np.zeros((frames, height, width))

    def box():
        cx, cy = draw(0, width), draw(0, height)
        w, h = draw(width // 4, width // 4 * 3), draw(height // 4, height // 4 * 3)
        return (
            range(max(cx - w // 2, 0), min(cx + w // 2, width)),
            range(max(cy - h // 2, 0), min(cy + h // 2, height)),
        )

    if kind in (0, 4):
        xs, ys = box()
        fs = range(frames) if kind == 0 else range(draw(0, frames // 2), draw(frames // 2, frames))
        mask[np.ix_(list(fs), list(ys), list(xs))] = 1
    elif kind == 1:
        mask[:] = 1
    elif kind in (2, 3):
        k = draw(1, 5)
        mask[k : frames if kind == 2 else frames - k] = 1
    elif kind == 5:
        mask = (rng.random(mask.shape) < 0.5).astype(float)
    elif kind == 6:
        count = draw(1, max(frames // 2, 1) + 1)
        for f in rng.permutation(frames)[:count]:
            h, w = draw(1, height // 4 + 1), draw(1, width // 4 + 1)
            y, x = draw(0, height - h + 1), draw(0, width - w + 1)
            mask[f, y : y + h, x : x + w] = 1
    elif kind in (7, 8):
        cx, cy, small = draw(0, width), draw(0, height), min(height, width)
        a, b = draw(small // 8, small // 4), draw(small // 8, small // 4)
        for y in range(height):
            for x in range(width):
                if kind == 7:
                    mask[:, y, x] = (x - cx) ** 2 / a**2 + (y - cy) ** 2 / b**2 < 1
                else:
                    mask[:, y, x] = (x - cx) ** 2 + (y - cy) ** 2 < a**2
    else:
        for f in range(frames):
            mask[f] = rng.random() < 0.5
    return mask


def features(masks):
    """What two distributions of masks are compared by, one row per mask."""
    frames = masks.mean((2, 3))
    return np.stack(
        [
            masks.mean((1, 2, 3)),
            masks.mean((1, 2, 3)) ** 2,
            (frames > 0).mean(1),
            frames.max(1),
            frames[:, 0],
            frames[:, -1],
            masks.any(1).any(1).mean(1),
            masks.any(1).any(2).mean(1),
            masks[:, :, HEIGHT // 2, WIDTH // 2].mean(1),
            masks[:, :, 0, 0].mean(1),
        ],
        axis=1,
    )


@pytest.mark.parametrize("kind", range(10))
def test_masks_are_distributed_as_the_table_says(kind):
    draws = 100 if kind == 1 else 600
    rng, other = np.random.default_rng(kind), np.random.default_rng(100 + kind)
    ours = [draw_mask(rng, kind, FRAMES, HEIGHT, WIDTH) for _ in range(draws)]
    assert ours[0].shape == (FRAMES, HEIGHT, WIDTH, 1) and set(np.unique(ours)) <= {0, 1}
    ours = features(np.stack(ours)[..., 0])
    table = features(
        np.stack([transcribed(other, kind, FRAMES, HEIGHT, WIDTH) for _ in range(draws)])
    )
    error = np.sqrt((ours.var(0) + table.var(0)) / draws)
    assert (np.abs(ours.mean(0) - table.mean(0)) <= 4 * error + 1e-6).all()


def test_short_clips_and_images_have_masks_of_every_kind():
    rng = np.random.default_rng(0)
    for kind in range(10):
        assert draw_mask(rng, kind, 5, 16, 16).shape == (5, 16, 16, 1)
    for _ in range(50):
        mask = draw_mask(rng, 3, 5, 16, 16)[:, 0, 0, 0]  # empty where 2k >= 5
        assert mask.tolist() in ([0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0] * 5)
