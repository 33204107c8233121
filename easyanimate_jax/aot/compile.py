"""Compiles the train step of a stage and says what it needs, for devices that need not be there.

libtpu's compiler runs on any Linux machine. `compile_stage` is what `trainer` runs, too: the same
function, state, batch, mesh and donated buffers. A stage is compiled at its longest bucket, which
decides whether it fits.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from easyanimate_jax.aot.chips import Chip, chip_of
from easyanimate_jax.aot.hlo import Program, read_program
from easyanimate_jax.aot.predict import Prediction, model_flops, predict
from easyanimate_jax.config import TrainConfig
from easyanimate_jax.data.loader import Batch
from easyanimate_jax.memory import peak_bytes
from easyanimate_jax.sharding import MESH_AXES, AnyMesh, MeshConfig, make_mesh
from easyanimate_jax.training.optimizer import make_optimizer
from easyanimate_jax.training.program import (
    abstract_batch,
    abstract_state,
    microbatch_rows,
    step_program,
)
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.step import TrainState

# libtpu must neither look for a TPU nor tell that there is none.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Change:
    """Overrides of the config with which a stage fits, and what the compiler says of it then."""

    overrides: str
    peak_bytes_per_chip: int
    predicted_step_seconds: float


@dataclass
class StageReport:
    """What the compiler says of one stage, and what follows from it. Bytes are a device's."""

    name: str
    task: str
    topology: str
    mesh: dict[str, int]
    batch_size: int
    microbatch: int
    accumulate: int
    tokens: int
    text_tokens: int
    fits: bool
    hbm_bytes: int
    peak_bytes_per_chip: int | None  # None where the compiler refused without saying
    memory: dict[str, int]
    model_flops: float
    attention_share: float
    steps: int
    chips: int = 0  # 0 of devices that are here
    modelled: bool = False  # by `gpu`, and not compiled
    collective_bytes: dict[str, int] = field(default_factory=dict)  # sent in a step, by kind
    collective_bytes_per_axis: dict[str, int] = field(default_factory=dict)  # by mesh axes
    waiting_collective_bytes: int = 0  # of them during which the device computes nothing
    largest_all_reduce_bytes: int = 0
    kernels: list[str] = field(default_factory=list)
    predicted_parts: dict[str, float] = field(default_factory=dict)  # seconds
    predicted_step_seconds: float | None = None
    predicted_step_seconds_range: tuple[float, float] | None = None
    predicted_mfu: float | None = None
    predicted_days: float | None = None
    predicted_chip_hours: float | None = None
    changes: list[Change] = field(default_factory=list)  # that make it fit, the cheapest first
    compile_seconds: float = 0.0
    message: str = ""


def longest(config: TrainConfig, stage: Stage) -> dict:
    """`tokens` of a stage's longest bucket; `text_lengths`: V5.1's one, or V5's two (spec 5)."""
    text_lengths = (256,) if len(config.model.text_widths) == 1 else (77, 256)
    return {"tokens": config.set(stage.data).budget.lengths[-1], "text_lengths": text_lengths}


