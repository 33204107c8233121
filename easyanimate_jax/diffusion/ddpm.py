"""V5's noise process: DDPM with zero terminal SNR, v-prediction (spec 4.1).

`time` is 0 ... 999; at 999 nothing of the signal is left, so sampling starts from pure noise.
A process is a value: `DDPM` and `flow.Flow` have the same methods. Times of shape (B,) or () are
broadcast over the other dimensions, so all of it works on latents and on tokens. `samplers` makes
the walks from noise to data of `timesteps`, `levels` and `clean_of`, in float64 on the host.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES, align, to_index, uniform


def _signal_power() -> tuple[np.ndarray, np.ndarray]:
    """The cumulative alphas (1000,) of scaled-linear betas, as they are and at zero final SNR."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMES) ** 2
    power = np.cumprod(1 - betas)
    root = np.sqrt(power)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return power, root**2


SIGNAL_POWER_OF_BETAS, _POWER = _signal_power()
SIGNAL_POWER = _POWER.astype(np.float32)


@dataclass(frozen=True)
class DDPM:
    """Zero-SNR v-prediction."""

    stratified: bool = False
    """Let the rows of a batch share out the training times (spec 4.3)."""

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

    def timesteps(self, num_steps: int) -> Float[np.ndarray, "steps"]:
        """The times at which a sampler of `num_steps` steps asks the network: trailing spacing."""
        k = np.arange(num_steps)
        return np.round(NUM_TRAIN_TIMES - k * NUM_TRAIN_TIMES / num_steps) - 1

    clean_time = -1  # and less: where only data is left

    def levels(self, times: Float[np.ndarray, "K"]) -> tuple[np.ndarray, np.ndarray]:
        """Signal and sigma at whole `times`."""
        power = np.where(times < 0, 1.0, _POWER[np.maximum(times, 0).astype(int)])
        return np.sqrt(power), np.sqrt(1 - power)

    def clean_of(self, signal, sigma):
        """What x and the prediction count for in the clean data they speak of."""
        return signal, -sigma


def _scales(time, x) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """How much signal and how much noise there is at `time`, aligned with x."""
    power = align(jnp.asarray(SIGNAL_POWER)[jnp.asarray(time).astype(jnp.int32)], x)
    return jnp.sqrt(power), jnp.sqrt(1 - power)
