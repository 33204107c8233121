"""Compile the train step of a stage and report its memory; the devices may be absent.

A run compiles its own step here, and `pods` the step that a pod would run: both have the same
function, state, batch, mesh and donated buffers.
"""

import math
import re
import time
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.facts import BLOCK_MATRICES, LATENT_CHANNELS, PATCH
from easyanimate_jax.memory import peak_bytes
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.sharding import AnyMesh
from easyanimate_jax.training.program import (
    StepConfig,
    abstract_batch,
    abstract_state,
    groups_program,
    microbatch_rows,
    reads_empty,
    reads_pairs,
    samples_groups,
    step_program,
)
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.step import TrainState
from easyanimate_jax.weights.module import named_weights

TEMPORARIES = "activations and temporaries"  # the part of a step's memory besides its arguments


@dataclass(frozen=True)
class Change:
    """Overrides of the config with which a stage fits, and its memory and time with them."""

    overrides: str
    peak_bytes_per_chip: int
    predicted_step_seconds: float


@dataclass
class StageReport:
    """The compiler's figures for one stage, and predictions from them. Bytes are per device."""

    name: str
    task: str
    topology: str
    mesh: dict[str, int]
    batch_size: int
    microbatch: int
    accumulate: int
    save: tuple[str, ...]  # names of the activations that are kept
    tokens: int
    text_tokens: int
    fits: bool
    hbm_bytes: int
    peak_bytes_per_chip: int | None  # None if the compiler refused without a figure
    memory: dict[str, int]
    model_flops: float
    attention_share: float
    steps: int
    trained_part: float = 1.0  # of the weights, adapters left out
    chips: int = 0  # 0 for the devices of this process
    modelled: bool = False  # estimated by pods/gpu.py, not compiled
    collective_bytes: dict[str, int] = field(default_factory=dict)  # sent in a step, by kind
    collective_bytes_per_axis: dict[str, int] = field(default_factory=dict)  # by mesh axes
    waiting_collective_bytes: int = 0  # the part during which the device computes nothing
    largest_all_reduce_bytes: int = 0
    kernels: list[str] = field(default_factory=list)
    predicted_parts: dict[str, float] = field(default_factory=dict)  # seconds
    predicted_step_seconds: float | None = None
    predicted_step_seconds_range: tuple[float, float] | None = None
    predicted_mfu: float | None = None
    predicted_days: float | None = None
    predicted_chip_hours: float | None = None
    changes: list[Change] = field(default_factory=list)  # that make it fit, the fastest first
    compile_seconds: float = 0.0
    message: str = ""


def compile_stage(
    config: StepConfig,
    stage: Stage,
    mesh: Mesh,
    *,
    tokens: int,
    text_lengths: tuple[int, ...],
    memory: int,
    sampler: bool = False,
) -> tuple[StageReport, jax.stages.Compiled | None]:
    """Compile the step of a stage; return (report, compiled step) for `memory` bytes per device.

    The compiled step takes (state, batch, key, learning rate). It is None if the compiler ran out
    of memory. With `sampler` it is the program that samples the videos of an update instead, and
    takes (state, batch without its group, key).
    """
    with jax.set_mesh(mesh):
        report, placed, arguments = describe_stage(
            config, stage, mesh, tokens=tokens, text_lengths=text_lengths, memory=memory
        )
        report.topology = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
        if sampler:
            report.name += ", sampling"
            traced = _trace_sampler(config, stage, mesh, arguments)
        else:
            traced = trace_stage(config, stage, placed, arguments)
        return report, _compile(traced.lower(), mesh, report)


def trace_stage(
    config: StepConfig, stage: Stage, placed: TrainState, arguments: tuple[TrainState, Batch]
) -> jax.stages.Traced:
    """Return the traced step for the results of `describe_stage`, under the same mesh."""
    step = step_program(config, placed, stage)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step.trace(*arguments, key, jax.ShapeDtypeStruct((), jnp.float32))


def _trace_sampler(
    config: StepConfig, stage: Stage, mesh: Mesh, arguments: tuple[TrainState, Batch]
) -> jax.stages.Traced:
    state, batch = arguments
    key = jax.eval_shape(lambda: jax.random.key(0))
    return groups_program(config, mesh, stage).trace(state, batch._replace(group=None), key)


