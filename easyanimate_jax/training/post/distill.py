"""Losses that teach a student in fewer evaluations what a teacher makes in many.

They are written with the methods of a noise process alone, so they hold for V5.1's flow and for
V5's DDPM. Means are over the real tokens of a row, then over rows, as in `denoising_loss`. The
clean channels of a row, such as its picture or control, go unchanged to student and teacher.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.diffusion.conditioning import guide
from easyanimate_jax.diffusion.losses import masked_squared_error
from easyanimate_jax.diffusion.samplers import one_step_moves
from easyanimate_jax.diffusion.times import align
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.training.post.objectives import GuidanceDistillation, SegmentDistillation
from easyanimate_jax.training.step import Networks, draw, predict, row_means

Tokens = Float[Array, "B N P"]
Metrics = dict[str, Float[Array, ""]]
WALKED = 3  # folded into a row's key for the choice of rows that are walked to, and of the segment


def guidance_loss(
    networks: Networks,
    batch: Batch,
    time: Float[Array, "B"],
    rows: Int[Array, "B"],
    key: PRNGKeyArray,
    *,
    process,
    objective: GuidanceDistillation,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the squared error of the student's prediction to the teacher's guided one.

    The metric "distance" is the student's mean squared distance to the teacher without guidance.
    """
    batch, latents, noise = draw(batch, rows, key)
    x = process.add_noise(latents, noise, time)
    scale = scales(batch, objective)
    guided, plain = guided_prediction(networks.teacher, batch, x, time, scale, objective)
    prediction = predict(networks.student, batch, x, time)
    return _losses(prediction, guided, plain, batch)


def segment_loss(
    networks: Networks,
    batch: Batch,
    time: Float[Array, "B"],
    rows: Int[Array, "B"],
    key: PRNGKeyArray,
    *,
    process,
    objective: SegmentDistillation,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the squared error of the student's velocity to the one that ends the segment.

    The velocity is v = (x' - alpha x) / beta for the move x' = alpha x + beta v of the segment,
    where the teacher goes from x to x' in several guided moves. Segments are drawn per row, so
    `time` is not used. The metric "distance" is that of `guidance_loss`, at the segment's start.
    """
    del time
    batch, latents, noise = draw(batch, rows, key)
    coarse, fine = (process.grid(objective.steps * n) for n in (1, objective.substeps))
    moves, fine_moves = (_table(one_step_moves(process, times)) for times in (coarse, fine))
    coarse, fine = _table(coarse), _table(fine)
    segment, walked = _segments(rows, key, objective)
    x = process.add_noise(latents, noise, coarse[segment])
    if objective.walked:
        own = _walk(networks.student, batch, noise, segment, coarse, moves)
        x = jnp.where(walked[:, None, None], own, x)
    scale = scales(batch, objective)

    def substep(carry, number):
        at = segment * objective.substeps + number
        guided, plain = guided_prediction(
            networks.teacher, batch, carry, fine[at], scale, objective
        )
        return _move(fine_moves[at], carry, guided), plain

    end, plain = jax.lax.scan(substep, x, jnp.arange(objective.substeps))
    alpha, beta = (align(factor, x) for factor in moves[segment].T)
    prediction = predict(networks.student, batch, x, coarse[segment])
    return _losses(prediction, (end - alpha * x) / beta, plain[0], batch)


def _losses(prediction: Tokens, target: Tokens, plain: Tokens, batch: Batch):
    target, plain = (jax.lax.stop_gradient(x) for x in (target, plain))
    losses = row_means(masked_squared_error(prediction, target), batch.lengths)
    apart = row_means(jnp.square(jax.lax.stop_gradient(prediction) - plain), batch.lengths)
    return jnp.sum(losses * batch.weight), {"distance": jnp.sum(apart * batch.weight)}


def guided_prediction(
    teacher: MMDiT, batch: Batch, x: Tokens, time, scale: Float[Array, "B"], objective
) -> tuple[Tokens, Tokens]:
    """Return the teacher's guided prediction, and the one without guidance."""
    x = jax.lax.stop_gradient(x)
    plain = predict(teacher, batch, x, time).astype(jnp.float32)
    if not is_guided(objective):
        return plain, plain
    shape = (len(x), *(1,) * (batch.empty[0].ndim - 1))
    empty = tuple(jnp.tile(text.astype(jnp.float32), shape) for text in batch.empty)
    uncond = predict(teacher, batch, x, time, empty).astype(jnp.float32)
    return guide(uncond, plain, align(scale, x)), plain


def is_guided(objective) -> bool:
    """Return whether the teacher of an objective is guided, so that it needs the empty caption."""
    return max(objective.guidance, objective.guidance_given or 1.0) > 1


def scales(batch: Batch, objective) -> Float[Array, "B"]:
    """Return each row's scale of guidance: rows with a picture or control can have their own."""
    scale = jnp.full(len(batch.lengths), objective.guidance)
    if objective.guidance_given is None or batch.condition is None:
        return scale
    given = (batch.condition != 0).any(axis=(1, 2))
    return jnp.where(given, objective.guidance_given, scale)


def _segments(
    rows: Int[Array, "B"], key: PRNGKeyArray, objective: SegmentDistillation
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """Return the segment of each row, and whether the student walks to its beginning."""

    def of_row(row):
        own = jax.random.fold_in(jax.random.fold_in(key, row), WALKED)
        segment, walked = jax.random.split(own)
        return (
            jax.random.randint(segment, (), 0, objective.steps),
            jax.random.uniform(walked) < objective.walked,
        )

    return jax.vmap(of_row)(rows)


def _walk(student: MMDiT, batch: Batch, noise: Tokens, segment, times, moves) -> Tokens:
    """Return what the student makes of pure noise up to the beginning of each row's segment."""
    student = jax.lax.stop_gradient(student)  # so that no step is kept for a backward pass

    def step(x, number):
        time = jnp.full(len(x), times[number])
        moved = _move(jnp.tile(moves[number], (len(x), 1)), x, predict(student, batch, x, time))
        return jnp.where((number < segment)[:, None, None], moved, x), None

    return jax.lax.scan(step, noise, jnp.arange(len(times) - 1))[0]


def _move(factors: Float[Array, "B 2"], x: Tokens, prediction: Tokens) -> Tokens:
    alpha, beta = (align(factor, x) for factor in factors.T)
    return alpha * x + beta * prediction.astype(jnp.float32)


def _table(values) -> Float[Array, "..."]:
    return jnp.asarray(np.float32(values))
