"""Skip the blocks of the network in some steps, and estimate the residual that they would add.

The residual is the input of the last layer minus the embedded tokens. TeaCache (arXiv 2411.19108,
spec 10.2) and MagCache (arXiv 2506.09045) reuse the last one. TaylorSeer (arXiv 2503.06923)
extrapolates the last ones. All share one state and one decision. TeaCache decides in the program,
by the change of the first block's input. The others decide on the host before the first step, so a
plan knows which steps run the blocks.

Letters beyond the legend: K evaluations, M kept residuals.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from easyanimate_jax.models.mmdit import MMDiTConfig

RETAINED = 0.2  # first share of the steps that MagCache never skips; published value

# Degree-4 polynomials, highest power first. They estimate the change of the output from the change
# of the first block's input, and were published with the V5.1 models.
POLYNOMIALS = {  # key: number of blocks, 48 in the 12B and 36 in the 7B
    48: (-10.47857366, 8.33844143, -0.78477557, 0.68798618, 0.0136149),
    36: (1.07862322, -4.19362456, 3.06725828, 0.33161686, 0.02374758),
}
V51_TEXT_WIDTHS = (3584,)


class Skips(NamedTuple):
    """The steps that run the blocks, and the estimate in the others."""

    whole: Bool[np.ndarray, "K"]  # True where the blocks run; TeaCache may run them elsewhere too
    weights: Float[np.ndarray, "K M"]  # of the kept residuals, newest first, where they do not run


class History(NamedTuple):
    """The state that lets a step skip the blocks."""

    residuals: Float[Array, "M B N D"]  # of the last steps that ran the blocks, newest first
    modulated: Float[Array, "B N D"] | None  # TeaCache: input of the first block's attention
    distance: Float[Array, ""] | None  # TeaCache: change summed since the blocks last ran


def no_skips(count: int) -> Skips:
    """Return `count` steps that all run the blocks and keep nothing."""
    return Skips(np.ones(count, bool), np.zeros((count, 0), np.float32))


def teacache(count: int) -> Skips:
    """Return the first and the last of `count` steps as whole; the program decides the others."""
    place = np.arange(count)
    return Skips((place == 0) | (place == count - 1), np.ones((count, 1), np.float32))


def magcache(ratios: Float[np.ndarray, "halves K"], threshold: float, interval: int) -> Skips:
    """Return MagCache's steps from the magnitude ratios of a model.

    `ratios[:, k]` is the mean ratio of the residual's magnitude at step k to that at step k - 1,
    for each half of the guidance; column 0 is not read. The error of a skipped step is estimated as
    |1 - product of the ratios since the blocks last ran|. A step is skipped while the sum of these
    errors is below `threshold` in both halves, and at most `interval` - 1 steps in a row. The first
    `RETAINED` share of the steps and the last step are never skipped.
    """
    halves, count = ratios.shape
    whole = np.ones(count, bool)
    product, error, skipped = np.ones(halves), np.zeros(halves), 0
    for step in range(max(1, int(RETAINED * count)), count - 1):
        product = product * ratios[:, step]
        error = error + np.abs(1 - product)
        skipped += 1
        if error.max() < threshold and skipped < interval:
            whole[step] = False
        else:
            product, error, skipped = np.ones(halves), np.zeros(halves), 0
    return Skips(whole, np.ones((count, 1), np.float32))


def taylorseer(count: int, order: int, interval: int) -> Skips:
    """Return TaylorSeer's steps: every `interval`-th one runs the blocks.

    Whole are also the first `order` + 1 steps, which the expansion needs, and the last one. In
    between, the residual is the polynomial of degree `order` in the step through the last
    `order` + 1 computed residuals. The paper takes finite differences for the derivatives, which
    is the same for order 1; from order 2 on, that is not exact for polynomials, and this is.
    """
    place = np.arange(count)
    whole = (place <= order) | ((place - order) % interval == 0) | (place == count - 1)
    weights = np.zeros((count, order + 1), np.float32)
    for step in np.flatnonzero(~whole):
        weights[step] = extrapolation(np.flatnonzero(whole[:step])[::-1][: order + 1], int(step))
    return Skips(whole, weights)


def extrapolation(known: Int[np.ndarray, "M"], step: int) -> list[float]:
    """Return the weights of values at the steps `known` in their polynomial's value at `step`.

    They are the Lagrange polynomials, which hold for steps at uneven distances too.
    """
    return [
        float(np.prod([(step - other) / (one - other) for other in known if other != one]))
        for one in known
    ]


def empty_history(shape: tuple[int, int, int], dtype, kept: int, with_input: bool) -> History:
    """Return a history of zeros for residuals of `shape` (rows of all halves, N, D).

    `kept` is the number of residuals; `with_input` adds what TeaCache compares.
    """
    residuals = jnp.zeros((kept, *shape), dtype)
    if not with_input:
        return History(residuals, None, None)
    return History(residuals, jnp.zeros(shape, dtype), jnp.float32(0))


def features(
    model,
    history: History,
    whole: Bool[Array, ""],
    weights: Float[Array, "M"],
    threshold: Float[Array, ""] | None,
    real: Bool[Array, "B N 1"],
    inputs: tuple,
) -> tuple[Float[Array, "B N D"], History]:
    """Return the input of the last layer, computed by the blocks or estimated, and the history.

    `inputs` are the arguments of the network: tokens, grid, lengths, times, texts. With a
    `threshold`, TeaCache's, the blocks also run in steps that are not `whole`. Its change is one
    number for the whole batch, as in the reference. So with TeaCache a video depends a little on
    the other videos of its batch; with the other methods it does not.
    """
    tokens, grid, lengths, time, texts = inputs
    video, text, time = model.embed(tokens, time, texts)
    residuals, modulated, distance = history
    run = whole
    if threshold is not None:
        norm = jax.tree.map(lambda x: x[0], model.blocks[0].norm1)
        before, modulated = modulated, norm(video, text, time)[0][0]
        size = lambda x: jnp.sum(jnp.abs(x.astype(jnp.float32)), where=real)  # noqa: E731
        change = size(modulated - before) / jnp.maximum(size(before), 1e-12)
        distance += jnp.polyval(jnp.array(polynomial(model.config)), change)
        run = whole | (distance >= threshold)
        distance = jnp.where(run, 0.0, distance)

    def blocks():
        features = model.features(video, text, time, grid, lengths)
        newest = features - video
        return features, jnp.concatenate([newest[None], residuals[:-1]])

    def skip():
        # In float32: the terms of an extrapolation are larger than their sum.
        estimate = jnp.sum(weights[:, None, None, None] * residuals, axis=0)
        return video + estimate.astype(video.dtype), residuals

    features, residuals = jax.lax.cond(run, blocks, skip)
    return features, History(residuals, modulated, distance)


def polynomial(config: MMDiTConfig) -> tuple[float, ...]:
    """Return the coefficients of a V5.1 model's polynomial, and of f(x) = x for other models."""
    of_v51 = POLYNOMIALS if config.text_widths == V51_TEXT_WIDTHS else {}
    return of_v51.get(config.depth, (0.0, 0.0, 0.0, 1.0, 0.0))


@jax.jit
def magnitude_ratios(history: History, real: Bool[Array, "B N 1"]) -> Float[Array, "halves B"]:
    """Return the ratio of the newest residual's magnitude to that before it, for each row.

    A token's magnitude is the Euclidean norm of its residual. The ratio is averaged over the real
    tokens (MagCache's gamma). The halves are [uncond, cond], or [cond] without guidance.
    """
    rows = len(real)
    newest, before = jnp.linalg.norm(history.residuals[:2].astype(jnp.float32), axis=-1)
    real = jnp.tile(real[..., 0], (len(newest) // rows, 1))
    ratios = jnp.mean(newest / jnp.where(real, before, 1), axis=1, where=real)
    return ratios.reshape(-1, rows)
