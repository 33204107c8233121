"""A loss whose gradient brings a reward of sampled videos back into the weights.

A sampler's last latents are linear in its predictions: x' = alpha_i x + beta_i v_i at step i. With
the network's inputs held fixed, the gradient by the weights is therefore a sum of products,
one for each trained step i,

    sum_i (d v_i / d weights)^T b_i q,    b_i = beta_i alpha_{i+1} ... alpha_{K-1},

where q is the gradient of the loss by the last latents. Each product is the gradient of one
ordinary training step, so neither the loop nor the decoder is kept in memory for another.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.diffusion.conditioning import guide
from easyanimate_jax.diffusion.samplers import Walk, walk
from easyanimate_jax.models.mmdit import MMDiT, unpatchify
from easyanimate_jax.storage.functions import named_function
from easyanimate_jax.training.post.distill import Metrics, Tokens, empty_texts
from easyanimate_jax.training.post.objectives import RewardBackpropagation
from easyanimate_jax.training.step import (
    Judge,
    Networks,
    as_float32,
    predict,
    row_losses,
    row_means,
)

# Latents that are decoded at once: a few small videos, on a CPU four times faster than in chunks.
AT_ONCE = 2**18
SAMPLED = 5  # folded into the key for the noise of sampled videos and for the chosen steps


def reward_loss(
    networks: Networks,
    batch: Batch,
    time: Float[Array, "B"],
    rows: Int[Array, "B"],
    key: PRNGKeyArray,
    *,
    process,
    objective: RewardBackpropagation,
) -> tuple[Float[Array, ""], Metrics]:
    """Return -scale * reward and its regularisation, summed over rows, with the gradient above.

    Of the batch, the texts are used; with `plain` also the clips. The metrics are "reward" and
    "distance", the mean squared distance to the teacher at the trained steps.
    """
    asked = asked_of(batch, objective.grid)
    noise = _noise(rows, key, asked, objective)
    plan = walk(process, steps=objective.steps, times=objective.times)
    steps = _steps(key, objective)
    last, kept = _sample(networks.student, asked, noise, plan, steps, objective)

    def loss_of(latents):
        found = rewards(networks.judge, latents, asked.texts, objective)
        total = sum(weight * found[name] for name, weight in objective.rewards.items())
        return -objective.scale * jnp.sum(total * batch.weight), {"reward": total} | found

    (value, found), gradient = jax.value_and_grad(loss_of, has_aux=True)(last)
    factors = _factors(plan, objective)[steps]

    @jax.checkpoint
    def product(total, inputs):
        time, factor, x = inputs
        guided, plain = _predictions(networks.student, asked, x, time, objective)
        by_latents = jax.lax.stop_gradient(factor * gradient)
        teacher = predict(networks.teacher, asked, x, jnp.full(len(x), time))
        apart = row_means(jnp.square(plain - jax.lax.stop_gradient(teacher)), asked.lengths)
        return total + jnp.stack(
            [jnp.sum(by_latents * guided), jnp.sum(apart * batch.weight)]
        ), None

    times = jnp.asarray(plan.times)[steps]
    (products, apart), _ = jax.lax.scan(product, jnp.zeros(2), (times, factors, kept))
    apart = apart / objective.chosen
    total = products + jax.lax.stop_gradient(value - products) + objective.distance * apart
    if objective.plain:
        clips = row_losses(networks.student, batch, time, rows, key, process=process)
        total += objective.plain * jnp.sum(clips * process.weight(time) * batch.weight)
    return total, told(found, batch.weight) | {"distance": apart}


def told(found: dict[str, Float[Array, "B"]], weight: Float[Array, "B"]) -> Metrics:
    """Return the metrics of "reward", and of its parts if it has several."""
    parts = {f"reward/{name}": values for name, values in found.items() if name != "reward"}
    shown = {"reward": found["reward"]} | (parts if len(parts) > 1 else {})
    return {name: jnp.sum(values * weight) for name, values in shown.items()}


def reward_function(name: str) -> Callable:
    """Return (weights, frames, texts) -> rewards of MODULE:FUNCTION."""
    function = named_function(name)
    return function if hasattr(function, "load") else lambda _, *inputs: function(*inputs)


def reward_weights(name: str):
    """Return the weights that MODULE:FUNCTION loads; () if it has none."""
    function = named_function(name)
    return function.load() if hasattr(function, "load") else ()


def rewards(
    judge: Judge, latents: Tokens, texts, objective: RewardBackpropagation
) -> dict[str, Float[Array, "B"]]:
    """Return {name: rewards} of the first decoded frames of latents, as tokens.

    Raises ValueError for a reward that does not return one number for each video.
    """

    @jax.checkpoint
    def frames_of(latents):
        first = unpatchify(latents, objective.grid)[:, : objective.decoded]
        decode = judge.vae.decode if first.size <= AT_ONCE else judge.vae.chunked_decode
        return decode(judge.vae.denormalize(first))

    frames, found = jnp.clip(frames_of(latents), -1, 1), {}
    for name in objective.rewards:
        values = reward_function(name)(judge.weights[name], frames, texts)
        if jnp.shape(values) != (len(latents),):
            raise ValueError(
                f"the reward {name} returned the shape {jnp.shape(values)} for {len(latents)} "
                f"videos; return one number for each"
            )
        found[name] = values.astype(jnp.float32)
    return found


def asked_of(batch: Batch, grid: tuple[int, int, int]) -> Batch:
    """Return the batch of the videos to sample, of one size and without a picture."""
    batch, count = as_float32(batch), int(np.prod(grid))
    rows, condition = len(batch.lengths), batch.condition
    if condition is not None:
        condition = jnp.zeros((rows, count, condition.shape[-1]))
    return batch._replace(
        condition=condition,
        grid=jnp.tile(jnp.array(grid, jnp.int32), (rows, 1)),
        lengths=jnp.full(rows, count, jnp.int32),
    )


def _noise(rows: Int[Array, "B"], key: PRNGKeyArray, asked: Batch, objective) -> Tokens:
    """Return the noise from which the videos are sampled."""
    key = jax.random.fold_in(key, SAMPLED)
    shape = int(np.prod(objective.grid)), asked.mean.shape[-1]
    return jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), shape))(rows)


def _steps(key: PRNGKeyArray, objective: RewardBackpropagation) -> Int[Array, "chosen"]:
    """Return the numbers of the trained steps, the same for all rows, in their order."""
    key = jax.random.fold_in(jax.random.fold_in(key, SAMPLED), 1)
    drawn = jax.random.permutation(key, objective.last)[: objective.chosen]
    return jnp.sort(objective.steps - objective.last + drawn)


def _factors(plan: Walk, objective: RewardBackpropagation) -> Float[Array, "K"]:
    """Return b_i of every step; with `equal` all have the mean size of the last ones."""
    alpha, beta = np.float64(plan.moves[:, 0]).T
    after = np.append(np.cumprod(alpha[::-1])[::-1][1:], 1.0)
    factors = beta * after
    if objective.equal:
        factors = np.sign(factors) * np.abs(factors[-objective.last :]).mean()
    return jnp.asarray(np.float32(factors))


def _sample(
    student: MMDiT, batch: Batch, noise: Tokens, plan: Walk, steps, objective
) -> tuple[Tokens, Float[Array, "chosen B N P"]]:
    """Return the last latents, and the inputs of the trained steps; nothing has a gradient."""
    student = jax.lax.stop_gradient(student)

    def step(carry, inputs):
        (x, kept), (number, time, (alpha, beta)) = carry, inputs
        here = (steps == number)[:, None, None, None]
        kept = jnp.where(here, x[None], kept)
        guided, _ = _predictions(student, batch, x, time, objective)
        return (alpha * x + beta * guided, kept), None

    kept = jnp.zeros((objective.chosen, *noise.shape))
    table = jnp.arange(objective.steps), jnp.asarray(plan.times), jnp.asarray(plan.moves[:, 0])
    return jax.lax.scan(step, (noise, kept), table)[0]


def _predictions(student: MMDiT, batch: Batch, x: Tokens, time, objective):
    """Return the guided prediction and the one without guidance."""
    times = jnp.full(len(x), time)
    plain = predict(student, batch, x, times).astype(jnp.float32)
    if objective.guidance == 1:
        return plain, plain
    uncond = predict(student, batch, x, times, empty_texts(batch)).astype(jnp.float32)
    return guide(uncond, plain, objective.guidance), plain
