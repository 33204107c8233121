"""Held-out clips: never trained on, and a loss that depends on the weights alone."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from fakes import TINY_VAE
from flax import nnx
from small_runs import DEMO, losses, rows, small_run

from easyanimate_jax.data.held_out import HeldOut, places
from easyanimate_jax.data.loader import Batch, Loader
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.tasks import TASKS
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.runs.batches import held_out_loaders, make_loaders
from easyanimate_jax.runs.config import SampleConfig, ValidationConfig
from easyanimate_jax.runs.loop import train
from easyanimate_jax.runs.meshes import stage_meshes
from easyanimate_jax.runs.samples import Sampler
from easyanimate_jax.runs.validation import loss_program, losses_of
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.training.program import abstract_state
from easyanimate_jax.weights.module import save_module

CLIPS = SampleConfig(clips=2, every=2, steps=2, guidance=2.0)
HELD = ValidationConfig(share=0.77, every=2, clips=3, times=4)
MESHES = (
    MeshConfig(data=8, fsdp=1),
    MeshConfig(fsdp=2, context=2, tensor=2),
    MeshConfig(fsdp=8),
    MeshConfig(data=2, fsdp=4),
    MeshConfig(context=8, fsdp=1),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four updates with a start picture, and three of five clips held out."""
    run = small_run(tmp_path_factory.mktemp("validation"))
    stage = replace(run.stages[1], steps=4, end_learning_rate=None)
    save_module(run.vae, jax.jit(lambda: CausalVAE(TINY_VAE, rngs=nnx.Rngs(0)))())
    return replace(run, validation=HELD, stages=(stage,), samples=CLIPS)


@pytest.fixture(scope="module")
def whole(config):
    assert train(config) == 0
    return config


def index(count):
    names = np.array([f"film{i // 3}.mp4#{i % 3 * 50}-{i % 3 * 50 + 49}" for i in range(count)])
    tokens = np.random.default_rng(0).choice([5, 10], count).astype(np.int32)
    sides = {name: np.full(count, 512, np.int32) for name in ("source_height", "source_width")}
    return {"clip": names, "kind": np.full(count, "video"), "tokens": tokens} | sides


def test_no_held_out_clip_is_in_any_batch_of_three_epochs():
    records = index(900)
    settings = {"lengths": (5, 10), "batch_size": 8, "seed": 0, "name": "s"}
    plan = Plan(records, **settings, held_out=0.1)
    trained = {int(i) for step in range(3 * 900 // 8) for i in plan(step)[1]}
    held = HeldOut(records, **settings, share=0.1, most=900).ids.tolist()
    assert not trained & set(held) and len(trained) + len(held) == 900
    assert 0.05 < len(held) / 900 < 0.15
    films = [{records["clip"][i].split("#")[0] for i in ids} for ids in (trained, held)]
    assert not films[0] & films[1]


def test_the_side_of_a_clip_does_not_depend_on_the_others():
    names = index(90)["clip"]
    all_of_them = places({"clip": names})
    np.testing.assert_array_equal(all_of_them[10:20], places({"clip": names[10:20]}))
    np.testing.assert_array_equal(all_of_them, places({"clip": names.astype("S")}))
    one, span = (places({"clip": np.array([name])})[0] for name in ("a.mp4", "a.mp4#0-49"))
    assert one == span


def test_a_run_validates_at_the_borders_of_a_stage_and_between(whole):
    found = [(row["step"], row["stage"], row["weights"]) for row in rows(whole, "validation")]
    kinds = ("trained", "averaged")
    assert found == [(step, "medium_i2v", name) for step in (0, 2, 4) for name in kinds]
    for row in rows(whole, "validation"):
        assert row["clips"] == len(HeldOutNames) and len(row["by_time"]) == 4
        assert np.mean(row["by_time"]) == pytest.approx(row["loss"], rel=1e-5)
    first, later = (row["loss"] for row in rows(whole, "validation")[:3:2])
    assert first != later
    seconds = rows(whole, "goodput")[-1]["seconds"]
    assert seconds["validate"] > 0


SHARES = places({"clip": np.array([f"{n}.mp4" for n in range(5)])})
HeldOutNames = np.flatnonzero(HELD.share > SHARES).tolist()[: HELD.clips]


def test_training_has_the_same_bits_without_validation(whole, tmp_path):
    none = replace(HELD, every=0)
    other = replace(whole, run=str(tmp_path), validation=none)
    assert train(other) == 0
    assert losses(other) == losses(whole) and not (tmp_path / "validation.jsonl").exists()


def test_held_out_clips_are_made_again_beside_the_true_ones(whole):
    folder = Path(whole.run) / "samples"
    names = {f"{step:07d}_clips.{end}" for step in (2, 4) for end in ("npz", "png")}
    assert {path.name for path in folder.iterdir()} == names
    first, second = (np.load(folder / f"{step:07d}_clips.npz") for step in (2, 4))
    np.testing.assert_array_equal(first["true"], second["true"])
    assert first["true"].shape == first["videos"].shape == (2, 9, 128, 128, 3)
    assert (first["videos"] != second["videos"]).any()  # by other weights
    for videos in (first["true"], second["videos"]):
        assert (videos[0] != videos[1]).any()
    (events,) = (Path(whole.run) / "tensorboard").iterdir()
    assert b"held-out i2v/1" in events.read_bytes() and b"GIF89a" in events.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[:2])
@pytest.mark.parametrize("task", ["t2v", "control", "camera_ref"])
def test_what_a_task_gives_reaches_the_samples_on_any_mesh(config, task, mesh, tmp_path):
    """Videos of the same weights, noise and condition are equal on two meshes.

    The run begins on another mesh, so the autoencoder has to move.
    """
    stage, mesh = replace(config.stages[0], task=task, name="later"), make_mesh(mesh)
    meshes = {config.stages[0].name: make_mesh(MESHES[2]), stage.name: mesh}
    rng, extra = np.random.default_rng(0), 4 * sum(TASKS[task].holds.values())

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float16)

    batch = Batch(
        mean=draw(1, 8, 16, 64),
        logvar=draw(1, 8, 16, 64),
        grid=np.full((1, 8, 3), (1, 4, 4), np.int32),
        lengths=np.full((1, 8), 16, np.int32),
        texts=(draw(1, 8, 4, 8), draw(1, 8, 3, 12)),
        condition=draw(1, 8, 16, extra) if extra else None,
        weight=np.ones((1, 8)),
    )
    plan = HeldOut(
        index(8) | {"tokens": np.full(8, 16)},
        lengths=(16,),
        batch_size=8,
        seed=0,
        name="s",
        share=0.99,
        most=5,
    )
    loader = Mock(spec=Loader, plan=plan)
    loader.batch.return_value = 16, batch
    with jax.set_mesh(mesh):
        step = config.step.with_channels(stage.in_channels)
        make, placed, _ = abstract_state(step, mesh)
        model = jax.jit(make, out_shardings=placed)(jax.random.key(3)).model
        sampler = Sampler(replace(config, run=str(tmp_path)), meshes, {stage.name: loader})
        sampler.writer = SimpleNamespace(film=lambda *args: None)
        sampler(stage, model, 4)
    found = np.load(tmp_path / "samples" / "0000004_clips.npz")
    assert found["videos"].shape == (2, 1, 64, 64, 3)
    first = SAMPLES.setdefault(task, found["videos"].astype(int))
    assert np.abs(found["videos"] - first).max() <= 2


