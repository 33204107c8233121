"""The autoencoder: parity with the reference, equal ways to run it, and what it refuses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import flat_weights
from flax import nnx

from easyanimate_jax.facts import LATENT_CHANNELS
from easyanimate_jax.models import causal_conv
from easyanimate_jax.models import vae as vae_module
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.weights.folder import load_vae
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.module import abstract, build, save_module, shapes_of
from easyanimate_jax.weights.table import their_shape, to_ours
from easyanimate_jax.weights.vae_table import table

GOLDEN = VAEConfig(channels=(32, 32, 64, 64), dtype="float32")
TINY = VAEConfig(channels=(8, 8, 16, 16), groups=4, dtype="float32")
SMALL = VAEConfig(channels=(16, 16, 16), layers=1, unshuffle=4, norm="rms", dtype="float32")

encode = jax.jit(lambda vae, video: vae.encode(video))
decode = jax.jit(lambda vae, z: vae.decode(z))
chunked_encode = jax.jit(lambda vae, video: vae.chunked_encode(video))
chunked_decode = jax.jit(lambda vae, z: vae.chunked_decode(z))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def random_weights(config: VAEConfig) -> dict[str, np.ndarray]:
    """The filling rule of appendix A, on the original's names and shapes."""
    ours = shapes_of(abstract(CausalVAE, config))
    shapes = {rule.names[0]: their_shape(rule, ours[n]) for n, rule in table(config).items()}
    weights = {}
    for j, (name, shape) in enumerate(sorted(shapes.items())):
        r = np.random.RandomState(1000 + j).standard_normal(shape)
        if r.ndim > 1:
            r = r / np.sqrt(np.prod(shape[1:]))
        else:
            r = 1 + 0.1 * r if name.endswith(".weight") else 0.1 * r
        weights[name] = r.astype(np.float32)
    return weights


def make(config: VAEConfig) -> CausalVAE:
    """With random weights everywhere: untrained ones are zero in many places."""
    return converted(random_weights(config), config)


def converted(state: dict[str, np.ndarray], config: VAEConfig) -> CausalVAE:
    problems = []
    tensors = {name: Tensor.of(array) for name, array in state.items()}
    weights = to_ours(tensors, table(config), shapes_of(abstract(CausalVAE, config)), problems)
    assert not problems
    return build(CausalVAE, config, weights)


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def channels_second(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


GOLDEN_VALUES = {
    False: (
        224,
        (-0.0268107666, 0.3523137749),
        (0.03402, -0.57319, 0.20751, 0.21942, 0.01783, 0.60418),
        (0.0899437848, 0.3398926757),
        (0.00961, -0.16104, 0.07437, 0.00913, 0.61173, 0.00619),
    ),
    True: (
        244,
        (-0.0313254849, 0.3711063143),
        (0.09746, 0.51938, 0.85503, -0.34700, -0.85732, 0.12496),
        (0.1072054291, 0.4213432648),
        (-0.05093, 0.01439, 0.34912, -0.06028, -0.12819, 0.22508),
    ),
}


@pytest.mark.parametrize("attention", [False, True])
def test_the_original_s_golden_values(attention):
    config = replace(GOLDEN, attention=attention)
    keys, moment_means, moment_values, pixel_means, pixel_values = GOLDEN_VALUES[attention]
    assert len(random_weights(config)) == keys
    vae = make(config)
    moments = jnp.concatenate(encode(vae, channels_last(normal(1, 1, 3, 9, 16, 24))), axis=-1)
    pixels = decode(vae, channels_last(normal(2, 1, 16, 3, 2, 3)))
    for found, means, values, indices in (
        (channels_second(moments), moment_means, moment_values, [0, 1, 50, 200, 400, 575]),
        (channels_second(pixels), pixel_means, pixel_values, [0, 1, 50, 384, 5000, 10367]),
    ):
        np.testing.assert_allclose((found.mean(), np.abs(found).mean()), means, atol=1e-4)
        np.testing.assert_allclose(found.ravel()[indices], values, atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "tensors", "parameters"),
    [
        (False, 228, 244_375_507),
        (True, 248, 246_478_803),
    ],
)
def test_released_sizes(attention, tensors, parameters):
    config = VAEConfig(attention=attention)
    leaves = jax.tree.leaves(nnx.eval_shape(lambda: CausalVAE(config, rngs=nnx.Rngs(0))))
    assert len(leaves) == tensors
    assert sum(leaf.size for leaf in leaves) == parameters


@pytest.fixture(scope="module")
def pair():
    """Our tiny model and diffusers' with the same random weights."""
    import torch
    from diffusers import AutoencoderKLMagvit

    torch.manual_seed(0)
    theirs = AutoencoderKLMagvit(
        block_out_channels=TINY.channels,
        layers_per_block=TINY.layers,
        norm_num_groups=TINY.groups,
        latent_channels=LATENT_CHANNELS,
    ).eval()
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    return converted(state, TINY), theirs


