"""The distillation losses against NumPy, and what theory says of a student that is its teacher."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import flat_weights
from flax import nnx
from small_runs import losses, small_run
from test_lora_training import random_model
from test_step import TINY, make_batch

from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import SHIFT, Flow
from easyanimate_jax.models.lora import LoRAConfig
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.runs.loop import train
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.training.post.distill import guidance_loss, segment_loss
from easyanimate_jax.training.post.objectives import (
    DistributionMatching,
    GuidanceDistillation,
    SegmentDistillation,
)
from easyanimate_jax.training.step import Networks, draw
from easyanimate_jax.weights.defaults import Defaults, of_run
from easyanimate_jax.weights.folder import load_mmdit
from easyanimate_jax.weights.module import save_module
from easyanimate_jax.weights.run_folder import read_meta

KEY, ROWS = jax.random.key(5), jnp.arange(6)
PROCESSES = (Flow(), DDPM())
UNUSED = jnp.zeros(6)
SCALES = {"guidance": 3.0, "guidance_given": 1.5}


class Wave(MMDiT):
    """A network whose prediction is a known function of all that it is given."""

    def __init__(self, gain):
        self.gain = gain

    def __call__(self, x, grid, lengths, time, texts):
        word = texts[0].mean(axis=(1, 2))[:, None, None]
        given = x[..., 64:].sum(axis=-1, keepdims=True)
        return self.gain * x[..., :64] + np.float32(1e-3) * time[:, None, None] + word + given


def batch_of(channels=16):
    batch = jax.tree.map(lambda x: x[0], make_batch(1, 6, lengths=(24, 18, 6), channels=channels))
    batch = batch._replace(weight=np.float32([1, 1, 1, 1, 1, 0]) / 5)
    if batch.condition is not None:
        batch.condition[::2] = 0  # rows without a picture
    rng = np.random.RandomState(1)
    empty = tuple(rng.standard_normal((1, *t.shape[1:])).astype(np.float32) for t in batch.texts)
    return jax.tree.map(jnp.asarray, batch._replace(empty=empty))


def scales_of(batch):
    return np.where((batch.condition != 0).any(axis=(1, 2)), 1.5, 3.0)[:, None, None]


def mean(batch, squares):
    """By loops: over the real tokens of a row, then the weighted sum of rows."""
    rows = [np.mean(squares[row, : batch.lengths[row]]) for row in range(len(squares))]
    return sum(w * value for w, value in zip(batch.weight, rows, strict=True))


def levels(process, time):
    signal, sigma = process.levels(np.asarray(time, np.float64))
    return signal[:, None, None], sigma[:, None, None]


def guided(batch, x, time, gain):
    x = np.concatenate([x, batch.condition], axis=-1)
    network = lambda texts: Wave(gain)(x, None, None, time, texts)  # noqa: E731
    empty = [np.repeat(text, len(x), axis=0) for text in batch.empty]
    uncond, plain = network(empty), network(batch.texts)
    return uncond + scales_of(batch) * (plain - uncond), plain


@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "ddpm"])
def test_guidance_is_distilled_as_by_numpy(process):
    batch, time = batch_of(33), jnp.array([999.0, 700, 400, 200, 50, 1])
    _, latents, noise = draw(batch, ROWS, KEY)
    signal, sigma = levels(process, time)
    x = signal * latents + sigma * noise
    target, plain = guided(batch, x, time, 0.5)
    prediction = Wave(0.25)(np.concatenate([x, batch.condition], -1), None, None, time, batch.texts)
    loss, metrics = guidance_loss(
        Networks(Wave(0.25), Wave(0.5)),
        batch,
        time,
        ROWS,
        KEY,
        process=process,
        objective=GuidanceDistillation(**SCALES),
    )
    np.testing.assert_allclose(loss, mean(batch, (prediction - target) ** 2), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["distance"], mean(batch, (prediction - plain) ** 2), rtol=1e-5
    )


def grid_by_formula(process, count):
    u = 1 - np.arange(count) / count
    flow = 1000 * SHIFT * u / (1 + (SHIFT - 1) * u)
    return flow if isinstance(process, Flow) else np.round(1000 * u) - 1


def moved(process, x, v, time, after):
    """The clean data and the noise that (x, v) say, mixed again at another time."""
    (a, s), (b, r) = levels(process, time), levels(process, after)
    if isinstance(process, Flow):
        clean, noise = x - s * v, x + a * v
    else:
        clean, noise = a * x - s * v, s * x + a * v
    return b * clean + r * noise


@pytest.mark.parametrize("walked", [0.0, 1.0])
@pytest.mark.parametrize("process", PROCESSES, ids=["flow", "ddpm"])
def test_a_segment_is_distilled_as_by_numpy(process, walked, monkeypatch):
    objective = SegmentDistillation(steps=4, substeps=5, walked=walked, **SCALES)
    chosen = jnp.array([0, 1, 2, 3, 3, 1])
    monkeypatch.setattr(
        "easyanimate_jax.training.post.distill._segments",
        lambda rows, key, objective: (chosen, jnp.full(6, walked == 1)),
    )
    batch = batch_of(33)
    _, latents, noise = draw(batch, ROWS, KEY)
    end = np.append(grid_by_formula(process, 20), process.clean_time)
    starts = end[np.array(chosen) * 5]
    signal, sigma = levels(process, starts)
    x = np.array(signal * latents + sigma * noise)
    if walked:
        for row, segment in enumerate(np.array(chosen)):
            own = np.asarray(noise)[row : row + 1]
            for at in range(segment):
                time = np.array([end[at * 5]])
                given = np.concatenate([own, batch.condition[row : row + 1]], -1)
                texts = [t[row : row + 1] for t in batch.texts]
                v = Wave(0.25)(given, None, None, np.float32(time), texts)
                own = moved(process, own, v, time, np.array([end[at * 5 + 5]]))
            x[row] = own[0]
    goal, first = x, None
    for number in range(5):
        at = np.array(chosen) * 5 + number
        v, plain = guided(batch, goal, np.float32(end[at]), 0.5)
        first = plain if first is None else first
        goal = moved(process, goal, v, end[at], end[at + 1])
    given = np.concatenate([x, batch.condition], -1)
    prediction = Wave(0.25)(given, None, None, np.float32(starts), batch.texts)
    ends = end[np.array(chosen) * 5 + 5]
    reached = moved(process, x, prediction, starts, ends)
    factor = moved(process, 0 * x, np.ones_like(x), starts, ends)  # of v in a move
    loss, metrics = segment_loss(
        Networks(Wave(0.25), Wave(0.5)),
        batch,
        UNUSED,
        ROWS,
        KEY,
        process=process,
        objective=objective,
    )
    np.testing.assert_allclose(loss, mean(batch, ((reached - goal) / factor) ** 2), rtol=2e-4)
    np.testing.assert_allclose(
        metrics["distance"], mean(batch, (prediction - first) ** 2), rtol=1e-4
    )


def test_segments_are_drawn_equally_often_and_by_the_row_alone():
    from easyanimate_jax.training.post.distill import _segments

    objective = SegmentDistillation(steps=4, walked=0.25)
    segment, walked = _segments(jnp.arange(4000), KEY, objective)
    counts = np.bincount(segment, minlength=4)
    assert (abs(counts - 1000) < 120).all() and 900 < walked.sum() < 1100
    part, _ = _segments(jnp.arange(1000, 2000), KEY, objective)
    np.testing.assert_array_equal(part, segment[1000:2000])


@pytest.fixture(scope="module")
def model():
    made = MMDiT(TINY, rngs=nnx.Rngs(params=jax.random.key(0)))
    kernel = made.output.linear.kernel
    kernel.set_value(0.1 * jax.random.normal(jax.random.key(1), kernel.get_value().shape))
    return made


def test_a_student_that_is_its_unguided_teacher_has_no_loss_in_one_substep(model):
    for objective, loss in (
        (GuidanceDistillation(guidance=1.0), guidance_loss),
        (SegmentDistillation(substeps=1, guidance=1.0), segment_loss),
    ):
        value, metrics = loss(
            Networks(model, model),
            batch_of(),
            jnp.full(6, 500.0),
            ROWS,
            KEY,
            process=Flow(),
            objective=objective,
        )
        assert float(value) < 1e-10 and float(metrics["distance"]) == 0


def test_gradients_reach_the_student_alone_and_are_those_of_differences(model):
    batch, bias = batch_of(), model.output.linear.bias

    @partial(jax.jit, static_argnames="objective")
    def loss(student, teacher, objective):
        return segment_loss(
            Networks(student, teacher),
            batch,
            UNUSED,
            ROWS,
            KEY,
            process=Flow(),
            objective=objective,
        )[0]

    settings = SegmentDistillation(steps=3, substeps=2, guidance=2.0, walked=0.5)
    _, teacher = jax.grad(loss, argnums=(0, 1))(model, model, settings)
    assert not any(x.any() for x in jax.tree.leaves(teacher))

    settings = replace(settings, walked=0.0)  # the walk is made of the student, without gradient
    graph, weights = nnx.split(model)
    moved = lambda change: nnx.merge(graph, _with(weights, change))  # noqa: E731

    def _with(weights, change):
        weights = jax.tree.map(lambda x: x, weights)
        weights["output"]["linear"]["bias"].set_value(bias.get_value().at[3].add(change))
        return weights

    step = 0.02
    slope = loss(moved(step), model, settings) - loss(moved(-step), model, settings)
    gradient = jax.grad(loss)(model, model, settings).output.linear.bias.get_value()[3]
    np.testing.assert_allclose(gradient, slope / (2 * step), rtol=1e-3)


OBJECTIVES = {
    "guidance": GuidanceDistillation(guidance=2.0),
    "segments": SegmentDistillation(steps=2, substeps=2, guidance=2.0, walked=0.5),
}
ADAPTERS = LoRAConfig(rank=2, alpha=2.0, targets=("attention",))


@pytest.fixture(scope="module", params=["adapters", "whole"])
def config(request, tmp_path_factory):
    """Two updates of each objective; the second stage begins with input channels of its own."""
    lora = ADAPTERS if request.param == "adapters" else LoRAConfig()
    return run_of(tmp_path_factory.mktemp("distill"), OBJECTIVES.values(), lora)


def run_of(folder, objectives, lora):
    """A run of two updates of each objective beside a random model."""
    folder.mkdir(exist_ok=True)
    run = small_run(folder)
    save_module(folder / "base", random_model(run.model, 0))
    stages = tuple(
        replace(stage, objective=objective)
        for stage, objective in zip(run.stages, objectives, strict=False)
    )
    return replace(run, init=f"{folder}/base", lora=lora, frozen="float32", stages=stages)


@pytest.fixture(scope="module")
def finished(config):
    assert train(config) == 0
    return config


def test_a_distilled_run_resumes_to_the_bits(finished, tmp_path):
    part = replace(finished, run=str(tmp_path / "run"))
    first = replace(part, stages=(part.stages[0], replace(part.stages[1], steps=1)))
    assert train(first) == 0
    assert train(part) == 0
    assert losses(part) == losses(finished)
    ours, theirs = (flat_weights(load_mmdit(c.run, weights="raw")) for c in (part, finished))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    with pytest.raises(ValueError, match=r"made with objective of stage .* = .*walked=0.5"):
        stages = part.stages[0], replace(part.stages[1], objective=OBJECTIVES["guidance"])
        train(replace(part, stages=stages))


def test_the_teacher_stays_and_another_one_is_refused(finished):
    base = load_mmdit(finished.init, in_channels=33)
    if finished.adapters:
        kept = flat_weights(load_mmdit(finished.run))
        for name, value in flat_weights(base).items():
            np.testing.assert_array_equal(kept[name], value, err_msg=name)
    save_module(Path(finished.init), random_model(finished.model, 1))
    try:
        with pytest.raises(ValueError, match="was trained beside weights with fingerprint"):
            train(
                replace(
                    finished, stages=(*finished.stages[:-1], replace(finished.stages[-1], steps=3))
                )
            )
    finally:
        save_module(Path(finished.init), random_model(finished.model, 0))


def test_a_critic_cannot_join_a_run_that_began_without_one(finished):
    third = replace(finished.stages[1], name="third", objective=DistributionMatching())
    before = sorted(map(str, Path(finished.run).rglob("*")))
    with pytest.raises(ValueError, match=r"with a critic .* = False, and the config has True"):
        train(replace(finished, stages=(*finished.stages, third)))
    assert sorted(map(str, Path(finished.run).rglob("*"))) == before


@pytest.mark.slow
def test_eight_devices_distil_as_one(finished, tmp_path):
    mesh = MeshConfig(fsdp=2, context=2, tensor=2)
    other = replace(finished, run=str(tmp_path), mesh=mesh)
    assert train(other) == 0
    np.testing.assert_allclose(losses(other), losses(finished), rtol=1e-4)


def test_a_student_is_sampled_at_its_own_steps_from_its_run_alone(finished):
    _, meta = read_meta(finished.run)
    assert of_run(meta) == Defaults(2, 1.0, tuple(Flow().grid(2)))
    assert of_run(read_meta(finished.run, 2)[1]) == Defaults(guidance=1.0)


def test_an_objective_without_a_teacher_is_refused(config):
    with pytest.raises(ValueError, match="whose teacher is `init`, and init is empty"):
        replace(config, init="", lora=LoRAConfig())
    with pytest.raises(ValueError, match="`train` trains a part of the teacher's own weights"):
        replace(config, lora=LoRAConfig(), train=(("blocks.*", 1.0),))
