"""The loop that turns noise into latents: a compiled program for one network evaluation.

Python calls the program once per evaluation. The sampler's coefficients, the guidance of a step and
the thresholds are its arguments. So a change of step count, strength or guidance, or a sampler with
as many registers, does not recompile. The program calls nothing in Python, so JAX can keep it in
its compilation cache. Input and output are tokens; `pipelines` turns them into videos.

Letters beyond the legend: P is the width of a token, 4 x channels; R is the number of registers,
the tensors that a sampler keeps between evaluations.
"""

from collections.abc import Callable
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
from easyanimate_jax.generation.protocols import Denoiser
from easyanimate_jax.memory import check_fit
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.sharding import shard

Texts = tuple[Float[Array, "_ _ _"] | Float[np.ndarray, "_ _ _"], ...]
Tokens = Float[Array, "B N P"]

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
        )
        if self.sampler not in ("", *_SAMPLER_NAMES):
            raise ValueError(
                f"Sampling.sampler is {self.sampler!r}; use one of {', '.join(_SAMPLER_NAMES)}"
            )
        if self.guidance_every > 1 and self.teacache:
            raise ValueError("teacache and guidance_every cannot be combined: use one of them")


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
    whole: np.bool_  # True at the first and the last evaluation, which TeaCache never skips


class Plan(NamedTuple):
    """All evaluations of a request."""

    start: np.ndarray  # (2,), signal and sigma of x before the first evaluation
    steps: list[Step]


class Teacache(NamedTuple):
    """The state that lets TeaCache skip the blocks in a step (spec 10.2)."""

    modulated: Float[Array, "B N D"]  # input of the first block's attention
    residual: Float[Array, "B N D"]  # last layer's input minus the embedded tokens
    distance: Float[Array, ""]  # change summed since the blocks last ran


class Carry(NamedTuple):
    """The state between two evaluations."""

    registers: Float[Array, "R B N P"]  # the first register is x
    difference: Tokens  # the last conditional minus the unconditional prediction
    cache: Teacache | None


# Degree-4 polynomials, highest power first. They estimate the change of the output from the change
# of the first block's input, and were published with the V5.1 models.
POLYNOMIALS = {  # key: number of blocks, 48 in the 12B and 36 in the 7B
    48: (-10.47857366, 8.33844143, -0.78477557, 0.68798618, 0.0136149),
    36: (1.07862322, -4.19362456, 3.06725828, 0.33161686, 0.02374758),
}
V51_TEXT_WIDTHS = (3584,)


def polynomial(config: MMDiTConfig) -> tuple[float, ...]:
    """Return the coefficients of a V5.1 model's polynomial, and of f(x) = x for other models."""
    of_v51 = POLYNOMIALS if config.text_widths == V51_TEXT_WIDTHS else {}
    return of_v51.get(config.depth, (0.0, 0.0, 0.0, 1.0, 0.0))


