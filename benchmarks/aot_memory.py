"""Compare the memory that `aot` predicts for a train step with that measured on 8 CPU devices.

Each stage of a config with its own program is compiled as the trainer compiles it, and runs on
arrays of ones in its own process. CPUs have no memory counter, so malloc is asked for the memory in
use: before a step, and every 0.5 ms while steps run. The measured figure is the largest increase
during a step plus the state and the batch, averaged over the devices of the process. Memory that an
XLA program allocates once and keeps, such as its code, does not count. Writes
benchmarks/results/aot_memory.md.

    python benchmarks/aot_memory.py [CONFIG]
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from setting import setting

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "aot_memory.md"
DEVICES = 8
MESHES = ((1, 2, 2, 2), (1, 8, 1, 1))  # data, fsdp, context, tensor
STEPS = 4
FIELDS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class MallInfo(ctypes.Structure):
    """The result of glibc's mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def main(path: str = "configs/demo.py") -> None:
    """Measure every stage of a config, and write the result."""
    from easyanimate_jax.runs.config import load

    config, programs = load(path), {}
    for stage in config.stages:
        tokens = config.set(stage.data).budget.lengths[-1]
        programs.setdefault((tokens, stage.batch_size, stage.in_channels), stage.name)
    lines = [
        f"# Memory of a train step on {DEVICES} CPU devices: predicted, and measured",
        "",
        setting(),
        "",
        f"{path}; MB of one device. Measured is what malloc had given out at most during "
        f"{STEPS} steps, with the state and the batch, a device's share.",
        "",
        "| stage | mesh | state and batch | predicted | measured | measured / predicted |",
        "|---|---|---|---|---|---|",
    ]
    for name in programs.values():
        for mesh in MESHES:
            found = measure_in_a_process(path, name, mesh)
            shape = "x".join(map(str, mesh))
            lines.append(
                f"| {name} | {shape} | {found['arrays'] / 1e6:.1f} "
                f"| {found['predicted'] / 1e6:.1f} | {found['measured'] / 1e6:.1f} "
                f"| {found['measured'] / found['predicted']:.2f} |"
            )
            print(lines[-1], flush=True)
    RESULT.write_text("\n".join([*lines, ""]))


def measure_in_a_process(path: str, stage: str, mesh: tuple[int, ...]) -> dict:
    """Return the result of `measure`, run in a new process."""
    command = [sys.executable, __file__, "--measure", path, stage, *map(str, mesh)]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    ran = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def measure(path: str, name: str, *mesh: str) -> None:
    """Print the predicted and the measured bytes of one device as JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from easyanimate_jax.pods.compile import longest
    from easyanimate_jax.runs.config import load
    from easyanimate_jax.sharding import MeshConfig, make_mesh
    from easyanimate_jax.training.compile import compile_stage
    from easyanimate_jax.training.program import abstract_batch, abstract_state, microbatch_rows

    config, mesh = load(path), make_mesh(MeshConfig(*map(int, mesh)))
    stage = next(s for s in config.stages if s.name == name)
    sizes = longest(config, stage)
    report, program = compile_stage(config.step, stage, mesh, memory=sys.maxsize, **sizes)
    settings = config.step.with_channels(stage.in_channels)
    with jax.set_mesh(mesh):
        make, placed, _ = abstract_state(settings, mesh)
        rows = microbatch_rows(stage, mesh)
        batch = abstract_batch(
            settings.model, mesh, batch_size=stage.batch_size, microbatch=rows, **sizes
        )
        batch = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), batch)
        state = jax.jit(make, out_shardings=placed)(jax.random.key(0))

        def step(state):
            state, metrics = program(state, batch, jax.random.key(1), jnp.float32(1e-4))
            return jax.block_until_ready((state, metrics))[0]

        state = step(state)  # the first step allocates memory that is kept
        gc.collect()
        time.sleep(1)
        with Watch() as watch:
            for _ in range(STEPS):
                state = step(state)
    parts = [s.data.nbytes for x in jax.tree.leaves((state, batch)) for s in x.addressable_shards]
    found = {
        "arrays": sum(parts) / DEVICES,
        "predicted": report.peak_bytes_per_chip,
        "measured": (sum(parts) + watch.most - watch.before) / DEVICES,
    }
    print(json.dumps(found))


class Watch:
    """A thread that repeatedly asks malloc for the memory in use."""

    def __init__(self):
        self.mallinfo = ctypes.CDLL(None).mallinfo2
        self.mallinfo.restype = MallInfo
        self.before = self.most = self.in_use()

    def in_use(self) -> int:
        info = self.mallinfo()
        return info.hblkhd + info.uordblks

    def __enter__(self):
        self.watching = True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.watching = False
        self.thread.join()

    def _look(self) -> None:
        while self.watching:
            self.most = max(self.most, self.in_use())
            time.sleep(0.0005)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
