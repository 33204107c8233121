"""Choose what a step keeps for its backward pass, and how many rows it computes at once.

`save` (of the stage, or of the model for stages without their own) and `Stage.microbatch` may be
"auto". All ways to run a stage are then sorted by an estimate of their time, and compiled in this
order until one fits the memory. The first is the whole batch with every activation kept; where it
fits, nothing else is compiled. An estimate of the memory, scaled by the compiler's figures, passes
over ways that are far too large.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from easyanimate_jax.facts import ACTIVATIONS, AUTO, BLOCK_MATRICES
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.sharding import AnyMesh, device_kind, platform
from easyanimate_jax.training.chips import Gpu, find_chip
from easyanimate_jax.training.compile import TEMPORARIES, StageReport, model_flops
from easyanimate_jax.training.program import StepConfig, microbatch_rows
from easyanimate_jax.training.stages import Stage

TRANSIENTS = 40  # values of model width per token that one block's backward pass holds
HOPELESS = 1.1  # ways with an estimate above this multiple of the memory are not compiled
# FLOPs that a device makes while one byte is sent to it, or read from its memory. They are rough:
# they only order the ways. A known chip has its own first one.
LINK_FLOPS, MEMORY_FLOPS, CPU_FLOPS = 1000.0, 300.0, 10.0
MATMUL_SHARE = 0.8  # of the peak FLOP/s
HOST = 8  # GPUs
GATHERED, READ = 6, 20  # bytes per weight and microbatch: sent in bfloat16, or read and written


class Choice(NamedTuple):
    """One way to run a stage."""

    save: tuple[str, ...]  # names of `ACTIVATIONS` that are kept
    microbatch: int  # rows that go through the network at once

    @classmethod
    def read(cls, fields: Mapping) -> "Choice":
        """Return the choice of a file's fields. Raises an error for those of no choice."""
        save, microbatch = tuple(fields["save"]), fields["microbatch"]
        if set(save) - set(ACTIVATIONS) or type(microbatch) is not int or microbatch < 1:
            raise ValueError(f"{fields} is no choice")
        return cls(save, microbatch)

    def apply(self, stage: Stage) -> Stage:
        """Return the stage with this choice."""
        return dataclasses.replace(stage, save=self.save, microbatch=self.microbatch)

    def __str__(self) -> str:
        return f"{self.microbatch} rows at once, keeping {', '.join(self.save) or 'nothing'}"


def is_auto(config: StepConfig, stage: Stage) -> bool:
    """Return whether something of a stage is to be chosen."""
    return AUTO in (config.of_stage(stage).model.save, stage.microbatch)