def denoise(
    model: Denoiser,
    process: DDPM | Flow,
    given: Given,
    sampling: Sampling,
    *,
    strength: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> Tokens:
    """Return the latents that the noise of `given` becomes, as tokens.

    One network call evaluates both halves of the guidance, in the order [uncond, cond]. With a
    `strength` below 1 the loop starts at a later step, from the noised source. `progress` is called
    with the number of each finished evaluation; an exception that it raises ends the loop. Raises
    ValueError for a strength below 1 without a source, and, before the first step, if a device has
    too little memory.
    """
    plan = make_plan(process, sampling, strength)
    if strength < 1 and given.source is None:
        raise ValueError(f"strength is {strength} without a video to start from: use 1")
    guided = given.negative_texts is not None
    thrifty = guided and not sampling.teacache and not all(step.both for step in plan.steps)
    threshold = np.float32(sampling.teacache) if sampling.teacache else None
    options = {"rescale": sampling.rescale, "thrifty": thrifty}
    registers = len(plan.steps[0].move)
    given, carry = _start(model, plan.start, given, threshold, registers=registers)
    rows, tokens, _ = given.noise.shape
    what = f"denoising {rows} x {tokens:,} tokens"
    check_fit(what, _evaluate, carry, plan.steps[0], model, given, threshold, **options)
    for step in plan.steps:
        carry = _evaluate(carry, step, model, given, threshold, **options)
        if progress is not None:
            jax.block_until_ready(carry)
            progress(int(step.number) + 1)
    return _latents(carry)


def make_plan(process: DDPM | Flow, sampling: Sampling, strength: float = 1.0) -> Plan:
    """Return the coefficients of the sampler of `sampling`, and the guidance of each step."""
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
    place = np.arange(count, dtype=np.int32)
    rows = zip(
        place,
        times,
        moves,
        levels[1:],
        np.where(guided, np.float32(sampling.guidance), np.float32(1)),
        guided & (number % sampling.guidance_every == 0),
        (place == 0) | (place == count - 1),
        strict=True,
    )
    start = levels[0] if strength < 1 else np.float32([0, 1])
    return Plan(start, [Step(*row) for row in rows])


@partial(jax.jit, static_argnames="registers")
def _start(model, start, given: Given, threshold, *, registers: int) -> tuple[Given, Carry]:
    """Return the inputs on the devices, and the state before the first evaluation."""
    given = jax.tree.map(_spread, given)
    x = given.noise
    if given.source is not None:
        x = start[0] * given.source.tokens + start[1] * x
    filled = jnp.zeros((registers, *x.shape)).at[0].set(x)
    cache = None if threshold is None else _empty_cache(model.config, given)
    return given, _placed(Carry(filled, jnp.zeros_like(x), cache))


@partial(jax.jit, static_argnames=("rescale", "thrifty"), donate_argnames="carry")
def _evaluate(
    carry: Carry, step: Step, model, given: Given, threshold, *, rescale, thrifty
) -> Carry:
    """Return the state after one evaluation of the network."""
    registers, difference, cache = carry
    predict = Predictor(model, step, given, threshold, rescale, thrifty)
    prediction, difference, cache = predict(registers[0], difference, cache)
    num_registers, columns = step.move.shape
    inputs = [_fresh(given, step.number)] if columns == num_registers + 2 else []
    registers = advance(step.move, registers, prediction, *inputs)
    source = given.source
    if source is not None and source.keep is not None:
        signal, sigma = step.level
        known = signal * source.tokens + sigma * given.noise
        x = source.keep * known + (1 - source.keep) * registers[0]
        registers = registers.at[0].set(x)
    return _placed(Carry(registers, difference, cache))


@jax.jit
def _latents(carry: Carry) -> Tokens:
    return shard(carry.registers[0], None, None, None)  # replicated: any host can decode


def _placed(carry: Carry) -> Carry:
    """Constrain the sharding, which must be the same before and after an evaluation."""
    registers, *rest = jax.tree.leaves(carry)
    registers = shard(registers, None, "batch", "tokens", None)
    placed = [registers, *(shard(x, "batch", "tokens", None) if x.ndim else x for x in rest)]
    return jax.tree.unflatten(jax.tree.structure(carry), placed)


def _spread(x: Array) -> Array:
    """Constrain the sharding of an input: its rows are split."""
    return shard(x, "batch", *[None] * (x.ndim - 1))


def _fresh(given: Given, number) -> Tokens:
    """Return the noise of evaluation `number`, each row's from its own seed."""

    def draw(seed):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), FRESH), number)
        return jax.random.normal(key, given.noise.shape[1:])

    return jax.vmap(draw)(given.seeds)


def _empty_cache(config: MMDiTConfig, given: Given) -> Teacache:
    """Return a TeaCache state of zeros."""
    rows, length, _ = given.noise.shape
    zeros = jnp.zeros((given.halves * rows, length, config.width), config.dtype)
    return Teacache(zeros, zeros, jnp.float32(0))


