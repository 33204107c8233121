"""The loop that turns noise into latents: a compiled program for one network evaluation.

Python calls the program once per evaluation. The sampler's coefficients, the guidance of a step and
the thresholds are its arguments. So a change of step count, strength or guidance, or a sampler with
as many registers, does not recompile. The program calls nothing in Python, so JAX can keep it in
its compilation cache. Input and output are tokens; `pipelines` turns them into videos.

Letters beyond the legend: P is the width of a token, 4 x channels; R is the number of registers,
the tensors that a sampler keeps between evaluations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from easyanimate_jax.diffusion.conditioning import guide
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.samplers import SAMPLERS, advance, walk
from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES
from easyanimate_jax.facts import check_fields
from easyanimate_jax.generation import caches
from easyanimate_jax.generation.caches import History, Skips
from easyanimate_jax.generation.calibration import CALIBRATE, Calibration
from easyanimate_jax.generation.protocols import Denoiser
from easyanimate_jax.memory import check_fit
from easyanimate_jax.sharding import shard

Texts = tuple[Float[Array, "_ _ _"] | Float[np.ndarray, "_ _ _"], ...]
Tokens = Float[Array, "B N P"]

CACHES = ("teacache", "magcache", "taylorseer")  # the fields of `Sampling` that skip the blocks
_SAMPLER_NAMES = tuple(dict.fromkeys(name for names in SAMPLERS.values() for name in names))
FRESH = 2  # folded into a seed's key for the noise of stochastic samplers


@dataclass(frozen=True)
class Sampling:
    """The sampling options. The defaults are those of the reference (spec 10.1)."""

    steps: int = 50
    """Number of denoising steps."""

    guidance: float = 6.0
    """Scale of classifier-free guidance; 1 is none (spec 4.5)."""

    rescale: float = 0.0
    """Share of the guided prediction that is rescaled to the standard deviation of the conditional
    one; 0 is none (spec 4.5)."""

    sampler: str = ""
    """Name of the sampler; "" is the default of the noise process: DDIM for V5, Euler for V5.1."""

    eta: float = 0.0
    """Share of fresh noise in DDIM; 0 is none."""

    shift: float | None = None
    """Shift of the times of V5.1: the larger, the more steps at high noise. None is e, as released;
    V5 has none (spec 4.2)."""

    times: tuple[float, ...] = ()
    """Times of the evaluations, noise first, in place of `steps` and `shift`; after the last one
    the sampler goes to the data. () takes the times of the noise process."""

    guided: tuple[float, float] = (0.0, 1.0)
    """First and last share of the steps with guidance."""

    guidance_every: int = 1
    """Number of steps from one unconditional prediction to the next. The steps between them reuse
    the last difference between the conditional and the unconditional prediction."""

    teacache: float = 0.0
    """Threshold below which a step reuses the network's last residual (spec 10.2); 0 is never."""

    magcache: float = 0.0
    """Estimated error below which a step reuses the last residual, by the model's calibration
    (spec 10.2); 0 is never."""

    taylorseer: int = 0
    """Order of the polynomial that extrapolates the residual between the steps that run the blocks
    (spec 10.2); 0 runs them in every step."""

    cache_interval: int = 2
    """Number of steps from one that runs the blocks to the next: always with TaylorSeer, at most
    with MagCache."""

    def __post_init__(self):
        low, high = self.guided
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"Sampling.guided is {low} to {high}: give two shares of the steps, such as 0 and 1"
            )
        check_fields(
            self,
            steps=f"[1, {NUM_TRAIN_TIMES}]",
            guidance="[0, 100]",
            rescale="[0, 1]",
            eta="[0, 1]",
            shift="(0, 100]",
            times=f"(-1, {NUM_TRAIN_TIMES}]",
            guided="[0, 1]",
            guidance_every="[1, inf)",
            teacache="[0, inf)",
            magcache="[0, 1]",
            taylorseer="[0, 2]",
            cache_interval="[1, inf)",
        )
        if self.sampler not in ("", *_SAMPLER_NAMES):
            raise ValueError(
                f"Sampling.sampler is {self.sampler!r}; use one of {', '.join(_SAMPLER_NAMES)}"
            )
        chosen = [name for name in CACHES if getattr(self, name)]
        chosen += ["guidance_every"] * (self.guidance_every > 1)
        if len(chosen) > 1:
            values = " and ".join(f"{name} {getattr(self, name):g}" for name in chosen)
            raise ValueError(f"{values} cannot be combined: use one of them")


