"""Preference without a reward's gradient: sampled groups of videos, and the loss on them.

DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117). With v the student's prediction, v_old that of
the averaged weights which sampled the videos, and delta = v - v_old, the loss compares v_old +
beta delta with a video of much reward and v_old - beta delta with one of little. At v = v_old its
gradient is that of the ordinary loss, weighted with the advantage.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.diffusion.samplers import one_step_moves
from easyanimate_jax.facts import to_bytes
from easyanimate_jax.models.mmdit import unpatchify
from easyanimate_jax.training.post.distill import Metrics, Tokens
from easyanimate_jax.training.post.objectives import NegativeAwareFinetuning
from easyanimate_jax.training.post.reward import asked_of, told
from easyanimate_jax.training.step import (
    Judge,
    Networks,
    Part,
    TrainState,
    average_of,
    predict,
    row_losses,
    row_means,
)

SAMPLED, TRAINED = 6, 7  # folded into the key for the noise of sampled and of trained videos
MOST = 5.0  # advantages beyond it count as this
LEAST = 1e-4  # of a deviation of rewards and of a mean distance, which are divisors

Videos = UInt8[Array, "A n B F H W 3"]


def sample_groups(
    state: TrainState,
    batch: Batch,
    key: PRNGKeyArray,
    *,
    process,
    objective: NegativeAwareFinetuning,
    part: Part | None = None,
) -> tuple[Float[Array, "A n B N P"], Videos]:
    """Return the latents as tokens, and the frames, of `count` videos of each caption of a batch.

    The averaged weights sample them without guidance; n is `objective.count`. The noise follows
    from `key`, the state's step, and the numbers of row and video.
    """
    model = average_of(state, part)
    key = jax.random.fold_in(jax.random.fold_in(key, state.step), SAMPLED)
    rows = jnp.arange(batch.weight.size).reshape(batch.weight.shape)
    times = np.float32(process.grid(objective.steps))
    moves = np.float32(one_step_moves(process, process.grid(objective.steps)))

    def videos_of(asked, rows, number):
        own = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), number))(rows)
        shape = (int(np.prod(objective.grid)), asked.mean.shape[-1])
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(own)

        def step(x, inputs):
            time, (alpha, beta) = inputs
            v = predict(model, asked, x, jnp.full(len(x), time)).astype(jnp.float32)
            return alpha * x + beta * v, None

        latents, _ = jax.lax.scan(step, noise, (times, moves))
        return latents, _frames(state.judge, latents, objective)

    def micro(inputs):
        batch, rows = inputs
        asked = asked_of(batch, objective.grid)
        return jax.lax.map(lambda n: videos_of(asked, rows, n), jnp.arange(objective.count))

    return jax.lax.map(micro, (batch, rows))


def _frames(judge: Judge, latents: Tokens, objective) -> UInt8[Array, "B F H W 3"]:
    latents = judge.vae.denormalize(unpatchify(latents, objective.grid))
    return to_bytes(judge.vae.chunked_decode(latents))


def advantages(
    rewards: Float[np.ndarray, "A n B k"], weights: Sequence[float]
) -> Float[np.ndarray, "A n B"]:
    """Return how far each reward is above the mean of its group, in deviations, -5 to 5.

    Of several rewards it is the weighted mean. All are 0 in a group of equal rewards. NaN stays in
    the groups of a missing reward.
    """
    mean, deviation = (f(rewards, axis=1, keepdims=True) for f in (np.mean, np.std))
    apart = (rewards - mean) / (deviation + LEAST)
    return np.clip(apart @ np.divide(weights, sum(weights)), -MOST, MOST)


def nft_loss(
    networks: Networks,
    batch: Batch,
    time: Float[Array, "B"],
    rows: Int[Array, "B"],
    key: PRNGKeyArray,
    *,
    process,
    objective: NegativeAwareFinetuning,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the weighted sum over rows of the mean loss of their videos, and metrics.

    With r = 1/2 + advantage/10 and h = mean |estimate - video|, without gradient,

        loss = 5/beta (r |z+ - z|^2 / h+ + (1 - r) |z- - z|^2 / h-) + distance |v - v_teacher|^2

    where z+ and z- are the clean estimates by v_old +- beta (v - v_old) at a noised video z. The
    metrics are "reward", the deviation of rewards in a group "reward_spread", and "distance".
    """
    group = batch.group
    asked = asked_of(batch, objective.grid)
    grid = jnp.asarray(np.float32(process.grid(objective.steps)))

    @jax.checkpoint
    def one(student, number, share, latents, advantage):
        x, noised_at = _noised(rows, key, number, share, latents, grid, process)
        new, old, teacher = (
            predict(network, asked, x, noised_at).astype(jnp.float32)
            for network in (student, networks.average, networks.teacher)
        )
        old, teacher = jax.lax.stop_gradient((old, teacher))
        apart = row_means(jnp.square(new - teacher), asked.lengths)
        errors = _errors(new, old, x, latents, noised_at, asked.lengths, process, objective.beta)
        share = 0.5 + advantage / (2 * MOST)
        ours = MOST / objective.beta * (share * errors[0] + (1 - share) * errors[1])
        return jnp.stack([ours + objective.distance * apart, apart])

    def add(total, inputs):
        number, share = inputs
        latents, advantage = group.latents[number], group.advantage[number]
        return total + one(networks.student, number, share, latents, advantage), None

    numbers = jnp.repeat(jnp.arange(objective.count), objective.times)
    shares = jnp.tile(jnp.arange(objective.times), objective.count)
    zeros = jnp.zeros((2, len(rows)))
    losses, apart = jax.lax.scan(add, zeros, (numbers, shares))[0] / len(numbers)
    if objective.plain:
        clips = row_losses(networks.student, batch, time, rows, key, process=process)
        losses += objective.plain * process.weight(time) * clips
    total = group.reward @ jnp.array(list(objective.rewards.values()), jnp.float32)
    found = dict(zip(objective.rewards, jnp.moveaxis(group.reward.mean(0), -1, 0), strict=True))
    metrics = told({"reward": total.mean(0)} | found, batch.weight)
    more = {"reward_spread": total.std(0), "distance": jax.lax.stop_gradient(apart)}
    metrics |= {name: jnp.sum(values * batch.weight) for name, values in more.items()}
    return jnp.sum(losses * batch.weight), metrics


def _noised(
    rows: Int[Array, "B"], key, number, share, latents: Tokens, grid: Float[Array, "K"], process
) -> tuple[Tokens, Float[Array, "B"]]:
    """Return a noised video of each row and its time; no time of a video comes twice."""

    def of_row(row):
        own = jax.random.fold_in(jax.random.fold_in(key, row), TRAINED)
        order, noise = jax.random.split(jax.random.fold_in(own, number))
        noise = jax.random.normal(jax.random.fold_in(noise, share), latents.shape[1:])
        return grid[jax.random.permutation(order, len(grid))[share]], noise

    time, noise = jax.vmap(of_row)(rows)
    return process.add_noise(latents, noise, time), time


def _errors(
    new: Tokens, old: Tokens, x: Tokens, latents: Tokens, time, lengths, process, beta: float
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Return |z+ - z|^2 / h+ and |z- - z|^2 / h- of each row."""
    found = []
    for sign in (beta, -beta):
        error = process.predict_clean(x, old + sign * (new - old), time) - latents
        size = jax.lax.stop_gradient(row_means(jnp.abs(error), lengths))
        found.append(row_means(jnp.square(error), lengths) / jnp.maximum(size, LEAST))
    return tuple(found)
