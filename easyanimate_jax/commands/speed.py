"""Print the measured speed of a run, beside the predicted one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tyro.conf import Positional, UseAppendAction

from easyanimate_jax.commands import parse
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.safety.exits import DONE

HELP = """Print the speed of a run by stage and token length: seconds of a step on the devices, real
tokens and model FLOP/s of a device, and MFU. The run may be in progress.

With --topology, what `aot` predicts for the run's config on these chips stands beside it. On TPUs
each row is compiled for that, which takes minutes. Example:

  python -m easyanimate_jax speed runs/v5_12b --topology v5p:4x4x8 --stage 13312_t2v"""


@dataclass(frozen=True)
class Options:
    """The arguments of `speed`."""

    run: Positional[Place]
    """Run folder."""
    topology: str | None = None
    """Chips of the run, as `aot` names them: v5p:4x4x8, h200:8, h100:16x8."""
    slices: int = 1
    """Number of TPU slices of that topology."""
    stage: UseAppendAction[tuple[str, ...]] = ()
    """Show only this stage; you may repeat the option."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `speed`; return the exit code."""
    return parse.run(partial(_speed, arguments))


def _speed(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "speed", HELP)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: no local device is used
    from easyanimate_jax.pods.stages import beside
    from easyanimate_jax.runs.config import from_json
    from easyanimate_jax.training.metrics import read_rows
    from easyanimate_jax.training.speed import COLUMNS, cells, speeds, table

    if not (own.run / "metrics.jsonl").is_file():
        raise ValueError(f"{own.run} has no metrics.jsonl; give the folder of a training run")
    found = [s for s in speeds(read_rows(own.run)) if not own.stage or s.stage in own.stage]
    if not found:
        raise ValueError(
            f"{own.run} has no measured step{' of ' + ', '.join(own.stage) if own.stage else ''}; "
            f"the first step of each program is not measured, nor are runs of a VAE and runs of an "
            f"earlier version"
        )
    columns, rows = COLUMNS, [cells(speed) for speed in found]
    if own.topology:
        config = from_json((own.run / "config.json").read_text("utf-8"))
        more, others = beside(config, own.topology, own.slices, found)
        columns, rows = (*columns, *more), [(*a, *b) for a, b in zip(rows, others, strict=True)]
    print(table(columns, rows))
    return DONE
