"""A network, texts and sizes that several test files put in the place of the real ones."""

import jax.numpy as jnp
import numpy as np

from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.models.vae import VAEConfig

TINY = MMDiTConfig(
    depth=1,
    mmdit_depth=1,
    heads=2,
    head_width=16,
    in_channels=33,
    text_widths=(8,),
    text_norm=False,
    round_time=False,
    time_width=16,
    dtype="float32",
)
TINY_VAE = VAEConfig(channels=(8, 8, 8), layers=1, groups=4, unshuffle=4, dtype="float32")


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def some_texts(rows, seed=0):
    return random(rows, 3, 8, seed=seed), random(rows, 4, 12, seed=seed + 1)


def fake_network(tokens, time, texts):
    """Depends on every input, row by row."""
    text = texts[0].mean((1, 2)) + texts[1].mean((1, 2))
    return 0.1 * tokens[..., :64] + jnp.sin(time)[:, None, None] + text[:, None, None]
