"""Compare the memory and time that `aot` predicts for a train step with a real GPU.

The step is that of `train.py`, with blocks of the 12B at full width and a float32 state and
average. Memory is given three times: by the model that `aot` uses for absent GPUs, by the compiler,
as `train.py` asks it at its start, and by the device's own counter. Seconds are those of the model
and the median of the measured steps. Without a GPU a narrow model runs on the CPU, only to check
the script. Writes benchmarks/results/aot_gpu.md.

    python benchmarks/aot_gpu.py
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from setting import setting

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "aot_gpu.md"
# blocks, heads of 64, video tokens, rows of a batch, of a microbatch
LARGE = ((8, 48, 3584, 8, 8), (4, 48, 53248, 1, 1))
SMALL = ((2, 2, 256, 2, 1),)
STEPS = 4


def main() -> None:
    """Measure all cases in processes of their own, and write the result."""
    import jax

    there = jax.default_backend() == "gpu"
    lines = [
        "# A train step on a GPU: by aot, and measured",
        "",
        f"{setting()[:-1]}; jax {jax.__version__}.",
        "",
        "| blocks | tokens | batch | GB: model | compiler | measured | measured / model "
        "| seconds: model | measured | measured / model | device |",
        "|---" * 11 + "|",
    ]
    for case in LARGE if there else SMALL:
        ran = subprocess.run(
            [sys.executable, __file__, *map(str, case)],
            env=os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"},
            stdout=subprocess.PIPE,
            text=True,
        )
        if ran.returncode:
            continue
        found = json.loads(ran.stdout.splitlines()[-1])
        blocks, _, tokens, batch, microbatch = case
        memory, seconds = found["memory"], found["seconds"]
        lines.append(
            f"| {blocks} | {tokens}+333 | {batch // microbatch} x {microbatch} "
            f"| {' | '.join(f'{x / 1e9:.2f}' for x in memory)} | {memory[2] / memory[0]:.2f} "
            f"| {' | '.join(f'{x:.3f}' for x in seconds)} | {seconds[1] / seconds[0]:.2f} "
            f"| {found['device']} |"
        )
        print(lines[-1], flush=True)
    RESULT.write_text("\n".join([*lines, ""]))


def measure(blocks: int, heads: int, tokens: int, batch: int, microbatch: int) -> None:
    """Print memory (model, compiler, measured) and seconds (model, measured) as JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from easyanimate_jax.pods.compile import longest
    from easyanimate_jax.pods.gpu import model_step
    from easyanimate_jax.runs.config import load
    from easyanimate_jax.sharding import MeshConfig, make_mesh
    from easyanimate_jax.training.compile import compile_stage
    from easyanimate_jax.training.program import abstract_batch, abstract_state

    config = load(str(ROOT / "configs" / "v5_12b.py"))
    size = {"depth": blocks, "mmdit_depth": blocks, "heads": heads}
    model = dataclasses.replace(config.model, **size)
    config = dataclasses.replace(config, model=model)
    stage = dataclasses.replace(config.stages[2], batch_size=batch, microbatch=microbatch)
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    sizes = longest(config, stage) | {"tokens": tokens}
    report, program = compile_stage(config.step, stage, mesh, memory=sys.maxsize, **sizes)
    settings = config.step.with_channels(stage.in_channels)
    with jax.set_mesh(mesh):
        make, placed, _ = abstract_state(settings, mesh)
        shapes = abstract_batch(
            settings.model, mesh, batch_size=batch, microbatch=microbatch, **sizes
        )

        def fill(x):
            value = tokens if x.dtype == jnp.int32 else 0.5
            return jax.device_put(np.full(x.shape, value, x.dtype), x.sharding)

        data = jax.tree.map(fill, shapes)
        state = jax.jit(make, out_shardings=placed)(jax.random.key(0))
        seconds = []
        for _ in range(1 + STEPS):
            began = time.perf_counter()
            state, metrics = program(state, data, jax.random.key(1), jnp.float32(1e-4))
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
    counted = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    modelled = model_step(config, stage, "h200:1", tokens=tokens)
    found = {
        "memory": (modelled.peak_bytes_per_chip, report.peak_bytes_per_chip, counted),
        "seconds": (modelled.predicted_step_seconds, statistics.median(seconds[1:])),
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(*map(int, sys.argv[1:]))
    else:
        main()
