"""V5's noise process: DDPM with zero terminal SNR, v-prediction, sampled by DDIM (spec 4.1).

`time` is 0 ... 999; at 999 nothing of the signal is left, so sampling starts from pure noise.
A process is a value: `DDPM` and `flow.Flow` have the same methods. Times of shape (B,) or () are
broadcast over the other dimensions, so all of it works on latents and on tokens.
"""

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


def _signal_power() -> np.ndarray:
    """The cumulative alphas (1000,): scaled-linear betas, rescaled to zero terminal SNR."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMES) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return (root**2).astype(np.float32)


SIGNAL_POWER = _signal_power()


@dataclass(frozen=True)
class DDPM:
    """Zero-SNR v-prediction. `stratified`: the rows of a batch share out the times (spec 4.3)."""

    stratified: bool = False

    def sample_time(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Training times: whole numbers 0 ... 999."""
        return to_index(uniform(key, shape, self.stratified))

    def add_noise(self, latents, noise, time):
        signal, sigma = _scales(time, latents)
        return signal * latents + sigma * noise

    def target(self, latents, noise, time):
        """The velocity v that the network predicts."""
        signal, sigma = _scales(time, latents)
        return signal * noise - sigma * latents

    def weight(self, time: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.ones_like(time)

    def predict_clean(self, x, prediction, time):
        signal, sigma = _scales(time, x)
        return signal * x - sigma * prediction

    def intervals(self, num_steps: int, strength: float = 1.0) -> Float[np.ndarray, "steps 2"]:
        """The (time, next_time) of each DDIM step, trailing spacing; -1 or less is clean data.

        As in the reference, the next time is `time - 1000 // num_steps`: where num_steps does not
        divide 1000 it can differ by one from the time of the following step.
        """
        start = first_step(num_steps, strength)
        k = np.arange(start, num_steps)
        time = np.round(NUM_TRAIN_TIMES - k * NUM_TRAIN_TIMES / num_steps) - 1
        return np.stack([time, time - NUM_TRAIN_TIMES // num_steps], axis=1).astype(np.float32)

    def timesteps(self, num_steps: int, strength: float = 1.0) -> Float[np.ndarray, "steps"]:
        return self.intervals(num_steps, strength)[:, 0]

    def step(self, x, prediction, time, next_time):
        """One DDIM step with eta = 0, in float32; a negative `next_time` is clean data."""
        signal, sigma = _scales(time, x)
        clean = signal * x - sigma * prediction
        noise = signal * prediction + sigma * x
        signal, sigma = _scales(next_time, x)
        return (signal * clean + sigma * noise).astype(x.dtype)


def _scales(time, x) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """How much signal and how much noise there is at `time`, aligned with x."""
    time = jnp.asarray(time)
    power = jnp.asarray(SIGNAL_POWER)[jnp.maximum(time, 0).astype(jnp.int32)]
    power = align(jnp.where(time < 0, 1.0, power), x)
    return jnp.sqrt(power), jnp.sqrt(1 - power)
