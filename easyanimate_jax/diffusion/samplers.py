"""Every sampler as a table of numbers, in one variance-preserving coordinate system (spec 4).

All of them are linear: what they carry are a few registers, the first of which is x, and each
evaluation of the network replaces the registers by a matrix times [registers, prediction, noise].
The matrices depend on the schedule only. So one program runs them all, and another sampler, step
count or strength is other data. Euler's samplers, which the literature writes in x / signal, are
here in x = signal * data + sigma * noise, as the network sees it.

Letters beyond the legend: K evaluations, R registers.
"""

from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float

from easyanimate_jax.diffusion.ddpm import DDPM, SIGNAL_POWER_OF_BETAS
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES, first_step

LEAST_SIGNAL = 2.0**-12  # what Euler and DPM++ see of the data where there is none


class Walk(NamedTuple):
    """A sampler's way from noise to data. Moves of R + 2 columns use fresh noise."""

    times: np.ndarray  # (K,) what the network is told at each evaluation
    moves: np.ndarray  # (K, R, R + 1 or R + 2)
    levels: np.ndarray  # (K + 1, 2) signal and sigma of x at first and after each evaluation


def advance(
    move: Float[Array, "R columns"],
    registers: Float[Array, "R ..."],
    *inputs: Float[Array, "..."],
) -> Float[Array, "R ..."]:
    """The registers after an evaluation; `inputs` are the prediction and, if used, fresh noise."""
    rows = jnp.concatenate([registers, jnp.stack(inputs)])
    return jnp.einsum("rc,c...->r...", move, rows, precision=Precision.HIGHEST)


def walk(
    process: DDPM | Flow,
    sampler: str = "",
    steps: int = 50,
    strength: float = 1.0,
    eta: float = 0.0,
) -> Walk:
    """The walk of a sampler of `process`, its first one unless named.

    A `strength` below 1 keeps the last steps. `eta` is DDIM's share of fresh noise, 0 to 1.
    Raises ValueError for what the process or the sampler does not offer.
    """
    samplers = SAMPLERS[type(process)]
    sampler = sampler or next(iter(samplers))
    if sampler not in samplers:
        raise ValueError(
            f"{type(process).__name__} has no sampler {sampler!r}: choose of {', '.join(samplers)}"
        )
    if not 0 <= eta <= 1 or (eta and sampler != "ddim"):
        raise ValueError(f"eta {eta} with {sampler!r}: it is DDIM's share of fresh noise, 0 to 1")
    times = process.timesteps(steps)[first_step(steps, strength) :]
    stride = NUM_TRAIN_TIMES // steps
    if sampler == "ddim":
        return _one_step(process, times, times - stride, eta)
    if sampler == "pndm":
        return _pndm(times, stride)
    next_times = np.append(times[1:], process.clean_time)
    if sampler == "dpm++":
        return _dpm(process, times, next_times)
    if sampler == "adams":
        return _adams(process, times, next_times)
    return _one_step(process, times, next_times, float(sampler == "euler_a"), LEAST_SIGNAL)


SAMPLERS = {
    DDPM: ("ddim", "euler", "euler_a", "dpm++", "pndm"),
    Flow: ("euler", "adams"),
}


def _levels(process, times, least=0.0) -> tuple[np.ndarray, np.ndarray]:
    """Signal and sigma at `times`; where a DDPM has less signal than `least`, that much."""
    signal, sigma = process.levels(times)
    if isinstance(process, DDPM):
        signal = np.maximum(signal, least)
        sigma = np.sqrt(1 - signal**2)
    return signal, sigma


def _one_step(process, times, next_times, eta, least=0.0) -> Walk:
    """DDIM; with eta 0 it is Euler's method, with eta 1 the ancestral one (spec 4.1)."""
    (signal, sigma), (after, sigma_after) = (
        _levels(process, t, least) for t in (times, next_times)
    )
    power, power_after = signal**2, after**2
    fresh = np.zeros_like(sigma)
    if eta:
        share = (1 - power_after) / (1 - power) * (1 - power / power_after)
        fresh = eta * np.sqrt(share)
    kept = np.sqrt(sigma_after**2 - fresh**2)
    x_to_clean, v_to_clean = process.clean_of(signal, sigma)
    by_clean = after - kept * signal / sigma  # x' = after * clean + kept * (x - s clean) / sigma
    moves = [kept / sigma + by_clean * x_to_clean, by_clean * v_to_clean]
    moves = np.stack(moves + [fresh] * bool(eta), axis=1)[:, None]
    return _walk(times, moves, (signal, sigma), (after, sigma_after))