class Source(NamedTuple):
    """A video to start from. Each step restores its noised tokens where `keep` is 1."""

    tokens: Tokens
    keep: Tokens | None  # 1: keep, 0: generate


class Given(NamedTuple):
    """The inputs of the denoising loop, as tokens.

    Without `negative_texts` there is no guidance. `condition` holds the input channels beyond the
    latent channels. Stochastic samplers draw their noise from `seeds`.
    """

    noise: Tokens
    seeds: UInt32[Array, "B"]
    grid: Int[Array, "B 3"]
    lengths: Int[Array, "B"]
    texts: Texts
    negative_texts: Texts | None
    condition: Float[Array, "B N _"] | None = None
    source: Source | None = None

    @property
    def halves(self) -> int:
        """Return how many copies of each row the network evaluates: 2 with guidance, else 1."""
        return 1 if self.negative_texts is None else 2

    @property
    def real(self) -> Bool[Array, "B N 1"]:
        """Return True for tokens that are not padding."""
        return jnp.arange(self.noise.shape[1])[None, :, None] < self.lengths[:, None, None]


class Step(NamedTuple):
    """The numbers of one network evaluation."""

    number: np.int32  # 0 is the first evaluation
    time: np.float32
    move: np.ndarray  # (R, R + 1 or R + 2), the sampler's coefficients
    level: np.ndarray  # (2,), signal and sigma of x after the evaluation
    guidance: np.float32
    both: np.bool_  # True where the unconditional prediction is computed
    whole: np.bool_  # True where the blocks run whatever TeaCache decides
    weights: np.ndarray  # (M,), of the kept residuals where the blocks do not run


class Plan(NamedTuple):
    """All evaluations of a request."""

    start: np.ndarray  # (2,), signal and sigma of x before the first evaluation
    steps: list[Step]
    runs: np.ndarray  # (K,) bool, False where it is known that the blocks do not run

    @property
    def evaluations(self) -> int:
        """Return the number of steps that run the blocks; TeaCache may run fewer."""
        return int(self.runs.sum())


class Carry(NamedTuple):
    """The state between two evaluations."""

    registers: Float[Array, "R B N P"]  # the first register is x
    difference: Tokens  # the last conditional minus the unconditional prediction
    history: History | None  # of the residuals, where steps are skipped


