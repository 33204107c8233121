"""Predict the time of a step from the compiler's cycles, kernel schedules and link rates.

Nothing was measured on a chip. The sum assumes that no collective overlaps with computation. The
range covers the error: from all collectives hidden and the rest 20 % faster, to everything 33 %
slower.
"""

import math
from dataclasses import dataclass

from easyanimate_jax.pods.hlo import Collective, Kernel, Program
from easyanimate_jax.training.chips import Chip

FASTER, SLOWER = 0.8, 1.33
SLICE_LINK = 6.25e9  # bytes a second per chip between slices: an assumption


@dataclass(frozen=True)
class Prediction:
    """The seconds of a step, by kind of work."""

    matmul: float
    attention: float
    elementwise: float
    collectives: float

    @property
    def serial(self) -> float:
        """Return the seconds of a step in which no collective overlaps with computation."""
        return self.matmul + self.attention + self.elementwise + self.collectives

    def range(self) -> tuple[float, float]:
        """Return (least, most) seconds: collectives hidden and the rest faster; all slower."""
        return (self.serial - self.collectives) * FASTER, self.serial * SLOWER


def predict(program: Program, chip: Chip, devices: list, head_width: int) -> Prediction:
    """Return the predicted seconds of a compiled step; `devices` are in the order of the mesh."""
    fused = not any("_dq_" in kernel.name for kernel in program.kernels)
    return Prediction(
        matmul=program.matmul_cycles / chip.clock,
        attention=sum(_kernel_seconds(k, chip, head_width, fused) for k in program.kernels),
        elementwise=program.other_cycles / chip.clock
        + sum(moved / getattr(chip, rate) for rate, moved in program.streamed.items()),
        collectives=sum((_collective_seconds(c, chip, devices) for c in program.collectives), 0.0),
    )


def _kernel_seconds(kernel: Kernel, chip: Chip, head_width: int, fused: bool) -> float:
    B, heads, queries, K = kernel.shape
    heads = math.ceil(heads / chip.cores) * chip.cores  # heads are divided among the cores
    product = 2 * B * heads * queries * kernel.num_keys * K * kernel.count
    rate = min(head_width / 64, 2)  # relative to the table's, which is for head width 64
    if "fwd" in kernel.name:
        return 2 * product / (chip.attention_forward * rate)
    if fused:
        return 4 * product / (chip.attention_backward * rate)
    return 2 * product / (chip.attention_split_backward * rate)  # one of the two kernels


def _collective_seconds(collective: Collective, chip: Chip, devices: list) -> float:
    group = [devices[n] for n in collective.group if n < len(devices)]
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return collective.wire / SLICE_LINK
    spanned = sum(len({d.coords[axis] for d in group}) > 1 for axis in range(len(group[0].coords)))
    return collective.wire / (2 * chip.link * max(1, spanned))
