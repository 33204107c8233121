"""Stages with meshes and kept activations of their own, in one run; eight devices.

The second stage's mesh has the devices in another order, as meshes of different axes have on a TPU.
"""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_runs import losses, rows, small_run

from easyanimate_jax import sharding
from easyanimate_jax.runs import doctor, loop, programs
from easyanimate_jax.runs.config import ValidationConfig
from easyanimate_jax.runs.meshes import stage_meshes
from easyanimate_jax.sharding import MeshConfig, make_mesh, moved
from easyanimate_jax.weights.run_folder import read_meta

ROWS, TOKENS = MeshConfig(data=2, fsdp=4), MeshConfig(fsdp=4, context=2)
FIRST, SECOND = {"mesh": ROWS, "save": ("attention",)}, {"mesh": TOKENS, "save": ("mlp",)}


@pytest.fixture(scope="module", autouse=True)
def other_order():
    """Meshes that split tokens have the devices backwards."""
    made = sharding.mesh_utils.create_device_mesh

    def create(shape, devices, **options):
        return made(shape, devices if shape[2] == 1 else devices[::-1], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.mesh_utils, "create_device_mesh", create)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two updates of each stage; the second has more channels, and four rows at once."""
    config = small_run(tmp_path_factory.mktemp("meshes"))
    one, two = config.stages
    stages = replace(one, microbatch=8, **FIRST), replace(two, microbatch=4, **SECOND)
    held = ValidationConfig(share=0.6, clips=4, times=2, every=1)
    kept = {"save_every": 1, "keep_every": 1, "validation": held, "samples": config.samples}
    return replace(config, stages=stages, mesh=MeshConfig(), **kept)


def go(config, name: str, **changes):
    """Train a run in a folder of its own."""
    config = replace(config, run=str(Path(config.run).parent / name), **changes)
    assert loop.train(config) == 0
    return config


def result(config):
    """All that a run made: the bits of its last state, its losses and those of held-out clips."""
    held = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(config, "validation")]
    return read_meta(Path(config.run))[1]["arrays"], losses(config), held


@pytest.fixture(scope="module")
def reports():
    """What was compiled for the run without a stop."""
    return []


@pytest.fixture(scope="module")
def whole(config, reports):
    compiles = programs.compile_stage

    def compile_stage(*args, **options):
        report, program = compiles(*args, **options)
        reports.append(report)
        return report, program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "compile_stage", compile_stage)
        return go(config, "whole")


def test_each_stage_is_compiled_once_for_its_own_mesh_and_with_its_own_kept_activations(
    whole, reports
):
    found = [(report.name, MeshConfig(**report.mesh), report.save) for report in reports]
    assert found == [(stage.name, stage.mesh, stage.save) for stage in whole.stages]


def test_the_bits_are_those_of_a_run_that_is_stopped_between_the_stages_and_gets_the_other_mesh(
    config, whole
):
    stages = tuple(replace(stage, mesh=None, save=None) for stage in config.stages)
    first, second = (
        {"mesh": own["mesh"], "model": replace(config.model, save=own["save"])}
        for own in (FIRST, SECOND)
    )
    go(config, "stopped", stages=stages[:1], **first)
    stopped = go(config, "stopped", stages=stages, **second)
    assert result(stopped) == result(whole)


@pytest.mark.parametrize("kept", [pytest.param(3, marks=pytest.mark.slow), 2])
def test_a_run_that_is_killed_in_the_second_stage_or_at_its_start_ends_in_the_same_bits(
    config, whole, kept
):
    """The newest checkpoint is one of the second stage, or the last one of the first stage."""
    name = f"killed{kept}"
    run = Path(whole.run).with_name(name)
    shutil.copytree(whole.run, run)
    for step in range(kept + 1, 5):
        shutil.rmtree(run / "checkpoints" / str(step))
    assert result(go(config, name)) == result(whole)


@pytest.mark.slow
def test_a_step_of_each_stage_is_made_again_by_a_replay(whole):
    for step in (1, 2, 3):
        assert loop.replay(whole, step) == 0


def bytes_of(arrays) -> int:
    """The bytes of arrays on all devices."""
    return sum(8 * math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


@pytest.mark.parametrize("to", [TOKENS, MeshConfig(fsdp=2, tensor=4)])
def test_arrays_move_one_after_the_other_and_memory_never_holds_two_trees(to, monkeypatch):
    """To a mesh with another order of the devices, and to one with the same order."""
    specs = {"both": ("fsdp", ("context", "tensor")), "one": ("fsdp",), "none": ()}
    values = {
        f"{name}{i}": np.random.default_rng(i).normal(size=(64, 64)).astype(np.float32)
        for name in specs
        for i in range(4)
    }

    def placed(axes: MeshConfig):
        mesh = make_mesh(axes)
        return {n: NamedSharding(mesh, PartitionSpec(*specs[n[:-1]])) for n in values}

    wait, others, held = jax.block_until_ready, set(map(id, jax.live_arrays())), []

    def look(x):
        held.append(bytes_of(x for x in jax.live_arrays() if id(x) not in others))
        return wait(x)

    tree = wait(jax.device_put(values, placed(ROWS)))
    most = max(bytes_of(tree.values()), bytes_of(jax.device_put(values, placed(to)).values()))
    monkeypatch.setattr(jax, "block_until_ready", look)
    with jax.transfer_guard("disallow"):  # nothing passes through the host
        there = moved(tree, placed(to))
    assert all(x.is_deleted() for x in tree.values())
    assert {name: x.sharding for name, x in there.items()} == placed(to)
    for name, value in values.items():
        np.testing.assert_array_equal(there[name], value)
    assert len(held) == len(values) and max(held) <= most + bytes_of([there["none0"]]), held


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"mesh": MeshConfig(fsdp=3)}, "asks for 3 devices, and there are 8"),
        ({"mesh": MeshConfig(context=8)}, "20 does not split into 8 shards over mesh axes"),
        ({"mesh": ROWS, "batch_size": 4}, "8 groups of devices have different rows.* batch has 4"),
    ],
)
def test_a_mesh_that_a_later_stage_cannot_have_is_refused_before_anything_is_made(
    config, own, message
):
    model = replace(config.model, time_width=20)
    stages = config.stages[0], replace(config.stages[1], **own)
    bad = replace(config, model=model, stages=stages, run=f"{config.run}_refused")
    with pytest.raises(ValueError, match=rf"stage 'medium_i2v', stages.1.mesh: .*{message}"):
        loop.train(bad)
    assert not Path(bad.run).exists()
    (found,) = doctor.fits(bad)
    assert not found.good and message.split(",")[0].split(".")[0] in found.what


def test_the_doctor_looks_at_the_mesh_of_each_stage(config):
    mesh = doctor.fits(config)[0]
    assert mesh.good and mesh.what == (
        "data 2 x fsdp 4 x context 1 x tensor 1 in small_t2v; "
        "data 1 x fsdp 4 x context 2 x tensor 1 in medium_i2v"
    )


def test_equal_meshes_are_one(config):
    stages = tuple(replace(stage, mesh=ROWS) for stage in config.stages)
    one, two = stage_meshes(replace(config, stages=stages)).values()
    assert one is two