def denoise(
    model: Denoiser,
    process: DDPM | Flow,
    given: Given,
    sampling: Sampling,
    *,
    strength: float = 1.0,
    calibration: Calibration | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tokens:
    """Return the latents that the noise of `given` becomes, as tokens.

    One network call evaluates both halves of the guidance, in the order [uncond, cond]. With a
    `strength` below 1 the loop starts at a later step, from the noised source. `calibration` is the
    model's, for MagCache. `progress` is called with the number of each finished evaluation; an
    exception that it raises ends the loop. A step that the plan skips is no evaluation. Raises
    ValueError for a strength below 1 without a source, for MagCache without a calibration, and,
    before the first step, if a device has too little memory.
    """
    plan = make_plan(process, sampling, strength, calibration)
    if strength < 1 and given.source is None:
        raise ValueError(f"strength is {strength} without a video to start from: use 1")
    done = np.cumsum(plan.runs)
    for number, carry in enumerate(states(model, plan, given, sampling)):
        if progress is not None and plan.runs[number]:
            jax.block_until_ready(carry)
            progress(int(done[number]))
    return _latents(carry)


def states(model: Denoiser, plan: Plan, given: Given, sampling: Sampling) -> Iterator[Carry]:
    """Yield the state after each step of a plan; the next step invalidates its arrays."""
    guided = given.negative_texts is not None
    kept = len(plan.steps[0].weights)
    thrifty = guided and not kept and not all(step.both for step in plan.steps)
    threshold = np.float32(sampling.teacache) if sampling.teacache else None
    options = {"rescale": sampling.rescale, "thrifty": thrifty}
    sizes = {"registers": len(plan.steps[0].move), "kept": kept}
    given, carry = _start(model, plan.start, given, threshold, **sizes)
    rows, tokens, _ = given.noise.shape
    what = f"denoising {rows} x {tokens:,} tokens"
    check_fit(what, _evaluate, carry, plan.steps[0], model, given, threshold, **options)
    for step in plan.steps:
        carry = _evaluate(carry, step, model, given, threshold, **options)
        yield carry


def make_plan(
    process: DDPM | Flow,
    sampling: Sampling,
    strength: float = 1.0,
    calibration: Calibration | None = None,
) -> Plan:
    """Return the coefficients of the sampler, and guidance and skips of each step.

    `calibration` is the model's, for MagCache. Raises ValueError if that is missing.
    """
    times, moves, levels = walk(
        process,
        sampling.sampler,
        sampling.steps,
        strength,
        sampling.eta,
        sampling.shift,
        sampling.times,
    )
    count = len(times)
    share = np.arange(count) / count
    guided = (sampling.guided[0] <= share) & (share < sampling.guided[1])
    number = np.cumsum(guided) - 1  # index among the guided steps
    skips = _skips(sampling, times, calibration)
    rows = zip(
        np.arange(count, dtype=np.int32),
        times,
        moves,
        levels[1:],
        np.where(guided, np.float32(sampling.guidance), np.float32(1)),
        guided & (number % sampling.guidance_every == 0),
        *skips,
        strict=True,
    )
    start = levels[0] if strength < 1 else np.float32([0, 1])
    runs = np.ones(count, bool) if sampling.teacache else skips.whole
    return Plan(start, [Step(*row) for row in rows], runs)


def _skips(sampling: Sampling, times, calibration: Calibration | None) -> Skips:
    """Return the steps that skip the blocks. Raises ValueError for what the method does not do."""
    count, interval = len(times), sampling.cache_interval
    if sampling.teacache:
        return caches.teacache(count)
    if not sampling.magcache and not sampling.taylorseer:
        return caches.no_skips(count)
    if not (np.diff(times) < 0).all():
        raise ValueError(
            f"{sampling.sampler} evaluates some times twice, and magcache and taylorseer need "
            f"falling times: use another sampler, or teacache"
        )
    if sampling.taylorseer:
        return caches.taylorseer(count, sampling.taylorseer, interval)
    if calibration is None:
        raise ValueError(
            f"magcache is {sampling.magcache:g}, and the model has no calibration: {CALIBRATE}, or "
            f"use teacache or taylorseer"
        )
    ratios = calibration.ratios_at(times, guided=sampling.guidance > 1)
    return caches.magcache(ratios, sampling.magcache, interval)


@partial(jax.jit, static_argnames=("registers", "kept"))
def _start(model, start, given: Given, threshold, *, registers: int, kept: int):
    """Return the inputs on the devices, and the state before the first evaluation.

    `kept` is the number of residuals that the history holds; 0 is no history.
    """
    given = jax.tree.map(_spread, given)
    x = given.noise
    if given.source is not None:
        x = start[0] * given.source.tokens + start[1] * x
    filled = jnp.zeros((registers, *x.shape)).at[0].set(x)
    history = None
    if kept:
        shape = given.halves * x.shape[0], x.shape[1], model.config.width
        history = caches.empty_history(shape, model.config.dtype, kept, threshold is not None)
    return given, _placed(Carry(filled, jnp.zeros_like(x), history))


@partial(jax.jit, static_argnames=("rescale", "thrifty"), donate_argnames="carry")
def _evaluate(
    carry: Carry, step: Step, model, given: Given, threshold, *, rescale, thrifty
) -> Carry:
    """Return the state after one evaluation of the network."""
    registers, difference, history = carry
    predict = Predictor(model, step, given, threshold, rescale, thrifty)
    prediction, difference, history = predict(registers[0], difference, history)
    num_registers, columns = step.move.shape
    inputs = [_fresh(given, step.number)] if columns == num_registers + 2 else []
    registers = advance(step.move, registers, prediction, *inputs)
    source = given.source
    if source is not None and source.keep is not None:
        signal, sigma = step.level
        known = signal * source.tokens + sigma * given.noise
        x = source.keep * known + (1 - source.keep) * registers[0]
        registers = registers.at[0].set(x)
    return _placed(Carry(registers, difference, history))


@jax.jit
def _latents(carry: Carry) -> Tokens:
    return shard(carry.registers[0], None, None, None)  # replicated: any host can decode


def _placed(carry: Carry) -> Carry:
    """Constrain the sharding, which must be the same before and after an evaluation."""

    def place(x):  # (..., B, N, width), or the number that TeaCache sums
        return shard(x, *[None] * (x.ndim - 3), "batch", "tokens", None) if x.ndim else x

    return jax.tree.map(place, carry)


def _spread(x: Array) -> Array:
    """Constrain the sharding of an input: its rows are split."""
    return shard(x, "batch", *[None] * (x.ndim - 1))


def _fresh(given: Given, number) -> Tokens:
    """Return the noise of evaluation `number`, each row's from its own seed."""

    def draw(seed):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), FRESH), number)
        return jax.random.normal(key, given.noise.shape[1:])

    return jax.vmap(draw)(given.seeds)


