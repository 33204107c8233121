"""Compile the train step of a stage for absent TPUs, and report its memory and time.

libtpu's compiler runs on any Linux machine. It compiles the same program as a run (see
training/compile.py). A stage is compiled at its longest bucket, which decides whether it fits.
"""

import dataclasses
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from easyanimate_jax.facts import MESH_AXES
from easyanimate_jax.pods.hlo import Program, read_program
from easyanimate_jax.pods.predict import Prediction, predict
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.training.auto import Choice, choose
from easyanimate_jax.training.chips import Chip, chip_of
from easyanimate_jax.training.compile import StageReport, compile_stage
from easyanimate_jax.training.fits import memory_line
from easyanimate_jax.training.program import samples_groups
from easyanimate_jax.training.stages import Stage

logger = logging.getLogger(__name__)

# Keep libtpu from looking for a TPU, and from printing that there is none.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def longest(config: TrainConfig, stage: Stage) -> dict:
    """Return {"tokens", "text_lengths"} of a stage's longest bucket.

    V5.1 has one text length, V5 has two (spec 5).
    """
    text_lengths = (256,) if len(config.model.text_widths) == 1 else (77, 256)
    return {"tokens": config.set(stage.data).budget.lengths[-1], "text_lengths": text_lengths}


def topology_devices(name: str, num_slices: int = 1) -> list:
    """Return the devices of a topology such as "v5p:4x4x8".

    Raises ValueError if libtpu is not installed or does not know the topology.
    """
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
    """Return the configured mesh if it fits `num_devices`, or a similar mesh otherwise.

    The similar mesh keeps `context` and `tensor`. `fsdp` takes the other devices, up to 64; `data`
    takes the rest.
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
    """Yield the report of each stage; stages with the same program share one compilation."""
    known = {}  # what a program depends on -> its report
    for stage in stages:
        longest = config.set(stage.data).budget.lengths[-1]
        program = longest, stage.batch_size, stage.microbatch, stage.in_channels, stage.objective
        program += config.mesh_of(stage), config.step.of_stage(stage).model.save
        if program not in known:
            known[program] = report_of(config, stage)
        report = dataclasses.replace(
            known[program], name=stage.name, task=stage.task, steps=stage.steps
        )
        if report.predicted_step_seconds is not None:
            _add_duration(report)
        yield report


def compile_step(
    config: TrainConfig,
    stage: Stage,
    topology: str,
    *,
    num_slices: int = 1,
    tokens: int | None = None,
) -> tuple[StageReport, str]:
    """Return (report, text of the compiled program); the text is "" if the stage does not fit.

    By default the step is compiled at the stage's longest bucket, and the sampling of its videos is
    added; at `tokens` it is the step alone. What is "auto" is chosen as in a run. Raises ValueError
    if config, mesh and topology do not match.
    """
    mesh, chip = pod_mesh(config, stage, topology, num_slices)
    sizes = longest(config, stage) | ({"tokens": tokens} if tokens else {})
    made = {}

    def compiles(choice: Choice) -> StageReport:
        settled = choice.apply(stage)
        made[choice] = compile_stage(config.step, settled, mesh, **sizes, memory=int(chip.memory))
        if not made[choice][0].fits:
            logger.info("too large: %s", memory_line(made[choice][0]))
        return made[choice][0]

    with jax.set_mesh(mesh):
        texts = sum(sizes["text_lengths"])
        choice, report = choose(config.step, stage, mesh, sizes["tokens"], texts, compiles)
    compiled, stage = made[choice][1], choice.apply(stage)
    report.chips = mesh.size // chip.devices
    report.topology = topology if num_slices == 1 else f"{num_slices} x {topology}"
    if compiled is None:
        return report, ""
    text = compiled.as_text()
    _describe_program(report, read_program(text), chip, mesh, config.model.head_width)
    if samples_groups(stage) and not tokens:
        return _with_sampling(report, config, stage, mesh, chip), text
    return report, text


def _with_sampling(
    report: StageReport, config: TrainConfig, stage: Stage, mesh: Mesh, chip: Chip
) -> StageReport:
    """Return the report of a step to which the program that samples its videos was added."""
    memory = int(chip.memory)
    sampling, compiled = compile_stage(
        config.step, stage, mesh, **longest(config, stage), memory=memory, sampler=True
    )
    if compiled is None or sampling.peak_bytes_per_chip > report.peak_bytes_per_chip:
        for name in ("fits", "peak_bytes_per_chip", "memory", "message"):
            setattr(report, name, getattr(sampling, name))
    if compiled is None:
        return report
    program = read_program(compiled.as_text())
    more = predict(program, chip, [*mesh.devices.flat], config.model.head_width)
    before = Prediction(**report.predicted_parts)
    names = (field.name for field in dataclasses.fields(Prediction))
    parts = {name: getattr(before, name) + getattr(more, name) for name in names}
    describe_time(report, Prediction(**parts), chip)
    return report


def pod_mesh(
    config: TrainConfig, stage: Stage, topology: str, num_slices: int = 1
) -> tuple[Mesh, Chip]:
    """Return (mesh of a stage over the devices of a topology, their chip); see `suggest_mesh`."""
    devices = topology_devices(topology, num_slices)
    mesh = make_mesh(suggest_mesh(config.mesh_of(stage), len(devices)), devices)
    return mesh, chip_of(devices[0].device_kind)


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
    """Fill in the seconds, MFU, days and chip-hours of a report."""
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
    """Return the mesh axes along which a group's devices differ: "fsdp" or "fsdp x context"."""
    places = np.unravel_index(np.array(group), mesh.devices.shape)
    return " x ".join(
        name for name, place in zip(MESH_AXES, places, strict=True) if len(set(place.tolist())) > 1
    )