def describe_stage(
    config: StepConfig,
    stage: Stage,
    mesh: AnyMesh,
    *,
    tokens: int,
    text_lengths: tuple[int, ...],
    memory: int,
) -> tuple[StageReport, TrainState, tuple[TrainState, Batch]]:
    """Return (report, the state's shardings, (state, batch) as placed shapes) before compiling."""
    config = config.of_stage(stage)
    rows = microbatch_rows(stage, mesh)
    _, placed, state = abstract_state(config, mesh)
    batch = abstract_batch(
        config.model,
        mesh,
        batch_size=stage.batch_size,
        microbatch=rows,
        tokens=tokens,
        text_lengths=text_lengths,
        empty=reads_empty(stage),
        pairs=reads_pairs(stage),
        group=samples_groups(stage),
    )
    trained = _trained_part(state)
    evaluations = 0 if stage.objective is None else stage.objective.evaluations
    flops, share = model_flops(
        config.model, tokens, sum(text_lengths), trained=trained, evaluations=evaluations
    )
    report = StageReport(
        name=stage.name,
        task=stage.task,
        topology="",
        mesh=dict(mesh.shape),
        batch_size=stage.batch_size,
        microbatch=rows,
        accumulate=batch.weight.shape[0],
        save=config.model.kept,
        tokens=tokens,
        text_tokens=sum(text_lengths),
        fits=False,
        hbm_bytes=memory,
        peak_bytes_per_chip=None,
        memory={
            "weights": _bytes(state.model),
            **({"frozen weights": _bytes(state.frozen)} if config.partial else {}),
            **({"teacher": _bytes(state.teacher)} if state.teacher is not None else {}),
            **({"critic": _bytes(state.critic)} if state.critic is not None else {}),
            **({"decoder and reward": _bytes(state.judge)} if state.judge is not None else {}),
            "average": _bytes(state.ema),
            "optimizer": _bytes(state.opt_state),
            "batch": _bytes(batch),
        },
        model_flops=flops * stage.batch_size * (2 if reads_pairs(stage) else 1),
        attention_share=share,
        trained_part=trained,
        steps=stage.steps,
    )
    return report, placed, (state, batch)


def _compile(lowered, mesh: Mesh, report: StageReport) -> jax.stages.Compiled | None:
    """Compile and fill in the report; return None if the step does not fit the memory."""
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
    platform = mesh.devices.flat[0].platform
    peak = peak_bytes(compiled, platform)
    report.memory[TEMPORARIES] = peak - sum(report.memory.values())
    if platform == "cpu":  # a checkpoint is written from the buffers of the state
        trained = sum(report.memory[name] for name in ("weights", "average", "optimizer"))
        report.memory["checkpoint in writing"] = trained
        peak += trained
    report.peak_bytes_per_chip, report.fits = peak, peak <= report.hbm_bytes
    return compiled


def model_flops(
    config: MMDiTConfig,
    tokens: int,
    text_tokens: int,
    *,
    trained: float = 1.0,
    evaluations: int | float = 0,
) -> tuple[float, float]:
    """Return (FLOPs of one sample's forward and backward pass, the share of them in attention).

    These are the FLOPs that the model needs. They include no recomputation and no padding beyond
    the bucket's, and count the backward pass as twice the forward pass. Only the part `trained` of
    the weights has gradients of its own; adapters count nothing. `evaluations` are further forward
    passes, such as a teacher's.
    """
    S, D = tokens + text_tokens, config.width
    linear = config.depth * S * 2 * BLOCK_MATRICES * D * D
    modulation = config.depth * 2 * 2 * config.time_width * 6 * D
    ends = 2 * tokens * D * PATCH**2 * (config.in_channels + LATENT_CHANNELS)
    ends += 2 * text_tokens * D * max(config.text_widths)
    attention = config.depth * 4 * S * S * D
    layers = linear + modulation + ends
    needed = (2.0 + trained + evaluations) * layers + (3.0 + evaluations) * attention
    return needed, (3.0 + evaluations) * attention / needed


def _trained_part(state: TrainState) -> float:
    """Return which part of the model's own weights, adapters left out, a state trains."""
    sizes = {name: x.size for name, x in named_weights(state.model).items()}
    own = sum(size for name, size in sizes.items() if "adapter" not in name.split("."))
    return own / (own + sum(x.size for x in jax.tree.leaves(state.frozen)))


def _bytes(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _needed_bytes(message: str) -> int | None:
    """Return the bytes in the compiler's "Used 101.6G of 95.7G hbm"; None without this text."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMG]) of", message)
    return int(float(found[1]) * 1024 ** ("KMG".index(found[2]) + 1)) if found else None


def _first_lines(message: str, most: int = 300) -> str:
    return " ".join(message.split())[:most]