def _dpm(process, times, next_times) -> Walk:
    """DPM-Solver++ 2M: second order by the clean video that the step before spoke of."""
    (signal, sigma), (after, sigma_after) = (
        _levels(process, t, LEAST_SIGNAL) for t in (times, next_times)
    )
    logsnr = np.log(signal / sigma)
    weight = np.zeros_like(logsnr)  # the first and the last step are of first order
    weight[1:-1] = np.diff(logsnr)[1:] / np.diff(logsnr)[:-1] / 2
    x_to_clean, v_to_clean = process.clean_of(signal, sigma)
    by_clean = after - sigma_after * signal / sigma
    now = by_clean * (1 + weight)
    rows = [
        [sigma_after / sigma + now * x_to_clean, -by_clean * weight, now * v_to_clean],
        [x_to_clean, np.zeros_like(now), v_to_clean],
    ]
    moves = np.moveaxis(np.array(rows), 2, 0)
    return _walk(times, moves, (signal, sigma), (after, sigma_after))


def _adams(process, times, next_times) -> Walk:
    """Adams-Bashforth of order two in sigma, for flow, whose velocity hardly turns on its way.

    On mixtures of Gaussians with the released grid it ends two to ten times nearer than Euler's
    method in 12 to 50 steps. DPM-Solver++, which steps in log SNR, ends farther there than Euler.
    """
    (signal, sigma), (after, sigma_after) = (_levels(process, t) for t in (times, next_times))
    step = sigma_after - sigma
    weight = np.append(0, step[1:] / step[:-1] / 2)
    one, none = np.ones_like(step), np.zeros_like(step)
    rows = [[one, -step * weight, step * (1 + weight)], [none, none, one]]
    return _walk(times, np.moveaxis(np.array(rows), 2, 0), (signal, sigma), (after, sigma_after))


def _pndm(times, stride) -> Walk:
    """PNDM: three Runge-Kutta steps of four evaluations, then four-step multistep.

    As in the reference it walks the betas before their rescaling to zero SNR, so at its first time
    it takes a little signal for given that is not there (spec 12, row 14).
    """
    if len(times) < 4:
        raise ValueError(f"PNDM of {len(times)} steps: its start alone takes 4; use more steps")
    power = lambda t: SIGNAL_POWER_OF_BETAS[int(max(t, 0))]  # noqa: E731
    x, anchor, total, *past, v = np.eye(7)  # registers as rows: h1 is the newest of the past
    evaluated, moves, reached = [], [], []

    def to(time, next_time, sample, prediction):
        """The transfer of the PNDM paper from `time` to `next_time`, as a row."""
        a, b = power(time), power(next_time)
        noise = np.sqrt(a) * prediction + np.sqrt(1 - a) * sample
        denominator = a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b)
        return np.sqrt(b / a) * sample - (b - a) / denominator * noise

    def add(time, next_time, rows):
        evaluated.append(time)
        reached.append(next_time)
        moves.append(np.stack(rows))

    for time, next_time in pairwise(times[:4]):
        middle, pushed = next_time + stride // 2, [v, past[0], past[1]]
        first = time - stride // 2
        add(time, first, [to(time, first, x, v), x, v / 6, *pushed])
        for stop, at in ((middle, middle), (next_time, middle)):
            add(at, stop, [to(time, stop, anchor, v), anchor, total + v / 3, *past])
        add(
            next_time,
            next_time,
            [to(time, next_time, anchor, total + v / 6), anchor, 0 * x, *past],
        )
    for time in times[3:]:
        mean = (55 * v - 59 * past[0] + 37 * past[1] - 9 * past[2]) / 24
        next_time = time - stride
        add(time, next_time, [to(time, next_time, x, mean), anchor, total, v, *past[:2]])
    clean = np.array([power(t) if t >= 0 else 1.0 for t in (times[0], *reached)])
    levels = np.sqrt(clean), np.sqrt(1 - clean)
    return Walk(np.float32(evaluated), np.float32(moves), np.float32(np.stack(levels, axis=1)))


def _walk(times, moves, before, after) -> Walk:
    first, rest = np.stack(before, axis=1)[:1], np.stack(after, axis=1)
    return Walk(*(np.float32(x) for x in (times, moves, np.concatenate([first, rest]))))
