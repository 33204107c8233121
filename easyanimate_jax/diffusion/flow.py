"""V5.1's noise process: rectified flow, x = (1 - sigma) data + sigma noise (spec 4.2).

`time` is 1000 sigma. Training draws uniform sigmas, by default without a shift. Sampling uses a
grid of sigmas that is shifted by the factor e at every resolution. `Flow` and `ddpm.DDPM` have the
same methods.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES, align, to_index, uniform
from easyanimate_jax.facts import check_fields

SHIFT = math.e  # the released pipelines use the dynamic shift with mu = 1
TimeLaw = Literal["uniform", "logit_normal", "mode"]


@dataclass(frozen=True)
class Flow:
    """Rectified flow (spec 4.2)."""

    stratified: bool = False
    """Draw the times of a batch from equal intervals, one row in each (spec 4.3)."""

    time: TimeLaw = "uniform"
    """Law of the training times before their shift. "logit_normal" and "mode" draw more from the
    middle (Esser et al. 2024, arXiv 2403.03206, section 3.1); the released value is "uniform"."""

    logit_std: float = 1.0
    """Standard deviation of log(t / (1 - t)) under "logit_normal"."""

    mode_scale: float = 1.29
    """Scale s of "mode": the larger, the fewer times at the two ends; -1 to 2 / (pi - 2) = 1.75."""

    train_shift: float = 1.0
    """Shift s of training times toward noise: t -> s t / (1 + (s - 1) t), as sampling does. The
    model decides motion at high noise: from scratch, 3 learns it in half the steps of 1, the
    released value."""

    shift_tokens: int = 0
    """Tokens at which `train_shift` holds: a clip of n tokens has the shift `train_shift` x
    sqrt(n / `shift_tokens`), because more tokens hide less behind the same noise (the same paper,
    equation 23). 0 gives all clips the same shift."""

    def __post_init__(self):
        check_fields(
            self,
            logit_std="(0, inf)",
            mode_scale="[-1, 1.75]",
            train_shift="(0, inf)",
            shift_tokens="[0, inf)",
        )

    def sample_time(
        self, key: PRNGKeyArray, shape: tuple[int, ...], tokens: Int[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Return random training times of `shape`: float32 integers from 1 to 1000.

        `tokens` are the lengths of the clips, which broadcast with `shape`; without them
        `shift_tokens` is not used.
        """
        return self.time_of(uniform(key, shape, self.stratified), tokens)

    def time_of(
        self, u: Float[Array, "..."], tokens: Int[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Return the time above which the share `u` of the training times lies (`sample_time`)."""
        if self.time == "logit_normal":
            u = jax.nn.sigmoid(self.logit_std * jax.scipy.special.ndtri(u))
        elif self.time == "mode":
            u = u + self.mode_scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)
        shift = self.train_shift
        if self.shift_tokens and tokens is not None:
            shift = shift * jnp.sqrt(tokens / self.shift_tokens)
        return NUM_TRAIN_TIMES - to_index(u / (shift - (shift - 1) * u))

    def add_noise(self, latents, noise, time):
        """Return the noisy latents at `time`."""
        sigma = _sigma(time, latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents, noise, time):
        """Return the velocity that the network learns to predict; it is the same at every time."""
        return noise - latents

    def weight(self, time: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the weight of the loss at `time`: 1 everywhere."""
        return jnp.ones_like(time)

    def timesteps(self, num_steps: int, shift: float | None = None) -> Float[np.ndarray, "steps"]:
        """Return the times at which a sampler evaluates the network, 1000 first.

        A larger `shift` puts more of them at high noise; None is `SHIFT`.
        """
        shift, sigma = shift or SHIFT, np.linspace(1, 1 / NUM_TRAIN_TIMES, num_steps)
        return NUM_TRAIN_TIMES * (shift / (shift + (1 / sigma - 1)))  # the first is exactly 1000

    def predict_clean(self, x, prediction, time):
        """Return the data that noisy latents and a prediction at `time` say."""
        return x - _sigma(time, x) * prediction

    def time_at(self, share):
        """Return the time at a share, above 0, of the way to noise, with the shift `SHIFT`."""
        return NUM_TRAIN_TIMES * (SHIFT / (SHIFT + (1 / share - 1)))  # 1 gives exactly 1000

    def grid(self, count: int) -> Float[np.ndarray, "count"]:
        """Return the times at which `count` equal moves begin, 1000 first, with the shift `SHIFT`.

        The last move ends at the data, while the last of `timesteps` begins beside it. Few-step
        models are trained and sampled at these times.
        """
        return self.time_at(1 - np.arange(count) / count)

    clean_time = 0

    def levels(self, times: Float[np.ndarray, "K"]) -> tuple[np.ndarray, np.ndarray]:
        """Return the scales of data and of noise at `times`, float64."""
        sigma = times / NUM_TRAIN_TIMES
        return 1 - sigma, sigma

    def clean_of(self, signal, sigma):
        """Return the factors of x and of the prediction whose weighted sum is the clean data."""
        return np.ones_like(sigma), -sigma


def _sigma(time, x) -> Float[Array, "..."]:
    """Return sigma at `time`, shaped to broadcast with x."""
    return align(jnp.asarray(time, jnp.float32), x) / NUM_TRAIN_TIMES
