"""Compare all choices of kept activations and microbatches, and those that "auto" makes.

Each choice is compiled for this machine and timed, in turns. Then the memory is limited to that of
each choice, and `choose` looks for the fastest that fits. Writes benchmarks/results/kept.md.

    python benchmarks/kept.py [--depth 6] [--width 256] [--tokens 1024] [--rows 4] [--rounds 3]
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from setting import setting

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from configs.demo import config as demo  # noqa: E402
from easyanimate_jax.sharding import MeshConfig, make_mesh  # noqa: E402
from easyanimate_jax.training.auto import Choice, choices, choose  # noqa: E402
from easyanimate_jax.training.compile import StageReport, compile_stage  # noqa: E402
from easyanimate_jax.training.program import abstract_batch, abstract_state  # noqa: E402

RESULT = Path(__file__).parent / "results" / "kept.md"
TEXTS = (32, 32)  # text tokens of each encoder
HEAD = 64  # width of a head


class Case:
    """A stage on one device, its choices, and their compiled steps."""

    def __init__(self, depth: int, width: int, tokens: int, rows: int):
        size = {"depth": depth, "mmdit_depth": depth, "heads": width // HEAD, "head_width": HEAD}
        model = dataclasses.replace(demo.model, **size, save="auto")
        self.config = demo.step._replace(model=model)
        self.stage = dataclasses.replace(demo.stages[2], batch_size=rows, microbatch="auto")
        self.mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
        self.tokens, self.reports, self.programs = tokens, {}, {}
        with jax.set_mesh(self.mesh):
            sizes = self.stage, self.mesh, tokens, sum(TEXTS)
            self.choices = choices(self.config, *sizes)

    def compile(self, choice: Choice) -> None:
        """Compile the step of a choice, without a limit of memory."""
        options = {"tokens": self.tokens, "text_lengths": TEXTS, "memory": sys.maxsize}
        report, program = compile_stage(self.config, choice.apply(self.stage), self.mesh, **options)
        self.reports[choice], self.programs[choice] = report, program

    def seconds(self, choice: Choice) -> float:
        """Return the seconds of one step, of a state that is made for it."""
        stage = choice.apply(self.stage)
        settled = self.config.of_stage(stage)
        with jax.set_mesh(self.mesh):
            make, placed, _ = abstract_state(settled, self.mesh)
            state = jax.jit(make, out_shardings=placed)(jax.random.key(0))
            shapes = abstract_batch(
                settled.model,
                self.mesh,
                batch_size=stage.batch_size,
                microbatch=stage.microbatch,
                tokens=self.tokens,
                text_lengths=TEXTS,
            )
            batch = jax.tree.map(self._filled, shapes)
            jax.block_until_ready((state, batch))
            began = time.perf_counter()
            done = self.programs[choice](state, batch, jax.random.key(1), jnp.float32(1e-4))
            jax.block_until_ready(done)
            return time.perf_counter() - began

    def _filled(self, x) -> jax.Array:
        value = self.tokens if x.dtype == jnp.int32 else 0.5
        return jax.device_put(np.full(x.shape, value, x.dtype), x.sharding)

    def chosen(self, memory: int) -> Choice:
        """Return the choice of a device with so many bytes."""

        def report(choice: Choice) -> StageReport:
            found = self.reports[choice]
            fits = found.peak_bytes_per_chip <= memory
            return dataclasses.replace(found, hbm_bytes=memory, fits=fits)

        with jax.set_mesh(self.mesh):
            texts = sum(TEXTS)
            return choose(self.config, self.stage, self.mesh, self.tokens, texts, report)[0]


def main() -> None:
    """Measure all choices, and write the table."""
    p = argparse.ArgumentParser(description=__doc__)
    numbers = (("depth", 6), ("width", 256), ("tokens", 1024), ("rows", 4), ("rounds", 3))
    for name, value in numbers:
        p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    case = Case(a.depth, a.width, a.tokens, a.rows)
    times = {choice: [] for choice in case.choices}
    for choice in case.choices:
        case.compile(choice)
    for number in range(1 + a.rounds):  # the first round warms up
        for choice in case.choices:
            spent = case.seconds(choice)
            times[choice] += [spent] if number else []
    middle = {choice: statistics.median(spent) for choice, spent in times.items()}
    lines = [
        "# Kept activations and microbatches: all choices, and what auto takes",
        "",
        setting(),
        "",
        f"Width {a.width}, {a.depth} blocks, float32, {a.rows} rows of {a.tokens} tokens, one "
        f"device. Memory is the compiler's plan. Seconds are the median of {a.rounds} steps that "
        "alternate. The last columns are for a device with exactly the memory of the row: the "
        "seconds of what auto chooses, over those of the fastest choice that fits.",
        "",
        "| rows at once | kept | MB | s | auto takes | ratio to the fastest |",
        "|---|---|---|---|---|---|",
    ]
    for choice in case.choices:
        memory = case.reports[choice].peak_bytes_per_chip
        fits = [c for c in case.choices if case.reports[c].peak_bytes_per_chip <= memory]
        best, taken = min(fits, key=middle.get), case.chosen(memory)
        kept = ", ".join(choice.save) or "nothing"
        lines.append(
            f"| {choice.microbatch} | {kept} | {memory / 1e6:.0f} | {middle[choice]:.2f} "
            f"| {taken} | {middle[taken] / middle[best]:.2f} |"
        )
        print(lines[-1], flush=True)
    RESULT.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
