"""V5.1's noise process: rectified flow, x = (1 - sigma) data + sigma noise (spec 4.2).

`time` is 1000 sigma. Training draws unshifted, uniform sigmas; sampling walks a grid that is
shifted by the factor e, at every resolution. The methods are those of `ddpm.DDPM`.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from easyanimate_jax.diffusion.times import (
    NUM_TRAIN_TIMES,
    align,
    first_step,
    to_index,
    uniform,
)

SHIFT = math.e  # the released pipelines call the dynamic shift with mu = 1


@dataclass(frozen=True)
class Flow:
    """Rectified flow. `stratified`: the rows of a batch share out the times (spec 4.3);
    `train_shift`: moves training times toward noise, as sampling's are moved, by
    t -> s t / (1 + (s - 1) t). Motion is decided there: from scratch, 3 learns it in half of
    the steps that 1 (the released) needs."""

    stratified: bool = False
    train_shift: float = 1.0

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

    def predict_clean(self, x, prediction, time):
        return x - _sigma(time, x) * prediction

    def intervals(self, num_steps: int, strength: float = 1.0) -> Float[np.ndarray, "steps 2"]:
        """The (time, next_time) of each Euler step; the last one ends at 0, clean data."""
        start = first_step(num_steps, strength)
        sigma = np.linspace(1, 1 / NUM_TRAIN_TIMES, num_steps)
        sigma = np.append(SHIFT / (SHIFT + 1 / sigma - 1), 0)
        time = (NUM_TRAIN_TIMES * sigma)[start:]
        return np.stack([time[:-1], time[1:]], axis=1).astype(np.float32)

    def timesteps(self, num_steps: int, strength: float = 1.0) -> Float[np.ndarray, "steps"]:
        return self.intervals(num_steps, strength)[:, 0]

    def step(self, x, prediction, time, next_time):
        """One Euler step, in float32; a `next_time` of 0 or less is clean data."""
        moved = jnp.maximum(_sigma(next_time, x), 0) - _sigma(time, x)
        return (x + moved * prediction).astype(x.dtype)


def _sigma(time, x) -> Float[Array, "..."]:
    """The share of noise at `time`, aligned with x."""
    return align(jnp.asarray(time, jnp.float32), x) / NUM_TRAIN_TIMES
