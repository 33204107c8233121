"""What a device holds, and what a program takes of it before it runs."""

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
