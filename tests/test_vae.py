"""The autoencoder: parity with the reference, equal ways to run it, and what it refuses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easyanimate_jax.convert.folder import build, flat_weights, load_vae, save_module
from easyanimate_jax.convert.vae import from_torch, to_torch
from easyanimate_jax.models import vae as vae_module
from easyanimate_jax.models.vae import CausalVAE, VAEConfig

GOLDEN = VAEConfig(channels=(32, 32, 64, 64), dtype="float32")
TINY = VAEConfig(channels=(8, 8, 16, 16), groups=4, layers=1, dtype="float32")
SMALL = VAEConfig(channels=(16, 16, 16), layers=1, unshuffle=4, norm="rms", dtype="float32")

encode = jax.jit(lambda vae, video: vae.encode(video))
decode = jax.jit(lambda vae, z: vae.decode(z))
chunked_encode = jax.jit(lambda vae, video: vae.chunked_encode(video))
chunked_decode = jax.jit(lambda vae, z: vae.chunked_decode(z))


def make(config: VAEConfig) -> CausalVAE:
    return jax.jit(lambda: CausalVAE(config, rngs=nnx.Rngs(0)))()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def golden_weights(config: VAEConfig) -> dict[str, np.ndarray]:
    """The filling rule of appendix A, on the original's names and shapes."""
    shapes = to_torch(flat_weights(make(config)))
    weights = {}
    for j, name in enumerate(sorted(shapes)):
        shape = shapes[name].shape
        r = np.random.RandomState(1000 + j).standard_normal(shape)
        if len(shape) > 1:
            r = r / np.sqrt(np.prod(shape[1:]))
        else:
            r = 1 + 0.1 * r if name.endswith(".weight") else 0.1 * r
        weights[name] = r.astype(np.float32)
    return weights


def golden_vae(config: VAEConfig) -> CausalVAE:
    return build(CausalVAE, config, from_torch(golden_weights(config)))


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
    assert len(golden_weights(config)) == keys
    vae = golden_vae(config)
    moments = jnp.concatenate(encode(vae, channels_last(normal(1, 1, 3, 9, 16, 24))), axis=-1)
    pixels = decode(vae, channels_last(normal(2, 1, 16, 3, 2, 3)))
    for found, means, values, indices in (
        (channels_second(moments), moment_means, moment_values, [0, 1, 50, 200, 400, 575]),
        (channels_second(pixels), pixel_means, pixel_values, [0, 1, 50, 384, 5000, 10367]),
    ):
        np.testing.assert_allclose((found.mean(), np.abs(found).mean()), means, atol=1e-4)
        np.testing.assert_allclose(found.ravel()[indices], values, atol=1e-4)