def topology_devices(name: str, num_slices: int = 1) -> list:
    """The devices of a topology such as "v5p:4x4x8". Raises ValueError, in one line."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "the TPU compiler is not installed: pip install 'libtpu==0.0.42.*' (Linux, x86-64), or "
            "this package with its extra `dev`"
        )
    for key, value in ALONE.items():
        os.environ.setdefault(key, value)
    more = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        devices = topologies.get_topology_desc(name, platform="tpu", **more).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology {name!r}: {str(error).splitlines()[0]}. Use one such as v5p:4x4x8 or "
            f"v6e:16x16."
        ) from error
    return devices


def suggest_mesh(config: MeshConfig, num_devices: int) -> MeshConfig:
    """The configured mesh where it has as many devices, else its like on `num_devices`.

    `context` and `tensor` stay, `fsdp` takes the rest, `data` what would make `fsdp` more than 64.
    """
    try:
        return MeshConfig(*config.shape(num_devices))
    except ValueError:
        inner = math.gcd(config.context * config.tensor, num_devices)
        tensor = math.gcd(config.tensor, inner)
        rest = num_devices // inner
        fsdp = math.gcd(rest, 64)
        return MeshConfig(rest // fsdp, fsdp, inner // tensor, tensor)


def stage_reports(
    config: TrainConfig,
    stages: Sequence[Stage],
    report_of: Callable[[TrainConfig, Stage], StageReport],
) -> Iterator[StageReport]:
    """The reports of stages; of two that run the same program it is made once."""
    known = {}  # what a program depends on -> its report
    for stage in stages:
        longest = config.set(stage.data).budget.lengths[-1]
        program = longest, stage.batch_size, stage.microbatch, stage.in_channels
        if program not in known:
            known[program] = report_of(config, stage)
        report = dataclasses.replace(
            known[program], name=stage.name, task=stage.task, steps=stage.steps
        )
        if report.predicted_step_seconds is not None:
            _add_duration(report)
        yield report


def compile_step(
    config: TrainConfig, stage: Stage, topology: str, *, num_slices: int = 1
) -> tuple[StageReport, str]:
    """The report, and the text of the compiled program ("" where it does not fit).

    Raises ValueError where config, mesh and topology do not match.
    """
    mesh, chip = pod_mesh(config, topology, num_slices)
    report, compiled = compile_stage(
        config, stage, mesh, **longest(config, stage), memory=int(chip.memory)
    )
    report.chips = mesh.size // chip.devices
    report.topology = topology if num_slices == 1 else f"{num_slices} x {topology}"
    if compiled is None:
        return report, ""
    text = compiled.as_text()
    _describe_program(report, read_program(text), chip, mesh, config.model.head_width)
    return report, text


def pod_mesh(config: TrainConfig, topology: str, num_slices: int = 1) -> tuple[Mesh, Chip]:
    """The config's mesh, or its like, over the devices of a topology, and what they are."""
    devices = topology_devices(topology, num_slices)
    mesh = make_mesh(suggest_mesh(config.mesh, len(devices)), devices)
    return mesh, chip_of(devices[0].device_kind)


def compile_stage(
    config: TrainConfig,
    stage: Stage,
    mesh: Mesh,
    *,
    tokens: int,
    text_lengths: tuple[int, ...],
    memory: int,
) -> tuple[StageReport, jax.stages.Compiled | None]:
    """What the step needs of `memory` bytes a device, and the step; None if nothing was compiled.

    The compiled step takes (state, batch, key, learning rate).
    """
    with jax.set_mesh(mesh):
        report, placed, arguments = describe_stage(
            config, stage, mesh, tokens=tokens, text_lengths=text_lengths, memory=memory
        )
        report.topology = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
        lowered = trace_stage(config, stage, placed, arguments).lower()
        return report, _compile(lowered, mesh, report)