SAMPLES: dict[str, np.ndarray] = {}  # of each task, on the first mesh


@pytest.mark.slow
def test_a_resumed_run_has_each_validation_once(whole, tmp_path):
    """It was killed after the checkpoint at the end of a stage, before its validation was whole."""
    again = replace(whole, run=str(tmp_path / "run"))
    assert train(replace(again, stages=(replace(whole.stages[0], steps=2),))) == 0
    path = tmp_path / "run" / "validation.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-1][:20])
    assert train(again) == 0
    ours, theirs = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(c, "validation")]
        for c in (again, whole)
    )
    assert ours == theirs


@pytest.mark.parametrize("meshes", [MESHES[:2], pytest.param(MESHES, marks=pytest.mark.slow)])
def test_the_loss_is_the_same_on_any_mesh(config, meshes):
    stage, found = config.stages[0], []
    for mesh in map(make_mesh, meshes):
        step = config.step.with_channels(stage.in_channels)
        step = step._replace(model=replace(step.model, dtype="float32"))
        make, placed, _ = abstract_state(step, mesh)
        own = {one.name: mesh for one in config.stages}
        loaders = held_out_loaders(config, own, make_loaders(config, own))
        exact = replace(config, model=step.model)
        with jax.set_mesh(mesh):
            state = jax.jit(make, out_shardings=placed)(jax.random.key(3))
            program = partial(loss_program(exact, mesh), state.model, state.frozen)
            losses, _ = losses_of(loaders[stage.name], mesh, {"trained": program})
        found.append(losses["trained"])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-6)


def test_times_are_the_middles_of_equal_shares_of_the_training_times():
    for process in (Flow(train_shift=6.0), Flow(time="logit_normal"), DEMO.process):
        drawn = np.sort(process.sample_time(jax.random.key(0), (100_000,)))[::-1]
        times = process.time_of(jax.numpy.arange(0.05, 1, 0.1))
        np.testing.assert_allclose(times, drawn[5_000::10_000], atol=8)


def test_a_share_without_a_clip_is_refused_before_anything_is_written(config, tmp_path):
    none = replace(config, run=str(tmp_path / "run"), validation=replace(HELD, share=1e-9))
    with pytest.raises(ValueError, match=r"none of 5 clips is held out by .*share=1e-09") as told:
        train(none)
    assert not (tmp_path / "run").exists()
    share = float(re.search(r"use ([\d.]+) or more", str(told.value))[1])
    validation = replace(none.validation, share=share)
    meshes = stage_meshes(config)
    loaders = held_out_loaders(
        replace(config, validation=validation), meshes, make_loaders(config, meshes)
    )
    assert all(len(loader.plan.ids) == 1 for loader in loaders.values())
