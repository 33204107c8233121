"""A host reads the rows that its devices hold, and no others: for the pods of docs/pods.md."""

import dataclasses

import pytest

from easyanimate_jax.pods.compile import longest, pod_mesh
from easyanimate_jax.runs.batches import held_rows
from easyanimate_jax.runs.config import load
from easyanimate_jax.training.program import abstract_batch, batch_shardings, microbatch_rows

PODS = {  # topology -> the mesh of the config that docs/pods.md has for it
    "v5p:4x4x8": {},
    "v5p:8x8x8": {"fsdp": 32, "context": 16},
    "v6e:16x16": {"fsdp": 16, "context": 16},
    "tpu7x:4x4x4": {},
}
CONFIGS = ("configs/v5_12b.py", "configs/v5_12b_control.py", "configs/tpu_12b.py")


@pytest.mark.parametrize("topology", PODS)
def test_a_host_reads_the_rows_that_it_holds(topology):
    stages = 0
    for path in CONFIGS:
        config = load(path)
        own = dataclasses.replace(config.mesh, **PODS[topology])
        config = dataclasses.replace(config, mesh=own)
        mesh, _ = pod_mesh(config, topology)
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
