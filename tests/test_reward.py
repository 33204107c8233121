"""Reward back-propagation against one chain of autodiff, a formula, and a run."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import flat_weights
from flax import nnx
from small_runs import losses, rows
from test_distill import ADAPTERS, KEY, ROWS, batch_of
from test_distill import run_of as run_of
from test_export import random_module

from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.samplers import walk
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.runs.loop import train
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.training.post import reward
from easyanimate_jax.training.post.objectives import RewardBackpropagation
from easyanimate_jax.training.post.reward import reward_loss
from easyanimate_jax.training.step import Judge, Networks
from easyanimate_jax.weights.defaults import Defaults, of_run
from easyanimate_jax.weights.folder import load_mmdit
from easyanimate_jax.weights.module import save_module
from easyanimate_jax.weights.run_folder import read_meta

HERE = "test_reward"
NAME = f"{HERE}:contrast"
SMALL = {"frames": 1, "height": 32, "width": 32}


def brightness(frames, texts):
    """More light, and more of the first text state."""
    return frames.mean(axis=(1, 2, 3, 4)) + 0 * texts[0].mean(axis=(1, 2))


def contrast(weights, frames, texts):
    return weights["gain"] * jnp.square(frames).mean(axis=(1, 2, 3, 4)) + texts[0].sum((1, 2))


contrast.load = lambda: {"gain": jnp.float32(3.0)}


def one_number(frames, texts):
    return frames.mean()


@pytest.fixture(scope="module")
def vae():
    return random_module(CausalVAE, VAEConfig(channels=(4, 4, 8, 8), groups=4, dtype="float32"))


class Line(MMDiT):
    """A network of two weights, which sees its time and its texts."""

    def __init__(self, gain, bias):
        self.gain, self.bias = nnx.Param(jnp.float32(gain)), nnx.Param(jnp.float32(bias))

    def __call__(self, x, grid, lengths, time, texts):
        word = texts[0].mean(axis=(1, 2))[:, None, None]
        return self.gain[...] * jnp.tanh(x[..., :64]) + self.bias[...] * word + time[0] / 1000


class Pixels:
    """An autoencoder whose pixels are a known function of the latents."""

    def denormalize(self, latents):
        return 0.5 * latents

    def chunked_decode(self, latents):
        return jnp.sin(latents[..., :3])

    decode = chunked_decode


STUDENT, TEACHER = Line(0.4, 0.3), Line(0.5, 0.2)
SIMPLE = Judge(Pixels(), {f"{HERE}:brightness": ()})


def objective_of(name="brightness", **settings):
    own = {"steps": 6, "chosen": 2, "last": 4, "guidance": 2.0, "equal": False} | SMALL
    return RewardBackpropagation(f"{HERE}:{name}", **own | settings)


@pytest.mark.parametrize("process", [Flow(), DDPM()], ids=["flow", "ddpm"])
def test_the_gradient_is_that_of_the_chain_with_its_inputs_held(process):
    """By autodiff through all steps at once; other steps and all inputs have no gradient."""
    objective, batch = objective_of("contrast"), batch_of()
    judge = SIMPLE._replace(weights={NAME: contrast.load()})
    asked = reward.asked_of(batch, objective.grid)
    noise = reward._noise(ROWS, KEY, asked, objective)
    chosen = np.asarray(reward._steps(KEY, objective))
    assert len(set(chosen)) == 2 and 2 <= chosen.min() <= chosen.max() <= 5
    plan = walk(process, steps=6)

    @jax.jit
    def chain(student):
        x = noise
        for number, (time, (alpha, beta)) in enumerate(
            zip(plan.times, plan.moves[:, 0], strict=True)
        ):
            held = jax.lax.stop_gradient(x)
            v, _ = reward._predictions(student, asked, held, jnp.float32(time), objective)
            x = alpha * x + beta * (v if number in chosen else jax.lax.stop_gradient(v))
        (found,) = reward.rewards(judge, x, asked.texts, objective).values()
        return -jnp.sum(found * batch.weight)

    @jax.jit
    def ours(student):
        return reward_loss(
            Networks(student, TEACHER, judge),
            batch,
            jnp.full(6, 500.0),
            ROWS,
            KEY,
            process=process,
            objective=objective,
        )[0]

    (value, expected), (found_value, found) = (
        jax.value_and_grad(f)(STUDENT) for f in (chain, ours)
    )
    np.testing.assert_allclose(found_value, value, rtol=1e-4)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(other).max() + 1e-8)
    assert max(np.abs(x).max() for x in jax.tree.leaves(found)) > 1e-6


def test_the_gradient_by_the_latents_is_that_of_differences(vae):
    objective = objective_of("contrast")
    judge = Judge(vae, {NAME: contrast.load()})
    x = jax.random.normal(KEY, (1, 4, 64))
    texts = (jnp.ones((1, 4, 8)),)

    @jax.jit
    def total(x):
        (found,) = reward.rewards(judge, x, texts, objective).values()
        return found.sum()

    direction = jax.random.normal(jax.random.key(9), x.shape)
    slope = (total(x + 0.01 * direction) - total(x - 0.01 * direction)) / 0.02
    np.testing.assert_allclose(jnp.sum(jax.grad(total)(x) * direction), slope, rtol=1e-2)


def test_the_last_step_of_a_flow_moves_almost_nothing_and_of_ddpm_enough():
    def size(process, last):
        factors = reward._factors(walk(process, steps=50), objective_of(steps=50))
        return np.abs(np.asarray(factors))[-last:].sum()

    assert size(Flow(), 5) > 20 * size(Flow(), 1)
    assert size(DDPM(), 5) < 10 * size(DDPM(), 1)
    equal = reward._factors(walk(Flow(), steps=50), objective_of(steps=50, equal=True))
    assert len(set(np.abs(np.asarray(equal)).tolist())) == 1


def test_the_distance_and_the_clips_hold_the_student():
    def found(**settings):
        loss, metrics = reward_loss(
            Networks(STUDENT, TEACHER, SIMPLE),
            batch_of(),
            jnp.full(6, 500.0),
            ROWS,
            KEY,
            process=Flow(),
            objective=objective_of(**settings),
        )
        return float(loss), float(metrics["distance"])

    alone, apart = found()
    assert apart > 0
    np.testing.assert_allclose(found(distance=2.0)[0] - alone, 2 * apart, rtol=1e-3)
    assert found(plain=1.0)[0] - alone > 0.1


def test_several_rewards_are_added_and_each_is_in_the_metrics():
    names = f"{HERE}:brightness", NAME
    objective = replace(objective_of(), reward=tuple(zip(names, (1.0, 0.5), strict=True)))
    judge = Judge(Pixels(), dict(zip(names, ((), contrast.load()), strict=True)))
    _, metrics = reward_loss(
        Networks(STUDENT, TEACHER, judge),
        batch_of(),
        jnp.full(6, 500.0),
        ROWS,
        KEY,
        process=Flow(),
        objective=objective,
    )
    first, second = (metrics[f"reward/{name}"] for name in names)
    assert abs(first) > 1e-3 and abs(second) > 1e-3
    np.testing.assert_allclose(metrics["reward"], first + 0.5 * second, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "http://localhost/score"}, "is a server, which has no gradient"),
        ({"chosen": 5, "last": 4}, "use chosen <= last <= steps"),
        ({"decoded": 2}, "has 1"),
        ({"times": (1000.0, 500.0)}, "2 times and steps=6"),
        ({"height": 40}, "32x40|40x32|multiple"),
    ],
)
def test_rewards_that_cannot_train_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(objective_of(), **settings)


def test_a_run_raises_its_reward_resumes_to_the_bits_and_leaves_the_base(vae, tmp_path):
    objective = objective_of(steps=3, times=(1000.0, 700.0, 400.0), chosen=1, last=1)
    config = run_of(tmp_path / "whole", [objective], ADAPTERS)
    settings = {"steps": 4, "learning_rate": 0.05, "end_learning_rate": None}
    stages = (replace(config.stages[0], **settings),)
    config = replace(config, stages=stages)
    save_module(tmp_path / "whole" / "vae", vae)
    taught = Defaults(3, 1.0, (1000.0, 700.0, 400.0))
    (tmp_path / "whole" / "base" / "sampling.json").write_text(taught.text())
    with pytest.raises(ValueError, match=r"stage 'small_t2v', reward: .*nothing"):
        replace(config, stages=(replace(stages[0], objective=objective_of("nothing")),))
    assert train(config) == 0
    part = replace(config, run=str(tmp_path / "run"))
    assert train(replace(part, stages=(replace(stages[0], steps=2),))) == 0
    assert train(part) == 0
    assert losses(part) == losses(config)
    ours, theirs = (flat_weights(load_mmdit(c.run, weights="raw")) for c in (part, config))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    for name, value in flat_weights(load_mmdit(config.init)).items():
        np.testing.assert_array_equal(theirs[name], value, err_msg=name)
    assert of_run(read_meta(config.run)[1]) == taught  # the student is sampled as its teacher
    found = [row["reward"] for row in rows(config)]
    assert found[-1] > found[0], found


@pytest.mark.slow
def test_eight_devices_are_rewarded_as_one(vae, tmp_path):
    objective = objective_of(steps=3, chosen=1, last=2)
    found = []
    for mesh in (MeshConfig(data=8, fsdp=1), MeshConfig(fsdp=2, context=2, tensor=2)):
        folder = tmp_path / str(len(found))
        config = replace(run_of(folder, [objective], ADAPTERS), mesh=mesh)
        save_module(folder / "vae", vae)
        assert train(replace(config, stages=config.stages[:1])) == 0
        found.append([(row["loss"], row["reward"], row["distance"]) for row in rows(config)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-7)
