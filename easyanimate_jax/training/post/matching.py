"""One update of distribution matching distillation: a student, its teacher and a critic.

DMD2 (Yin et al. 2024, arXiv 2405.14867). With adapters all three share the weights of one base. The
critic is trained in every update, the student in the last of every `critic_updates`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.training.post.distill import Tokens, guided_prediction, scales
from easyanimate_jax.training.post.objectives import DistributionMatching
from easyanimate_jax.training.step import (
    Part,
    TrainState,
    draw,
    networks,
    over_microbatches,
    predict,
    row_means,
    updated,
)

LEAST, MOST = 0.02, 0.98  # shares of the way to noise at which videos are compared
NEW = 4  # folded into a row's key for the noise of the student's steps


class Three(NamedTuple):
    """The three networks of an update."""

    student: MMDiT
    teacher: MMDiT
    critic: MMDiT


class Found(NamedTuple):
    """The losses of an update and their gradients."""

    critic: tuple  # (loss, gradients)
    student: tuple  # likewise; zeros unless it is its turn
    turn: Bool[Array, ""]


class Draws(NamedTuple):
    """The draws of an update: keys for all rows, and the step at which the student stops."""

    rollout: PRNGKeyArray
    compare: PRNGKeyArray
    last: Int[Array, ""]  # the same for all rows and all hosts


def matching_step(
    state: TrainState,
    batch: Batch,
    key: PRNGKeyArray,
    learning_rate: Float[Array, ""],
    *,
    optimizer: optax.GradientTransformation,
    process,
    ema_decay: float,
    objective: DistributionMatching,
    batch_size: int | None = None,
    part: Part | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Make one update from a global batch of (A, B) rows; return (new state, metrics).

    The arguments are those of `step.train_step`. Of the batch, texts, condition and shapes are
    used, and no latents. "loss" is the critic's; "matching" is the mean square of the direction in
    which the student is moved.
    """
    del batch_size
    step_key = jax.random.fold_in(key, state.step)
    rows = jnp.arange(batch.weight.size).reshape(batch.weight.shape)
    batch = batch._replace(weight=batch.weight / batch.weight.sum())

    def three(student, critic) -> Three:
        left_out = jax.random.fold_in(step_key, 1)
        found, other = (networks(w, state, part, left_out) for w in (student, critic))
        return Three(found.student, found.teacher, other.student)

    def of_critic(weights, batch, rows):
        found = three(state.model, weights)
        return critic_loss(found, batch, rows, _draws(step_key, 2, objective), process, objective)

    def of_student(weights, batch, rows):
        found = three(weights, state.critic.model)
        return student_loss(found, batch, rows, _draws(step_key, 3, objective), process, objective)

    turn = (state.step + 1) % objective.critic_updates == 0
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.model))
    found = Found(
        _summed(of_critic, state.critic.model, batch, rows),
        jax.lax.cond(turn, lambda: _summed(of_student, state.model, batch, rows), lambda: zero),
        turn,
    )
    made = state.step // objective.critic_updates  # updates of the student so far
    decay = jnp.minimum(ema_decay, (1 + made) / (10 + made))
    return _updated(state, found, optimizer, learning_rate, objective.critic_rate, decay)


