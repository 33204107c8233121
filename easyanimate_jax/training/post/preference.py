"""The loss that teaches a student to prefer the better clip of each pair (Flow-DPO).

Liu et al. 2025, arXiv 2501.13918, without its weight of noise levels: beta is constant for errors
of the velocity, as in the authors' code (yifan123/flow_grpo, `scripts/train_sd3_dpo.py`). DDPM
predicts a velocity too, so the same loss holds for V5's process.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.diffusion.losses import masked_squared_error
from easyanimate_jax.training.post.objectives import DirectPreference
from easyanimate_jax.training.step import Networks, draw, predict, row_means

TIMES = 8  # folded into the key for the choice of times
Rows = Float[Array, "B"]
Metrics = dict[str, Float[Array, ""]]


def preference_loss(
    networks: Networks,
    batch: Batch,
    time: Rows,
    rows: Int[Array, "B"],
    key: PRNGKeyArray,
    *,
    process,
    objective: DirectPreference,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the weighted sum over pairs of -log sigmoid(-beta m / 2), and metrics.

    With e the mean squared error of a network's prediction for a clip, the change of a clip is
    e of the student - e of the teacher, and the margin m is the change of the better clip - that
    of the worse. Both clips have the same noise, time and draw from the VAE's posterior.
    `objective.plain` adds the ordinary loss on the better clip. The metrics are "margin", the
    share of pairs with a negative margin "accuracy" (0 before the first update), "better_change"
    and "worse_change".
    """
    if objective.times:
        time = _drawn(objective.times, rows, key)
    other = batch._replace(**batch.worse._asdict())
    better, plain = _change(networks, batch, time, rows, key, process)
    worse, _ = _change(networks, other, time, rows, key, process)
    margin = better - worse
    losses = -jax.nn.log_sigmoid(-objective.beta / 2 * margin)
    if objective.plain:
        losses += objective.plain * process.weight(time) * plain
    accuracy = (margin < 0).astype(jnp.float32)
    found = {"margin": margin, "accuracy": accuracy}
    found |= {"better_change": better, "worse_change": worse}
    metrics = {name: jnp.sum(values * batch.weight) for name, values in found.items()}
    return jnp.sum(losses * batch.weight), metrics


def _drawn(times: tuple[float, ...], rows: Int[Array, "B"], key: PRNGKeyArray) -> Rows:
    """Return one of the times for each row."""
    key = jax.random.fold_in(key, TIMES)
    draw_row = lambda row: jax.random.randint(jax.random.fold_in(key, row), (), 0, len(times))  # noqa: E731
    return jnp.array(times, jnp.float32)[jax.vmap(draw_row)(rows)]


def _change(
    networks: Networks, batch: Batch, time: Rows, rows: Int[Array, "B"], key: PRNGKeyArray, process
) -> tuple[Rows, Rows]:
    """Return how much larger the student's error of each row is than the teacher's.

    The second result is the student's error as the ordinary loss counts it, without outliers.
    """
    batch, latents, noise = draw(batch, rows, key)
    x = process.add_noise(latents, noise, time)
    target = process.target(latents, noise, time)
    student, teacher = (
        predict(network, batch, x, time).astype(jnp.float32)
        for network in (networks.student, networks.teacher)
    )
    errors = jnp.square(student - target) - jax.lax.stop_gradient(jnp.square(teacher - target))
    plain = masked_squared_error(student, target)
    return row_means(errors, batch.lengths), row_means(plain, batch.lengths)
