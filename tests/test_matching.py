"""Distribution matching: a student of one Gaussian, the losses by NumPy, and a whole run."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import flat_weights
from flax import nnx
from small_runs import losses
from test_distill import ADAPTERS, KEY, ROWS, batch_of, grid_by_formula, mean, model  # noqa: F401
from test_distill import run_of as run_of

from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.runs.loop import train
from easyanimate_jax.training.post import matching
from easyanimate_jax.training.post.matching import (
    Three,
    critic_loss,
    matching_step,
    student_loss,
)
from easyanimate_jax.training.post.objectives import DistributionMatching
from easyanimate_jax.training.step import Critic, TrainState
from easyanimate_jax.weights.folder import load_mmdit

OBJECTIVE = DistributionMatching(steps=3, guidance=1.0, critic_updates=2)


class Gaussian(MMDiT):
    """The exact flow of data with one mean and deviation; at time 1000 it says mean + std * x."""

    def __init__(self, mean, std):
        self.mean, self.std = nnx.Param(jnp.float32(mean)), nnx.Param(jnp.float32(std))

    def __call__(self, x, grid, lengths, time, texts):
        s = time[:, None, None] / 1000
        m, r = self.mean[...], self.std[...]
        power = (1 - s) ** 2 * r**2 + s**2
        clean = m + (1 - s) * r**2 / power * (x - (1 - s) * m)
        clean = jnp.where(s == 1, m + r * x, clean)
        return (x - clean) / s


def trained(critic_rate):
    """The student's mean and deviation after updates toward data of mean 2 and deviation 0.5."""
    objective = DistributionMatching(1, 1.0, critic_updates=2, critic_rate=critic_rate)
    optimizer = optax.scale_by_adam(0.0, 0.99)
    student, critic = Gaussian(0, 1), Gaussian(0, 1)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        zero,
        zero,
        student,
        Gaussian(0, 1),
        optimizer.init(student),
        teacher=Gaussian(2, 0.5),
        critic=Critic(critic, optimizer.init(critic)),
    )
    step = partial(
        matching_step, optimizer=optimizer, process=Flow(), ema_decay=0.9, objective=objective
    )
    batch = jax.tree.map(lambda x: x[None, :2], batch_of())
    update = lambda _, state: step(state, batch, KEY, jnp.float32(0.02))[0]  # noqa: E731
    state = jax.lax.fori_loop(0, 600, update, state)
    return float(state.ema.mean[...]), float(state.ema.std[...])


def test_a_student_gets_the_distribution_of_its_teacher_and_not_only_its_mode():
    found, spread = trained(1.0)
    assert abs(found - 2) < 0.1 and abs(spread - 0.5) < 0.07, (found, spread)
    _, spread = trained(0.0)  # without a critic that follows, all videos become one
    assert spread < 0.35


def test_a_critic_that_is_the_unguided_teacher_moves_no_student(model):  # noqa: F811
    found = Three(model, model, model)
    draws = matching._draws(KEY, 0, OBJECTIVE)
    assert float(student_loss(found, batch_of(), ROWS, draws, Flow(), OBJECTIVE)) == 0


@pytest.mark.parametrize("process", [Flow(), DDPM()], ids=["flow", "ddpm"])
def test_the_gradient_by_the_video_is_the_direction(process, monkeypatch):
    """By NumPy, for a student of one number that is added to its video."""
    batch, draws = batch_of(), matching._draws(KEY, 0, OBJECTIVE)
    share = np.linspace(0.1, 0.9, 6)
    noise = np.random.RandomState(2).standard_normal(batch.mean.shape).astype(np.float32)
    video = np.random.RandomState(3).standard_normal(batch.mean.shape).astype(np.float32)
    time = np.array(process.time_at(share), np.float32)
    monkeypatch.setattr(matching, "_noise", lambda *_: (jnp.asarray(time), jnp.asarray(noise)))
    monkeypatch.setattr(matching, "_video", lambda student, batch, *_: (batch, video + student))

    class Linear(MMDiT):
        def __init__(self, gain):
            self.gain = gain

        def __call__(self, x, grid, lengths, time, texts):
            return self.gain * x + jnp.float32(1e-3) * time[:, None, None]

    def loss(added):
        found = Three(added, Linear(0.5), Linear(0.8))
        return student_loss(found, batch, ROWS, draws, process, OBJECTIVE)

    value, slope = jax.value_and_grad(loss)(jnp.float32(0.0))
    signal, sigma = (x[:, None, None] for x in process.levels(time.astype(np.float64)))
    x = signal * video + sigma * noise
    clean = {}
    for name, gain in (("real", 0.5), ("fake", 0.8)):
        v = gain * x + 1e-3 * time[:, None, None]
        clean[name] = x - sigma * v if isinstance(process, Flow) else signal * x - sigma * v
    d = clean["fake"] - clean["real"]
    for row, count in enumerate(batch.lengths):
        d[row] /= np.abs(video - clean["real"])[row, :count].mean()
    np.testing.assert_allclose(value, 0.5 * mean(batch, d**2), rtol=1e-4)
    np.testing.assert_allclose(slope, mean(batch, d), rtol=1e-3)