@pytest.mark.parametrize(
    "frames",
    [pytest.param(n, marks=pytest.mark.slow) if n in (1, 5, 49) else n for n in (1, 5, 9, 49)],
)
def test_one_pass_equals_chunks_equals_diffusers(pair, frames):
    import torch

    ours, theirs = pair
    video = normal(3, 1, frames, 16, 24, 3)
    z = normal(4, 1, (frames - 1) // 4 + 1, 2, 3, 16)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(channels_second(video).copy())).latent_dist
        pixels = theirs.decode(torch.from_numpy(channels_second(z).copy())).sample.numpy()
    for mean, logvar in (encode(ours, video), chunked_encode(ours, video)):
        np.testing.assert_allclose(channels_second(mean), posterior.mean.numpy(), atol=2e-5)
        np.testing.assert_allclose(channels_second(logvar), posterior.logvar.numpy(), atol=2e-5)
    for decoded in (decode(ours, z), chunked_decode(ours, z)):
        np.testing.assert_allclose(channels_second(decoded), pixels, atol=2e-5)


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, unshuffle=2), replace(SMALL, unshuffle=8)]
)
def test_every_unshuffle_compresses_4_8_8_and_runs_in_chunks(config):
    vae, video = make(config), normal(5, 2, 9, 16, 24, 3)
    mean, logvar = encode(vae, video)
    assert mean.shape == logvar.shape == (2, 3, 2, 3, 16)
    assert decode(vae, mean).shape == video.shape
    np.testing.assert_allclose(chunked_encode(vae, video)[0], mean, atol=1e-5)
    np.testing.assert_allclose(chunked_decode(vae, mean), decode(vae, mean), atol=1e-5)


@pytest.mark.parametrize("config", [TINY, SMALL])
def test_nothing_looks_into_the_future(config):
    vae, video = make(config), normal(6, 1, 9, 16, 16, 3)
    changed = np.concatenate([video[:, :5], video[:, 5:] + 1], axis=1)
    mean, other = encode(vae, video)[0], encode(vae, changed)[0]
    np.testing.assert_array_equal(mean[:, :2], other[:, :2])
    assert not np.allclose(mean[:, 2], other[:, 2])
    later = mean.at[:, 2].add(1)
    pixels, others = decode(vae, mean), decode(vae, later)
    np.testing.assert_array_equal(pixels[:, :5], others[:, :5])
    assert not np.allclose(pixels[:, 5], others[:, 5])


@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_all_convolutions_agree(strides, monkeypatch):
    x, kernel = normal(7, 2, 7, 8, 10, 4), normal(8, 3, 3, 3, 4, 5)
    pad = (0, 1) if strides[1] == 2 else (1, 1)
    native, stacked, whole = (
        jax.jit(form, static_argnums=(2, 3))(x, kernel, strides, pad)
        for form in (causal_conv._native, causal_conv._taps_as_channels, causal_conv.conv3d)
    )
    monkeypatch.setattr(causal_conv, "TAPS_AT_ONCE", 1)
    by_frame = jax.jit(lambda *a: causal_conv.conv3d(*a, strides, pad))(x, kernel)
    for other in (stacked, whole, by_frame):
        np.testing.assert_allclose(other, native, atol=1e-4)


def test_a_large_video_is_decoded_frame_by_frame(monkeypatch):
    """Once per chunk that has one before it; a chunk behind the first has four frames."""
    config = VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4, dtype="float32")
    vae, z = make(config), normal(9, 2, 4, 3, 2, 16)
    whole = jax.jit(lambda vae, z: vae.chunked_decode(z))(vae, z)
    taken, by_frame = [], vae_module.by_frame

    def counted(network, x, past):
        taken.append(x.shape[1])
        return by_frame(network, x, past)

    monkeypatch.setattr(vae_module, "by_frame", counted)
    monkeypatch.setattr(causal_conv, "TAPS_AT_ONCE", 1)
    by_frames = jax.jit(lambda vae, z: vae.chunked_decode(z))(vae, z)
    np.testing.assert_allclose(by_frames, whole, atol=1e-5)
    assert taken and set(taken) == {4}


def reference_blend(a, b, extent, axis):
    """The reference's loop, in place on `b`."""
    a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
    extent = min(len(a), len(b), extent)
    for k in range(extent):
        b[k] = a[k - extent] * (1 - k / extent) + b[k] * (k / extent)