def _updated(
    state: TrainState, found: Found, optimizer, learning_rate, critic_rate: float, decay
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Return (new state, metrics); what is not finite changes no weight."""
    (value, grads), (matching, moves) = found.critic, found.student
    norms = optax.tree.norm(grads), optax.tree.norm(moves)
    finite = jnp.isfinite(jnp.stack([value, matching, *norms])).all()
    rate = critic_rate * learning_rate
    critic = updated(optimizer, grads, state.critic.opt_state, state.critic.model, rate)
    model, opt_state = updated(optimizer, moves, state.opt_state, state.model, learning_rate)
    ema = None if state.ema is None else optax.incremental_update(model, state.ema, 1 - decay)

    def kept(good, new, old):
        return jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old)

    old = state.model, state.opt_state, state.ema
    model, opt_state, ema = kept(finite & found.turn, (model, opt_state, ema), old)
    critic = kept(finite, type(state.critic)(*critic), state.critic)
    skipped = state.skipped + ~finite
    metrics = {
        "loss": value,
        "grad_norm": norms[0],
        "skipped": skipped,
        "matching": matching,
        "student_grad_norm": norms[1],
    }
    new = state._replace(
        step=state.step + 1,
        skipped=skipped,
        model=model,
        ema=ema,
        opt_state=opt_state,
        critic=critic,
    )
    return new, metrics


def critic_loss(
    found: Three,
    batch: Batch,
    rows: Int[Array, "B"],
    draws: Draws,
    process,
    objective: DistributionMatching,
) -> Float[Array, ""]:
    """Return the critic's denoising loss on the student's videos."""
    batch, video = _video(found.student, batch, rows, draws, process, objective)
    video = jax.lax.stop_gradient(video)
    time, noise = _noise(rows, draws, video, process)
    prediction = predict(found.critic, batch, process.add_noise(video, noise, time), time)
    errors = jnp.square(prediction.astype(jnp.float32) - process.target(video, noise, time))
    return jnp.sum(row_means(errors, batch.lengths) * batch.weight)


def student_loss(
    found: Three,
    batch: Batch,
    rows: Int[Array, "B"],
    draws: Draws,
    process,
    objective: DistributionMatching,
) -> Float[Array, ""]:
    """Return half the mean square of the direction d; its gradient by the video is d.

    d = (critic's estimate - teacher's guided estimate) / mean |video - teacher's estimate| of a
    row; where it is not finite it is 0.
    """
    batch, video = _video(found.student, batch, rows, draws, process, objective)
    time, noise = _noise(rows, draws, video, process)
    x = jax.lax.stop_gradient(process.add_noise(video, noise, time))
    scale = scales(batch, objective)
    guided, _ = guided_prediction(found.teacher, batch, x, time, scale, objective)
    own = predict(found.critic, batch, x, time).astype(jnp.float32)
    real, fake = (process.predict_clean(x, v, time) for v in (guided, own))
    size = row_means(jnp.abs(video - real), batch.lengths)[:, None, None]
    direction = (fake - real) / size
    direction = jax.lax.stop_gradient(jnp.where(jnp.isfinite(direction), direction, 0.0))
    goal = jax.lax.stop_gradient(video) - direction
    losses = row_means(jnp.square(video - goal), batch.lengths)
    return 0.5 * jnp.sum(losses * batch.weight)


def _summed(loss, weights, batch: Batch, rows):
    """Return (loss, gradients), summed over the microbatches."""

    def accumulate(carry, micro):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss)(weights, *micro)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
    return over_microbatches(accumulate, zeros, (batch, rows))[0]


def _draws(key: PRNGKeyArray, number: int, objective: DistributionMatching) -> Draws:
    rollout, compare, last = jax.random.split(jax.random.fold_in(key, number), 3)
    return Draws(rollout, compare, jax.random.randint(last, (), 0, objective.steps))


def _video(
    student: MMDiT, batch: Batch, rows, draws: Draws, process, objective: DistributionMatching
) -> tuple[Batch, Tokens]:
    """Return the batch in float32 and the clean latents that the student makes for its rows.

    Each step starts from the clean estimate before it, with new noise. The last one has a gradient.
    """
    batch, _, noise = draw(batch, rows, draws.rollout)
    times = jnp.asarray(process.grid(objective.steps), jnp.float32)

    def fresh(number):
        key = jax.random.fold_in(jax.random.fold_in(draws.rollout, NEW), number)
        draw_row = lambda row: jax.random.normal(jax.random.fold_in(key, row), noise.shape[1:])  # noqa: E731
        return jax.vmap(draw_row)(rows)

    def clean(x, number, student):
        time = jnp.full(len(rows), times[number])
        prediction = predict(student, batch, x, time).astype(jnp.float32)
        return process.predict_clean(x, prediction, time)

    fixed = jax.lax.stop_gradient(student)  # so that no earlier step is kept for a backward pass

    def step(x, number):
        time = jnp.full(len(rows), times[jnp.minimum(number + 1, objective.steps - 1)])
        moved = process.add_noise(clean(x, number, fixed), fresh(number), time)
        return jnp.where(number < draws.last, moved, x), None

    x, _ = jax.lax.scan(step, noise, jnp.arange(objective.steps - 1))
    return batch, clean(x, draws.last, student)


def _noise(rows, draws: Draws, video: Tokens, process) -> tuple[Float[Array, "B"], Tokens]:
    """Return times at which videos are compared, and the noise to add."""

    def of_row(row):
        time, noise = jax.random.split(jax.random.fold_in(draws.compare, row))
        share = jax.random.uniform(time, minval=LEAST, maxval=MOST)
        return share, jax.random.normal(noise, video.shape[1:])

    share, noise = jax.vmap(of_row)(rows)
    return process.time_at(share), noise
