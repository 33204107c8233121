"""Held-out clips: never trained on, and a loss that depends on the weights alone."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from small_runs import DEMO, losses, rows, small_run

from easyanimate_jax.data.held_out import HeldOut, places
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.runs.batches import held_out_loaders, make_loaders
from easyanimate_jax.runs.config import ValidationConfig
from easyanimate_jax.runs.loop import train
from easyanimate_jax.runs.validation import Validator
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.training.program import abstract_state

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
    return replace(run, validation=HELD, stages=(stage,))


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
    np.testing.assert_array_equal(places(names)[10:20], places(names[10:20]))
    np.testing.assert_array_equal(places(names), places(names.astype("S")))
    assert places(np.array(["a.mp4"]))[0] == places(np.array(["a.mp4#0-49"]))[0]


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


HeldOutNames = [n for n in range(5) if places(np.array([f"{n}.mp4"]))[0] < HELD.share][: HELD.clips]


def test_training_has_the_same_bits_without_validation(whole, tmp_path):
    none = replace(HELD, every=0)
    other = replace(whole, run=str(tmp_path), validation=none)
    assert train(other) == 0
    assert losses(other) == losses(whole) and not (tmp_path / "validation.jsonl").exists()


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
        loaders = held_out_loaders(config, mesh, make_loaders(config, mesh))
        exact = replace(config, model=step.model)
        with jax.set_mesh(mesh):
            state = jax.jit(make, out_shardings=placed)(jax.random.key(3))
            validator = Validator(exact, mesh, loaders)
            made = []
            validator._row = lambda *args, made=made: made.append(args[3])
            validator(stage, state, 4)
        found.append(made[0])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-6)


def test_times_are_the_middles_of_equal_shares_of_the_training_times():
    for process in (Flow(train_shift=6.0), Flow(time="logit_normal"), DEMO.process):
        drawn = np.sort(process.sample_time(jax.random.key(0), (100_000,)))[::-1]
        times = process.time_of(jax.numpy.arange(0.05, 1, 0.1))
        np.testing.assert_allclose(times, drawn[5_000::10_000], atol=8)


def test_a_share_without_a_clip_is_refused_before_anything_is_written(config, tmp_path):
    none = replace(config, run=str(tmp_path / "run"), validation=replace(HELD, share=1e-9))
    with pytest.raises(ValueError, match=r"none of 5 clips is held out by validation\.share=1e-09"):
        train(none)
    assert not (tmp_path / "run").exists()