def reference_tiles(network, x, size, overlap, extent, limit):
    rows = [
        [
            np.array(network(x[:, :, i : i + size, j : j + size]))
            for j in range(0, x.shape[3], overlap)
        ]
        for i in range(0, x.shape[2], overlap)
    ]
    result = []
    for i, row in enumerate(rows):
        cropped = []
        for j, tile in enumerate(row):
            if i > 0:
                reference_blend(rows[i - 1][j], tile, extent, axis=2)
            if j > 0:
                reference_blend(row[j - 1], tile, extent, axis=3)
            cropped.append(tile[:, :, :limit, :limit])
        result.append(np.concatenate(cropped, axis=3))
    return np.concatenate(result, axis=2)


@pytest.mark.slow
def test_tiles_are_the_reference_s():
    """Tiles of 32 pixels every 24, uneven at both borders: 6 latents wide, 5 high."""
    vae = make(SMALL)
    video, z = normal(9, 1, 5, 40, 48, 3), normal(10, 1, 2, 5, 6, 16)
    expected = reference_tiles(lambda x: np.stack(encode(vae, x), -1), video, 32, 24, 1, 3)
    found = jax.jit(lambda vae, x: vae.tiled_encode(x, tile=32))(vae, video)
    np.testing.assert_allclose(np.stack(found, -1), expected, atol=2e-5)

    expected = reference_tiles(lambda z: decode(vae, z), z, 4, 3, 8, 24)
    corner = np.asarray(decode(vae, z[:, :, -4:, -4:]))
    weight = np.minimum(np.linspace(0, 1, 32)[:, None], np.linspace(0, 1, 32)[None])[..., None]
    expected[:, :, -32:, -32:] = (1 - weight) * expected[:, :, -32:, -32:] + weight * corner
    found = jax.jit(lambda vae, z: vae.tiled_decode(z, tile=32))(vae, z)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("size", [(40, 48), pytest.param((24, 56), marks=pytest.mark.slow)])
def test_tiles_are_those_of_diffusers_with_the_corner_of_the_original(pair, size):
    """Tiles of 32 pixels, uneven at both borders. diffusers leaves out the original's last pass,
    over the lower right corner; its tiled encode misplaces its tiles (spec 3.6) and is no measure.
    """
    import torch

    ours, theirs = pair
    z = normal(12, 1, 3, size[0] // 8, size[1] // 8, 16)
    found = np.asarray(jax.jit(lambda vae, z: vae.tiled_decode(z, tile=32))(ours, z))
    z = torch.from_numpy(channels_second(z).copy())
    with torch.no_grad():
        corner = channels_last(theirs.decode(z[..., -4:, -4:]).sample.numpy())
        theirs.enable_tiling(32, 32, None, 24, 24)
        expected = channels_last(theirs.decode(z).sample.numpy().copy())
    theirs.use_tiling = False
    _, _, height, width, _ = corner.shape
    down, right = np.linspace(0, 1, height), np.linspace(0, 1, width)
    weight = np.minimum(down[:, None], right[None])[..., None]
    place = np.s_[:, :, -height:, -width:]
    expected[place] = expected[place] * (1 - weight) + corner * weight
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_normalisation_is_undone():
    numbers = np.arange(16.0)
    config = replace(SMALL, latent_mean=tuple(numbers), latent_scale=tuple(numbers + 1))
    vae, z = make(config), jnp.asarray(normal(11, 1, 2, 3, 4, 16))
    np.testing.assert_allclose(vae.denormalize(vae.normalize(z)), z, atol=1e-5)
    np.testing.assert_allclose(make(TINY).normalize(z), 0.7125 * z, rtol=1e-6)


@pytest.mark.parametrize(("frames", "nearest"), [(2, 1), (8, 9), (48, 49)])
def test_frames_that_do_not_fit_are_refused(frames, nearest):
    with pytest.raises(ValueError, match=f"{frames} frames.*use {nearest}"):
        make(SMALL).encode(jnp.zeros((1, frames, 16, 16, 3)))


def test_every_weight_names_its_axes():
    model = nnx.eval_shape(lambda: CausalVAE(replace(TINY, attention=True), rngs=nnx.Rngs(0)))
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    for path, p in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_variable):
        assert len(p.out_sharding) == p.get_value().ndim, jax.tree_util.keystr(path)


def test_a_folder_gives_back_the_same_model(tmp_path):
    vae = make(replace(SMALL, latent_mean=(0.5,)))
    save_module(tmp_path / "vae", vae)
    loaded = load_vae(tmp_path / "vae")
    assert loaded.config == vae.config
    before, after = flat_weights(vae), flat_weights(loaded)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_weights_that_do_not_fit_are_listed():
    weights = flat_weights(make(SMALL))
    weights["extra"] = weights.pop("quant_conv.bias")
    with pytest.raises(ValueError, match=r"(?s)quant_conv.bias is missing.*extra is not known"):
        build(CausalVAE, SMALL, weights)