def test_the_critic_denoises_videos_that_start_anew_from_every_estimate(monkeypatch):
    """By a loop: the student's three steps, each from its clean estimate and new noise."""
    process, batch = Flow(), batch_of()
    draws = matching.Draws(KEY, KEY, jnp.int32(2))
    seen = []

    class Student(MMDiT):
        def __init__(self):
            pass

        def __call__(self, x, grid, lengths, time, texts):
            jax.debug.callback(lambda time: seen.append(float(time[0])), time, ordered=True)
            return 0.5 * x

    _, video = matching._video(Student(), batch, ROWS, draws, process, OBJECTIVE)
    jax.effects_barrier()
    times = grid_by_formula(process, 3)
    np.testing.assert_allclose(seen[-1], times[2], rtol=1e-6)
    np.testing.assert_allclose(seen[:2], times[:2], rtol=1e-6)
    from easyanimate_jax.training.step import draw

    x = np.asarray(draw(batch, ROWS, KEY)[2])
    for number in (0, 1):
        key = jax.random.fold_in(jax.random.fold_in(KEY, matching.NEW), number)
        fresh = np.stack(
            [jax.random.normal(jax.random.fold_in(key, row), x.shape[1:]) for row in range(6)]
        )
        sigma = times[number] / 1000
        after = times[number + 1] / 1000
        x = (1 - after) * (x - sigma * 0.5 * x) + after * fresh
    np.testing.assert_allclose(video, x - times[2] / 1000 * 0.5 * x, atol=1e-5)


def test_gradients_reach_the_student_by_its_last_step_alone(model):  # noqa: F811
    batch, draws = batch_of(), matching.Draws(KEY, jax.random.key(8), jnp.int32(2))
    other = jax.tree.map(lambda x: 1.1 * x, model)
    loss = jax.jit(
        lambda *three: student_loss(Three(*three), batch, ROWS, draws, Flow(), OBJECTIVE)
    )
    student, teacher, critic = jax.grad(loss, argnums=(0, 1, 2))(model, model, other)
    assert not any(x.any() for x in jax.tree.leaves((teacher, critic)))
    assert any(x.any() for x in jax.tree.leaves(student))
    grads = jax.jit(
        jax.grad(
            lambda *three: critic_loss(Three(*three), batch, ROWS, draws, Flow(), OBJECTIVE),
            argnums=(0, 2),
        )
    )(model, model, other)
    assert not any(x.any() for x in jax.tree.leaves(grads[0]))
    assert any(x.any() for x in jax.tree.leaves(grads[1]))


def test_a_matching_run_resumes_to_the_bits_and_leaves_the_base(tmp_path):
    config = run_of(tmp_path / "whole", [OBJECTIVE], ADAPTERS)
    assert train(config) == 0
    part = replace(config, run=str(tmp_path / "run"))
    assert train(replace(part, stages=(replace(part.stages[0], steps=1),))) == 0
    assert train(part) == 0
    assert losses(part) == losses(config)
    ours, theirs = (flat_weights(load_mmdit(c.run, weights="raw")) for c in (part, config))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    for name, value in flat_weights(load_mmdit(config.init)).items():
        np.testing.assert_array_equal(theirs[name], value, err_msg=name)
    ups = [value for name, value in theirs.items() if name.endswith("adapter.up")]
    assert any(up.any() for up in ups)