class Predictor:
    """The guided network at one step.

    It can reuse the last difference between the conditional and the unconditional prediction, and
    TeaCache's residual.
    """

    def __init__(self, model, step: Step, given: Given, threshold, rescale, thrifty: bool):
        self.model, self.step, self.given = model, step, given
        self.threshold, self.rescale, self.thrifty = threshold, rescale, thrifty
        self.texts = given.texts
        if given.halves == 2:
            both = given.negative_texts, given.texts
            self.texts = jax.tree.map(lambda *x: jnp.concatenate(x), *both)

    def __call__(self, x: Tokens, difference: Tokens, cache: Teacache | None):
        """Return (guided prediction, difference, cache)."""
        arguments = (x, difference, cache)
        if self.thrifty:
            both = self.step.both
            cond, difference, cache = jax.lax.cond(both, self._full, self._half, *arguments)
        else:
            cond, difference, cache = self._full(*arguments)
        if self.given.halves == 2:
            where = jnp.broadcast_to(self.given.real, cond.shape)
            scale = self.step.guidance
            cond = guide(cond - difference, cond, scale, self.rescale, where=where)
        return cond, difference, cache

    def _full(self, x, difference, cache):
        """Return (conditional prediction, its difference from the unconditional one, cache)."""
        both, cache = self._network(x, cache)
        if self.given.halves == 1:
            return both, difference, cache
        uncond, cond = jnp.split(both, 2)
        return cond, cond - uncond, cache

    def _half(self, x, difference, cache):
        inputs = self._inputs(x, self.given.texts, 1)
        return self.model(*inputs).astype(jnp.float32), difference, cache

    def _network(self, x, cache):
        """Return the predictions of all halves, [uncond, cond], and the cache."""
        halves = self.given.halves
        inputs = self._inputs(x, self.texts, halves)
        if self.threshold is None:
            return self.model(*inputs).astype(jnp.float32), cache
        real = jnp.concatenate([self.given.real] * halves)
        features, cache = _features(
            self.model, cache, self.step.whole, self.threshold, real, *inputs
        )
        return self.model.output.linear(features).astype(jnp.float32), cache

    def _inputs(self, x, texts, copies):
        """Return the network's arguments for `copies` copies of each row."""
        given = self.given
        if given.condition is not None:
            x = jnp.concatenate([x, given.condition], axis=-1)
        time = jnp.full(copies * len(given.lengths), self.step.time)
        x, grid, lengths = (jnp.concatenate([a] * copies) for a in (x, given.grid, given.lengths))
        return x, grid, lengths, time, texts


def _features(
    model,
    cache: Teacache,
    must: Bool[Array, ""],
    threshold: Float[Array, ""],
    real: Bool[Array, "B N 1"],
    inputs: Tokens,
    grid: Int[Array, "B 3"],
    lengths: Int[Array, "B"],
    time: Float[Array, "B"],
    texts: Texts,
) -> tuple[Float[Array, "B N D"], Teacache]:
    """Return the input of the last layer: computed by the blocks, or estimated by TeaCache.

    The change is one number for the whole batch, as in the reference. So with TeaCache a video
    depends a little on the other videos of its batch.
    """
    video, text, time = model.embed(inputs, time, texts)
    norm = jax.tree.map(lambda x: x[0], model.blocks[0].norm1)
    modulated = norm(video, text, time)[0]
    size = lambda x: jnp.sum(jnp.abs(x.astype(jnp.float32)), where=real)  # noqa: E731
    change = size(modulated - cache.modulated) / jnp.maximum(size(cache.modulated), 1e-12)
    distance = cache.distance + jnp.polyval(jnp.array(polynomial(model.config)), change)
    run = must | (distance >= threshold)

    def blocks():
        features = model.features(video, text, time, grid, lengths)
        return features, features - video

    def reuse():
        return video + cache.residual, cache.residual

    features, residual = jax.lax.cond(run, blocks, reuse)
    return features, Teacache(modulated, residual, jnp.where(run, 0.0, distance))
