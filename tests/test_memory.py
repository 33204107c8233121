"""What a device holds, and what a program takes of it before it runs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easyanimate_jax import memory


def test_arrays_in_use_count_their_part_of_a_device():
    before = memory.memory_in_use()
    whole = jnp.zeros(2**20, jnp.uint8)
    mesh = Mesh(np.array(jax.devices()), "x")
    part = jax.device_put(np.zeros(2**23, np.uint8), NamedSharding(mesh, PartitionSpec("x")))
    assert memory.memory_in_use() - before == whole.nbytes + part.nbytes // 8
    del whole, part
    assert memory.memory_in_use() == before


@pytest.mark.parametrize(
    "line, files, limits",
    [
        ("0::/", {"memory.max": "8000000000"}, [8_000_000_000]),
        ("0::/", {"memory.max": "max"}, []),
        ("0::/a/b", {"a/memory.max": "5", "a/b/memory.max": "7", "memory.max": "max"}, [7, 5]),
        ("0::/of/the/host", {"memory.max": "6"}, [6]),
        ("9:cpu,memory:/job", {"memory/job/memory.limit_in_bytes": "4"}, [4]),
        ("9:cpu:/job", {"job/memory.max": "4"}, []),
    ],
)
def test_a_control_group_limits_the_memory(tmp_path, monkeypatch, line, files, limits):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "own").write_text(f"3:pids:/x\n{line}\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    assert memory._group_limits(tmp_path / "own") == limits
    assert memory._group_limits(tmp_path / "none") == []


def test_the_smallest_limit_counts_and_a_part_is_left_for_the_process(monkeypatch):
    whole = memory.host_memory()
    devices = jax.local_device_count()
    assert memory.device_memory() == (whole - memory.OWN) // devices
    monkeypatch.setattr(memory, "_own_limits", lambda: [8 * 10**9, whole + 1])
    monkeypatch.setattr(memory, "_group_limits", lambda: [9 * 10**9])
    assert memory.host_memory() == 8 * 10**9
    assert memory.device_memory() == 6_500_000_000 // devices
    monkeypatch.setattr(memory, "_own_limits", lambda: [10**9])
    assert memory.device_memory() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit is of Unix")
def test_a_limit_of_the_shell_is_found():
    code = "from easyanimate_jax import memory; print(memory.host_memory())"
    words = ["bash", "-c", f"ulimit -v 6000000; exec {sys.executable} -c '{code}'"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(found.stdout) == 6_000_000 * 1024


def test_a_program_is_compiled_once_and_refused_before_it_runs(monkeypatch, caplog):
    ran, compiled = [], []

    @jax.jit
    def outer(x):
        jax.debug.callback(lambda: ran.append(1))
        return jnp.outer(x, x)

    def count(event, *_, **__):
        compiled.append(event) if "backend_compile" in event else None

    jax.monitoring.register_event_duration_secs_listener(count)
    x = np.ones(2048, np.float32)  # 8 KiB in, 16 MiB out
    caplog.set_level("INFO")
    try:
        memory.check_fit("an outer product", outer, jax.ShapeDtypeStruct(x.shape, x.dtype))
        memory.check_fit("an outer product", outer, x)
        assert not ran and len(compiled) == 1
        outer(x).block_until_ready()
        jax.effects_barrier()
        assert ran and len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    for record in caplog.records:
        assert record.message.startswith("an outer product takes 0.02 GB of a device's ")
    assert [record.once for record in caplog.records] == 2 * ["an outer product"]

    held = jnp.zeros(2**25, jnp.uint8)
    room = memory.memory_in_use() + 2**24
    monkeypatch.setattr(memory, "device_memory", lambda: room)
    with pytest.raises(ValueError, match=r"an outer product takes .* fewer frames"):
        memory.check_fit("an outer product", outer, x)  # PACKED is missing
    monkeypatch.setattr(memory, "device_memory", lambda: room + memory.PACKED)
    memory.check_fit("an outer product", outer, x)
    del held