class Predictor:
    """The guided network at one step.

    It can reuse the last difference between the conditional and the unconditional prediction, and
    estimate the residual from those of earlier steps.
    """

    def __init__(self, model, step: Step, given: Given, threshold, rescale, thrifty: bool):
        self.model, self.step, self.given = model, step, given
        self.threshold, self.rescale, self.thrifty = threshold, rescale, thrifty
        self.texts = given.texts
        if given.halves == 2:
            both = given.negative_texts, given.texts
            self.texts = jax.tree.map(lambda *x: jnp.concatenate(x), *both)

    def __call__(self, x: Tokens, difference: Tokens, history: History | None):
        """Return (guided prediction, difference, history)."""
        arguments = (x, difference, history)
        if self.thrifty:
            both = self.step.both
            cond, difference, history = jax.lax.cond(both, self._full, self._half, *arguments)
        else:
            cond, difference, history = self._full(*arguments)
        if self.given.halves == 2:
            where = jnp.broadcast_to(self.given.real, cond.shape)
            scale = self.step.guidance
            cond = guide(cond - difference, cond, scale, self.rescale, where=where)
        return cond, difference, history

    def _full(self, x, difference, history):
        """Return (conditional prediction, its difference from the unconditional one, history)."""
        both, history = self._network(x, history)
        if self.given.halves == 1:
            return both, difference, history
        uncond, cond = jnp.split(both, 2)
        return cond, cond - uncond, history

    def _half(self, x, difference, history):
        inputs = self._inputs(x, self.given.texts, 1)
        return self.model(*inputs).astype(jnp.float32), difference, history

    def _network(self, x, history):
        """Return the predictions of all halves, [uncond, cond], and the history."""
        halves = self.given.halves
        inputs = self._inputs(x, self.texts, halves)
        if history is None:
            return self.model(*inputs).astype(jnp.float32), None
        real = jnp.concatenate([self.given.real] * halves)
        step = self.step
        features, history = caches.features(
            self.model, history, step.whole, step.weights, self.threshold, real, inputs
        )
        return self.model.output.linear(features).astype(jnp.float32), history

    def _inputs(self, x, texts, copies):
        """Return the network's arguments for `copies` copies of each row."""
        given = self.given
        if given.condition is not None:
            x = jnp.concatenate([x, given.condition], axis=-1)
        time = jnp.full(copies * len(given.lengths), self.step.time)
        x, grid, lengths = (jnp.concatenate([a] * copies) for a in (x, given.grid, given.lengths))
        return x, grid, lengths, time, texts
