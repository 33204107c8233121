"""A host reads the rows that its devices hold, and no others; and what was prepared must fit."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from latents import random_latents

from easyanimate_jax.data.records import write_texts
from easyanimate_jax.pods.compile import longest, pod_mesh, suggest_mesh
from easyanimate_jax.prepare.prepare import prompts_key
from easyanimate_jax.runs.batches import held_rows, make_loaders
from easyanimate_jax.runs.config import load
from easyanimate_jax.runs.loop import train
from easyanimate_jax.runs.meshes import stage_meshes
from easyanimate_jax.sharding import make_mesh
from easyanimate_jax.training.program import abstract_batch, batch_shardings, microbatch_rows

PODS = {  # topology -> the mesh of the config that docs/pods.md has for it
    "v5p:4x4x8": {},
    "v5p:8x8x8": {"fsdp": 32, "context": 16},
    "v6e:16x16": {"fsdp": 16, "context": 16},
    "tpu7x:4x4x4": {},
    "2 slices of v5p:4x4x8": {"data": 2},
    "h200:8": {"fsdp": -1, "context": 1},
    "h100:16x8": {},
}
CONFIGS = ("configs/v5_12b.py", "configs/v5_12b_control.py", "configs/tpu_12b.py")


@dataclasses.dataclass(frozen=True, order=True)
class GPU:
    """A device of a host of eight; JAX describes none that is not there."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"


def mesh_of(config, topology: str):
    slices, _, name = topology.rpartition(" slices of ")
    kind, _, size = name.partition(":")
    if kind in ("h200", "h100"):
        count = math.prod(map(int, size.split("x")))
        devices = [GPU(number, number // 8) for number in range(count)]
        return make_mesh(suggest_mesh(config.mesh, count), devices)
    return pod_mesh(config, config.stages[0], name, int(slices or 1))[0]


@pytest.mark.parametrize("topology", PODS)
def test_a_host_reads_the_rows_that_it_holds(topology):
    stages = 0
    for path in CONFIGS:
        config = load(path)
        own = dataclasses.replace(config.mesh, **PODS[topology])
        shared = tuple(dataclasses.replace(stage, mesh=None) for stage in config.stages)
        config = dataclasses.replace(config, mesh=own, stages=shared)
        mesh = mesh_of(config, topology)
        hosts = {device.process_index for device in mesh.devices.flat}
        for stage in config.stages:
            stages += 1
            rows = microbatch_rows(stage, mesh)
            model = dataclasses.replace(config.model, in_channels=stage.in_channels)
            sizes = {"batch_size": stage.batch_size, "microbatch": rows} | longest(config, stage)
            shardings = batch_shardings(mesh, batch := abstract_batch(model, mesh, **sizes))
            read = {host: held_rows(stage, mesh, host) for host in hosts}
            for name in ("mean", "grid", "weight"):
                shape, sharding = getattr(batch, name).shape, getattr(shardings, name)
                held = {host: set() for host in hosts}
                for device, at in sharding.devices_indices_map(shape).items():
                    held[device.process_index] |= set(range(rows)[at[1]])
                assert held == read, (topology, stage.name, name)
    assert stages >= 12


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A config with two sample prompts, and its prepared folder."""
    folder, demo = tmp_path_factory.mktemp("prepared"), load("configs/demo.py")
    random_latents(folder, {"small": (3, 4, 4)}, (8, 12), weights={"text": "print"})
    (stage,) = (stage for stage in demo.stages if stage.data == "small")
    return dataclasses.replace(
        demo,
        prepared=str(folder),
        run=str(folder / "run"),
        text=str(folder / "nowhere"),
        sets=(demo.set("small"),),
        stages=(stage,),
        samples=dataclasses.replace(demo.samples, prompts=("one", "two")),
    )


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (("one", "two"), None),
        (("one", "three"), "holds other sample prompts"),
        (("two", "one"), "holds other sample prompts"),
        (("one", "two", "three"), "holds other sample prompts"),
        (None, "prompts.safetensors is missing"),
    ],
)
def test_a_run_starts_with_the_sample_prompts_that_were_prepared(prepared, encoded, message):
    path, weights = Path(prepared.prepared) / "prompts.safetensors", {"text": "print"}
    path.unlink(missing_ok=True)
    if encoded:
        write_texts(path, (np.zeros((2, 4, 8)),), prompts_key(encoded, weights))
    if message is None:
        make_loaders(prepared, stage_meshes(prepared))
        return
    with pytest.raises(ValueError, match=rf"{message}.*'one', 'two'; run .* prepare"):
        train(prepared)
    assert not Path(prepared.run).exists()
    silent = dataclasses.replace(prepared.samples, every=0)
    make_loaders(dataclasses.replace(prepared, samples=silent), stage_meshes(prepared))


def test_sample_prompts_of_another_text_encoder_or_of_an_earlier_version(prepared):
    path = Path(prepared.prepared) / "prompts.safetensors"
    write_texts(path, (np.zeros((2, 4, 8)),), prompts_key(("one", "two"), {"text": "other"}))
    with pytest.raises(ValueError, match="holds other sample prompts"):
        make_loaders(prepared, stage_meshes(prepared))
    write_texts(path, (np.zeros((2, 4, 8)),))  # they have no key
    make_loaders(prepared, stage_meshes(prepared))
