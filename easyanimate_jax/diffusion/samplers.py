"""All samplers as tables of numbers, in one variance-preserving coordinate system (spec 4).

All samplers are linear. Their state is a few registers, and the first register is x. After each
evaluation of the network, a matrix times [registers, prediction, noise] gives the new registers.
The matrices depend only on the schedule, so one compiled program runs every sampler, number of
steps and strength. The literature writes Euler's samplers in x / signal. Here they use
x = signal * data + sigma * noise, the input of the network.
Letters beyond the legend: K evaluations, R registers.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float

from easyanimate_jax.diffusion.ddpm import DDPM, SIGNAL_POWER_OF_BETAS
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES, first_step

LEAST_SIGNAL = 2.0**-12  # replaces a signal of 0 for Euler and DPM++, which divide by the signal


class Walk(NamedTuple):
    """The tables that take a sampler from noise to data, all float32."""

    times: np.ndarray  # (K,) the time input of the network at each evaluation
    moves: np.ndarray  # (K, R, R + 1), or (K, R, R + 2) for samplers that add fresh noise
    levels: np.ndarray  # (K + 1, 2) signal and sigma of x at the start and after each evaluation


def advance(
    move: Float[Array, "R columns"],
    registers: Float[Array, "R ..."],
    *inputs: Float[Array, "..."],
) -> Float[Array, "R ..."]:
    """Return the registers after an evaluation; `inputs` are the prediction and any fresh noise."""
    rows = jnp.concatenate([registers, jnp.stack(inputs)])
    return jnp.einsum("rc,c...->r...", move, rows, precision=Precision.HIGHEST)


def walk(
    process: DDPM | Flow,
    sampler: str = "",
    steps: int = 50,
    strength: float = 1.0,
    eta: float = 0.0,
    shift: float | None = None,
    times: Sequence[float] = (),
) -> Walk:
    """Return the walk of a sampler of `process`; "" is the first sampler of the process.

    A `strength` below 1 runs only the last steps. `eta` is DDIM's share of fresh noise, 0 to 1.
    `shift` replaces the shift of a flow's times. `times` are explicit times, noise first, in place
    of `steps` and `shift`; after the last of them the sampler goes to the data. Raises ValueError
    for a sampler that the process does not have, and for numbers out of range.
    """
    samplers = SAMPLERS[type(process)]
    sampler = sampler or next(iter(samplers))
    if sampler not in samplers:
        raise ValueError(
            f"{type(process).__name__} has no sampler {sampler!r}; use one of {', '.join(samplers)}"
        )
    if not 0 <= eta <= 1 or (eta and sampler != "ddim"):
        raise ValueError(
            f"eta is {eta} with {sampler!r}: it is DDIM's share of fresh noise; use 0 to 1 with "
            f"'ddim', and 0 with other samplers"
        )
    if times:
        _check_times(process, sampler, times)
        steps = len(times)
    grid = np.asarray(times, np.float64) if times else process.timesteps(steps, shift)
    explicit, times = bool(times), grid[first_step(steps, strength) :]
    stride = NUM_TRAIN_TIMES // steps
    if sampler == "ddim" and not explicit:
        return _one_step(process, times, times - stride, eta)
    if sampler == "pndm":
        return _pndm(times, stride)
    next_times = np.append(times[1:], process.clean_time)
    if sampler == "dpm++":
        return _dpm(process, times, next_times)
    if sampler == "adams":
        return _adams(process, times, next_times)
    if sampler == "ddim":
        return _one_step(process, times, next_times, eta)
    return _one_step(process, times, next_times, float(sampler == "euler_a"), LEAST_SIGNAL)


def one_step_moves(process: DDPM | Flow, times: Float[np.ndarray, "K"]) -> Float[np.ndarray, "K 2"]:
    """Return the factors of x and of the prediction that take x from each time to the next.

    The last move ends at the data. This is Euler's method for a flow and DDIM for a DDPM.
    """
    return _one_step(process, times, np.append(times[1:], process.clean_time), 0.0).moves[:, 0]


def _check_times(process, sampler: str, times: Sequence[float]) -> None:
    """Raise ValueError for explicit times that no walk of `sampler` can have."""
    first = process.timesteps(1)[0]
    falling = all(before > after for before, after in pairwise(times))
    if not falling or times[0] > first or times[-1] <= process.clean_time:
        raise ValueError(
            f"times are {', '.join(f'{time:g}' for time in times)}: use falling times from at most "
            f"{first:g} (noise) to above {process.clean_time:g} (data)"
        )
    if isinstance(process, DDPM) and any(time != int(time) for time in times):
        raise ValueError("times of a DDPM are whole numbers, such as 999 749 499 249")
    if sampler == "pndm":
        raise ValueError("PNDM has times of its own: leave out times, or use 'ddim'")


SAMPLERS = {
    DDPM: ("ddim", "euler", "euler_a", "dpm++", "pndm"),
    Flow: ("euler", "adams"),
}


def _levels(process, times, least=0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return signal and sigma at `times`; the signal of a DDPM is at least `least`."""
    signal, sigma = process.levels(times)
    if isinstance(process, DDPM):
        signal = np.maximum(signal, least)
        sigma = np.sqrt(1 - signal**2)
    return signal, sigma


def _one_step(process, times, next_times, eta, least=0.0) -> Walk:
    """Return DDIM's walk; eta 0 gives Euler's method, eta 1 the ancestral one (spec 4.1)."""
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
    """Return the walk of DPM-Solver++ 2M, which also uses the previous step's clean estimate."""
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
    """Return the walk of Adams-Bashforth of order 2 in sigma; flow's velocity changes slowly.

    On mixtures of Gaussians with the released grid and 12 to 50 steps, its error is 2 to 10 times
    smaller than that of Euler's method. DPM-Solver++, which steps in log SNR, is worse than Euler.
    """
    (signal, sigma), (after, sigma_after) = (_levels(process, t) for t in (times, next_times))
    step = sigma_after - sigma
    weight = np.append(0, step[1:] / step[:-1] / 2)
    one, none = np.ones_like(step), np.zeros_like(step)
    rows = [[one, -step * weight, step * (1 + weight)], [none, none, one]]
    return _walk(times, np.moveaxis(np.array(rows), 2, 0), (signal, sigma), (after, sigma_after))


def _pndm(times, stride) -> Walk:
    """Return the walk of PNDM: three Runge-Kutta steps of four evaluations, then multistep.

    As in the reference, it uses the betas before their rescaling to zero SNR. At its first time it
    therefore assumes a little signal although x is pure noise (spec 12, row 14).
    """
    if len(times) < 4:
        raise ValueError(f"PNDM of {len(times)} steps: it needs at least 4; use more steps")
    power = lambda t: SIGNAL_POWER_OF_BETAS[int(max(t, 0))]  # noqa: E731
    x, anchor, total, *past, v = np.eye(7)  # registers as rows: h1 is the newest of the past
    evaluated, moves, reached = [], [], []

    def to(time, next_time, sample, prediction):
        """Return the PNDM paper's transfer from `time` to `next_time`, as a row of a matrix."""
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