def trace_stage(
    config: TrainConfig, stage: Stage, placed: TrainState, arguments: tuple[TrainState, Batch]
) -> jax.stages.Traced:
    """The step on what `describe_stage` found, before any compiler; under the same mesh."""
    optimizer = make_optimizer(config.optimizer)
    step = step_program(optimizer, config.process, config.ema_decay, placed, stage.batch_size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step.trace(*arguments, key, jax.ShapeDtypeStruct((), jnp.float32))


def describe_stage(
    config: TrainConfig,
    stage: Stage,
    mesh: AnyMesh,
    *,
    tokens: int,
    text_lengths: tuple[int, ...],
    memory: int,
) -> tuple[StageReport, TrainState, tuple[TrainState, Batch]]:
    """Before compiling: the report, the state's shardings, and (state, batch) as placed shapes."""
    model = dataclasses.replace(config.model, in_channels=stage.in_channels)
    rows = microbatch_rows(stage, mesh)
    _, placed, state = abstract_state(model, make_optimizer(config.optimizer), mesh)
    batch = abstract_batch(
        model,
        mesh,
        batch_size=stage.batch_size,
        microbatch=rows,
        tokens=tokens,
        text_lengths=text_lengths,
    )
    flops, share = model_flops(model, tokens, sum(text_lengths))
    report = StageReport(
        name=stage.name,
        task=stage.task,
        topology="",
        mesh=dict(mesh.shape),
        batch_size=stage.batch_size,
        microbatch=rows,
        accumulate=batch.weight.shape[0],
        tokens=tokens,
        text_tokens=sum(text_lengths),
        fits=False,
        hbm_bytes=memory,
        peak_bytes_per_chip=None,
        memory={
            "weights": _bytes(state.model),
            "average": _bytes(state.ema),
            "optimizer": _bytes(state.opt_state),
            "batch": _bytes(batch),
        },
        model_flops=flops * stage.batch_size,
        attention_share=share,
        steps=stage.steps,
    )
    return report, placed, (state, batch)


def _compile(lowered, mesh: Mesh, report: StageReport) -> jax.stages.Compiled | None:
    """Compile, and tell the report how it went; None if there is too little memory for it."""
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        report.message = _first_lines(str(error))
        report.peak_bytes_per_chip = _needed_bytes(str(error))
        return None
    report.compile_seconds = time.perf_counter() - began
    report.peak_bytes_per_chip = peak_bytes(compiled, mesh.devices.flat[0].platform)
    report.fits = report.peak_bytes_per_chip <= report.hbm_bytes
    arguments = sum(report.memory.values())
    report.memory["activations and temporaries"] = report.peak_bytes_per_chip - arguments
    return compiled


def _describe_program(
    report: StageReport, program: Program, chip: Chip, mesh: Mesh, head_width: int
) -> None:
    prediction = predict(program, chip, [*mesh.devices.flat], head_width)
    for collective in program.collectives:
        for total, name in (
            (report.collective_bytes, collective.kind),
            (report.collective_bytes_per_axis, _axes(collective.group, mesh)),
        ):
            total[name] = total.get(name, 0) + int(collective.wire)
    waiting = [c.wire for c in program.collectives if not c.overlaps]
    report.waiting_collective_bytes = int(sum(waiting))
    reduced = [c.largest for c in program.collectives if c.kind == "all-reduce"]
    report.largest_all_reduce_bytes = max(reduced, default=0)
    report.kernels = [
        f"{k.count} x {k.name} {k.shape} on {k.num_keys} keys" for k in program.kernels
    ]
    describe_time(report, prediction, chip)


def describe_time(report: StageReport, prediction: Prediction, chip: Chip) -> None:
    """Seconds, MFU, days and chip-hours of a stage."""
    devices = math.prod(report.mesh.values())
    seconds = prediction.serial
    report.predicted_parts = dataclasses.asdict(prediction)
    report.predicted_step_seconds = seconds
    report.predicted_step_seconds_range = prediction.range()
    report.predicted_mfu = report.model_flops / (seconds * chip.peak_flops * devices)
    _add_duration(report)


def _add_duration(report: StageReport) -> None:
    hours = report.predicted_step_seconds * report.steps / 3600
    report.predicted_days = hours / 24
    report.predicted_chip_hours = hours * report.chips


def _axes(group: tuple[int, ...], mesh: Mesh) -> str:
    """The mesh axes along which the devices of a group differ: "fsdp", or "fsdp x context"."""
    places = np.unravel_index(np.array(group), mesh.devices.shape)
    return " x ".join(
        name for name, place in zip(MESH_AXES, places, strict=True) if len(set(place.tolist())) > 1
    )


def _bytes(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _needed_bytes(message: str) -> int | None:
    """The "Used 101.6G of 95.7G hbm" of the compiler's refusal."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMG]) of", message)
    return int(float(found[1]) * 1024 ** ("KMG".index(found[2]) + 1)) if found else None


def _first_lines(message: str, most: int = 300) -> str:
    return " ".join(message.split())[:most]
