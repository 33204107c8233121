"""The speed of a run: seconds of a step on the devices, tokens, FLOP/s and MFU by token length.

The FLOPs of a step are those of `training/compile.py: model_flops`, which the verb `aot` predicts
with. MFU (model FLOPs utilization) is their rate divided by the chip's bfloat16 peak.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from easyanimate_jax.training.chips import peak_flops
from easyanimate_jax.training.metrics import now


class Meter:
    """Measures the steps of a run on the devices of a mesh.

    The host dispatches a step and goes on, so the host's own time of a step says little. A thread
    waits for the result of each step. The step took the time from the end of the step before, or
    from its own dispatch if that came later, to its end. So waits for data, compilation,
    checkpoints, samples and validation do not count, and mixed lengths are told apart.
    """

    def __init__(self, mesh: Mesh):
        self.devices = mesh.size
        self.peak = peak_flops(mesh.devices.flat[0].device_kind)  # FLOP/s of a device, or None
        self.waiter = ThreadPoolExecutor(1, thread_name_prefix="meter")
        self.ended = 0.0  # when the last step ended, on the clock `now`

    def time(self, dispatched: float, result) -> Future:
        """Return the future seconds of a step whose dispatch began at `dispatched`.

        `result` is any output of the step. Call this once for each step, in their order.
        """
        return self.waiter.submit(self._wait, dispatched, result)

    def _wait(self, dispatched: float, result) -> float:
        jax.block_until_ready(result)
        before, self.ended = self.ended, now()
        return self.ended - max(dispatched, before)

    def rates(self, seconds: float, real_tokens: int, flops: float) -> dict[str, float]:
        """Return a step's numbers `metrics.OF_LENGTH`; "mfu" only if the chip's peak is known.

        `real_tokens` are the batch's video tokens without padding, `flops` the model FLOPs of the
        step. "tokens_per_second" and "tflops" (10^12 FLOP/s) are for one device.
        """
        device_seconds = seconds * self.devices
        found = {
            "step_seconds": seconds,
            "tokens_per_second": real_tokens / device_seconds,
            "tflops": flops / device_seconds / 1e12,
        }
        if self.peak:
            found["mfu"] = flops / (device_seconds * self.peak)
        return found


class Speed(NamedTuple):
    """The speed of a stage at one token length. Rates are for one device."""

    stage: str
    tokens: int  # padded tokens of a sample
    steps: int  # those that were measured
    seconds: float  # median of a step
    slow_seconds: float  # 95th percentile
    tokens_per_second: float  # real tokens
    tflops: float  # 10^12 model FLOP/s
    mfu: float | None  # None if the chip's peak is not known


def speeds(rows: Iterable[Mapping]) -> list[Speed]:
    """Return the speed of each stage and token length in rows of metrics, in their first order.

    A rate is all work divided by all seconds. The first step of a program in a process was not
    measured, nor any step of a run of an earlier version.
    """
    found: dict[tuple[str, int], list[Mapping]] = {}
    for row in rows:
        if "step_seconds" in row:
            found.setdefault((row["stage"], row["bucket"]), []).append(row)
    return [_speed(*place, measured) for place, measured in found.items()]


def _speed(stage: str, tokens: int, rows: Sequence[Mapping]) -> Speed:
    seconds = np.array([row["step_seconds"] for row in rows])

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if name in row]
        return float(np.average(values, weights=seconds)) if len(values) == len(rows) else None

    return Speed(
        stage=stage,
        tokens=tokens,
        steps=len(rows),
        seconds=float(np.median(seconds)),
        slow_seconds=float(np.quantile(seconds, 0.95)),
        tokens_per_second=mean("tokens_per_second"),
        tflops=mean("tflops"),
        mfu=mean("mfu"),
    )


COLUMNS = ("stage", "tokens", "steps", "s/step", "p95", "tok/s/device", "TFLOP/s/device", "MFU")


def cells(speed: Speed) -> tuple[str, ...]:
    """Return the cells of a speed for COLUMNS; an unknown MFU is "-"."""
    return (
        speed.stage,
        f"{speed.tokens}",
        f"{speed.steps}",
        f"{speed.seconds:.3g}",
        f"{speed.slow_seconds:.3g}",
        f"{speed.tokens_per_second:,.0f}",
        f"{speed.tflops:.3g}",
        "-" if speed.mfu is None else f"{speed.mfu:.1%}",
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells below their columns as aligned text."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