def choices(
    config: StepConfig, stage: Stage, mesh: AnyMesh, tokens: int, text_tokens: int
) -> list[Choice]:
    """Return all ways to run a stage at a token length, the fastest by the estimate first.

    They keep the first n rows of `ACTIVATIONS`, for each n, and split the batch into equal
    microbatches. A setting that is not "auto" is the same in all of them.
    """
    model, groups = config.of_stage(stage).model, mesh.shape["data"] * mesh.shape["fsdp"]
    saves: list[tuple[str, ...]] = [model.kept]
    if model.save == AUTO:
        free = [name for name in ACTIVATIONS if name not in model.offload]
        saves = [tuple(free[:count]) for count in range(len(free), -1, -1)]
    whole = microbatch_rows(dataclasses.replace(stage, microbatch=None), mesh)
    rows = [microbatch_rows(stage, mesh)]
    if stage.microbatch == AUTO:
        most = whole // groups  # rows of a device
        rows = [groups * n for n in sorted({-(-most // k) for k in range(1, most + 1)})[::-1]]
    found = [Choice(save, min(n, stage.batch_size)) for n in rows for save in saves]
    return sorted(
        found, key=lambda choice: _flops(choice, config, stage, mesh, tokens, text_tokens)
    )


def _flops(
    choice: Choice, config: StepConfig, stage: Stage, mesh: AnyMesh, tokens: int, text_tokens: int
) -> float:
    """Return the FLOPs of a device in a step, and what its memory traffic delays, as FLOPs."""
    model, shape = config.model, mesh.shape
    groups, tensor = shape["data"] * shape["fsdp"], shape["tensor"]
    rows = -(-choice.microbatch // groups) * groups
    times = -(-stage.batch_size // rows)
    flops, share = model_flops(model, tokens, text_tokens)
    again = BLOCK_MATRICES - sum(ACTIVATIONS[name].matrices for name in choice.save)
    one = flops * (1 - share) * (1 + again / (3 * BLOCK_MATRICES))
    one += flops * share * (1 if "attention" in choice.save else 4 / 3)
    done = times * rows / (groups * shape["context"] * tensor)  # samples of a device
    weights = 2 * BLOCK_MATRICES * model.depth * model.width**2 / tensor  # text has its own
    if mesh.size == 1:
        moved = READ * weights * (CPU_FLOPS if platform() == "cpu" else MEMORY_FLOPS)
    else:
        link = _link_flops(mesh.size)
        moved = GATHERED * weights * link
        if rows % (groups * shape["context"]):  # attention exchanges tokens for heads
            local = rows * (tokens + text_tokens) / (groups * shape["context"])
            moved += 48 * local * model.width / tensor * model.depth * link
    return one * done + times * moved


def _link_flops(num_devices: int) -> float:
    """Return the FLOPs that a device of the mesh makes while one byte is sent to it."""
    chip = find_chip(device_kind())
    if chip is None:
        return LINK_FLOPS
    seconds = 1 / (4 * chip.link)
    if isinstance(chip, Gpu):
        seconds += max(0, 1 - HOST / num_devices) / (HOST * chip.network)
    return MATMUL_SHARE * chip.peak_flops * seconds


def activation_bytes(
    model: MMDiTConfig, save: Sequence[str], tokens: float, *, tensor: int = 1, padded: bool = False
) -> float:
    """Return an estimate of the activations of `tokens` tokens of a device, in bytes.

    `padded` says that heads narrower than 128 take the memory of 128, as on TPUs.
    """
    kept = 1 + sum(ACTIVATIONS[name].values for name in save)
    kept += padded and "attention" in save and model.head_width < 128
    size = 4 if model.dtype == "float32" else 2
    return size * tokens * model.width / tensor * (model.depth * kept + TRANSIENTS)


def choose(
    config: StepConfig,
    stage: Stage,
    mesh: AnyMesh,
    tokens: int,
    text_tokens: int,
    try_choice: Callable[[Choice], StageReport],
) -> tuple[Choice, StageReport]:
    """Return (choice, report) of the fastest choice that fits, else those of the smallest one.

    `try_choice` returns the compiler's report of a choice. The report of one that is refused scales
    the estimate of the others.
    """
    shape, padded = mesh.shape, platform() == "tpu"
    parts = shape["data"] * shape["fsdp"] * shape["context"]

    def rough(choice: Choice) -> float:
        local = choice.microbatch * (tokens + text_tokens) / parts
        options = {"tensor": shape["tensor"], "padded": padded}
        return activation_bytes(config.model, choice.save, local, **options)

    ordered = choices(config, stage, mesh, tokens, text_tokens)
    tried: dict[Choice, StageReport] = {}
    scale = 0.0
    for choice in ordered:
        given = next(iter(tried.values()), None)
        if given and _held(given) + scale * rough(choice) > HOPELESS * given.hbm_bytes:
            continue
        report = tried[choice] = try_choice(choice)
        if report.fits:
            return choice, report
        needed = report.peak_bytes_per_chip or report.hbm_bytes
        scale = max(0.0, needed - _held(report)) / rough(choice)
    smallest = min(ordered, key=rough)
    if smallest not in tried:
        tried[smallest] = try_choice(smallest)
    return smallest, tried[smallest]


def _held(report: StageReport) -> int:
    """Return the bytes of a stage that do not depend on the choice."""
    return sum(size for name, size in report.memory.items() if name != TEMPORARIES)
