"""V5.1's noise process: rectified flow, x = (1 - sigma) data + sigma noise (spec 4.2).

`time` is 1000 sigma. Training draws unshifted, uniform sigmas; sampling walks a grid that is
shifted by the factor e, at every resolution. The methods are those of `ddpm.DDPM`.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES, align, to_index, uniform
from easyanimate_jax.facts import check_fields

SHIFT = math.e  # the released pipelines call the dynamic shift with mu = 1


@dataclass(frozen=True)
class Flow:
    """Rectified flow."""

    stratified: bool = False
    """Let the rows of a batch share out the training times (spec 4.3)."""

    train_shift: float = 1.0
    """Shift s of training times toward noise, t -> s t / (1 + (s - 1) t), as sampling shifts its
    own. Motion is decided there: from scratch, 3 learns it in half of the steps that 1 (the
    released) needs."""

    def __post_init__(self):
        check_fields(self, train_shift="(0, inf)")

    def sample_time(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Training times: whole numbers 1000 ... 1."""
        u = uniform(key, shape, self.stratified)  # 1 - t
        return NUM_TRAIN_TIMES - to_index(u / (self.train_shift - (self.train_shift - 1) * u))

    def add_noise(self, latents, noise, time):
        sigma = _sigma(time, latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents, noise, time):
        """The velocity that the network predicts; it does not depend on `time`."""
        return noise - latents

    def weight(self, time: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.ones_like(time)

    def timesteps(self, num_steps: int) -> Float[np.ndarray, "steps"]:
        """The times at which a sampler of `num_steps` steps asks the network, shifted."""
        sigma = np.linspace(1, 1 / NUM_TRAIN_TIMES, num_steps)
        return NUM_TRAIN_TIMES * (SHIFT / (SHIFT + (1 / sigma - 1)))  # 1000 exactly at first

    clean_time = 0

    def levels(self, times: Float[np.ndarray, "K"]) -> tuple[np.ndarray, np.ndarray]:
        """Signal and sigma at `times`."""
        sigma = times / NUM_TRAIN_TIMES
        return 1 - sigma, sigma

    def clean_of(self, signal, sigma):
        """What x and the prediction count for in the clean data they speak of."""
        return np.ones_like(sigma), -sigma


def _sigma(time, x) -> Float[Array, "..."]:
    """The share of noise at `time`, aligned with x."""
    return align(jnp.asarray(time, jnp.float32), x) / NUM_TRAIN_TIMES
