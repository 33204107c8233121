"""V5's noise process: DDPM with zero terminal SNR, v-prediction (spec 4.1).

`time` is 0 to 999. At 999 no signal is left, so sampling starts from pure noise. `DDPM` and
`flow.Flow` have the same methods. Times of shape (B,) or () are broadcast over the other
dimensions, so the methods work on latents and on tokens. `samplers` builds its tables from
`timesteps`, `levels` and `clean_of`, in float64 on the host.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES, align, to_index, uniform


def _signal_power() -> tuple[np.ndarray, np.ndarray]:
    """Return cumulative alphas (1000,) of scaled-linear betas, original and with zero final SNR."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMES) ** 2
    power = np.cumprod(1 - betas)
    root = np.sqrt(power)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return power, root**2


SIGNAL_POWER_OF_BETAS, _POWER = _signal_power()
SIGNAL_POWER = _POWER.astype(np.float32)


@dataclass(frozen=True)
class DDPM:
    """DDPM with zero terminal SNR and v-prediction (spec 4.1)."""

    stratified: bool = False
    """Draw the times of a batch from equal intervals, one row in each (spec 4.3)."""

    def sample_time(
        self, key: PRNGKeyArray, shape: tuple[int, ...], tokens: Int[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Return random training times of `shape`: float32 integers from 0 to 999.

        They do not depend on `tokens`, the lengths of the clips.
        """
        return self.time_of(uniform(key, shape, self.stratified), tokens)

    def time_of(
        self, u: Float[Array, "..."], tokens: Int[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Return the time below which the share `u` of the training times lies (`sample_time`)."""
        del tokens
        return to_index(u)

    def add_noise(self, latents, noise, time):
        """Return the noisy latents at `time`."""
        signal, sigma = _scales(time, latents)
        return signal * latents + sigma * noise

    def target(self, latents, noise, time):
        """Return the velocity v that the network learns to predict."""
        signal, sigma = _scales(time, latents)
        return signal * noise - sigma * latents

    def weight(self, time: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the weight of the loss at `time`: 1 everywhere."""
        return jnp.ones_like(time)

    def timesteps(self, num_steps: int, shift: float | None = None) -> Float[np.ndarray, "steps"]:
        """Return the times at which a sampler evaluates the network: trailing spacing.

        Raises ValueError for a `shift`, which only a flow has.
        """
        if shift is not None:
            raise ValueError(f"shift is {shift:g}, and only V5.1's flow has one: leave it out")
        k = np.arange(num_steps)
        return np.round(NUM_TRAIN_TIMES - k * NUM_TRAIN_TIMES / num_steps) - 1

    def predict_clean(self, x, prediction, time):
        """Return the data that noisy latents and a prediction at `time` say."""
        signal, sigma = _scales(time, x)
        return signal * x - sigma * prediction

    def time_at(self, share):
        """Return the time at a share of the way from data to noise."""
        return (NUM_TRAIN_TIMES * share).round() - 1

    def grid(self, count: int) -> Float[np.ndarray, "count"]:
        """Return the times at which `count` equal moves begin: those of `timesteps`."""
        return self.time_at(1 - np.arange(count) / count)

    clean_time = -1  # at this time and below, no noise is left

    def levels(self, times: Float[np.ndarray, "K"]) -> tuple[np.ndarray, np.ndarray]:
        """Return the scales of data and of noise at integer `times`, float64."""
        power = np.where(times < 0, 1.0, _POWER[np.maximum(times, 0).astype(int)])
        return np.sqrt(power), np.sqrt(1 - power)

    def clean_of(self, signal, sigma):
        """Return the factors of x and of the prediction whose weighted sum is the clean data."""
        return signal, -sigma


def _scales(time, x) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return the scales of data and of noise at `time`, shaped to broadcast with x."""
    power = align(jnp.asarray(SIGNAL_POWER)[jnp.asarray(time).astype(jnp.int32)], x)
    return jnp.sqrt(power), jnp.sqrt(1 - power)
