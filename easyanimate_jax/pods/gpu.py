"""Estimate the same report for absent GPUs by a model, because their compiler needs the GPUs.

The memory between steps is exact. Kept activations follow from the config, and the memory of one
block's backward pass from a measurement on an H200. Seconds follow from FLOPs and bytes, at rates
measured on that card (benchmarks/results/gpu.md). The rate of attention is cuDNN's with a mask,
even for heads of 64, which use none. Communication between devices was never measured. Offloaded
activations count no memory and no time. On a machine with GPUs, `train.py` compiles the step and
reports its exact memory.
"""

import math
import re

import jax
from jax.sharding import AbstractMesh, AxisType

from easyanimate_jax.facts import ACTIVATIONS, BLOCK_MATRICES, MESH_AXES
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.pods.compile import describe_time, longest, suggest_mesh
from easyanimate_jax.pods.predict import Prediction
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.sharding import token_axis
from easyanimate_jax.training.auto import Choice, choose
from easyanimate_jax.training.chips import GPUS, Gpu
from easyanimate_jax.training.compile import TEMPORARIES, StageReport, describe_stage, model_flops
from easyanimate_jax.training.stages import Stage

# Measured on an H200 for a block of the 12B model. HELD: values per token that the backward pass
# holds at once. PASSED: values per token that both passes read and write outside of products and
# attention. The others: how often both passes, and the update, read or write the weights.
HELD, PASSED, WEIGHTS_PASSED, UPDATE_PASSED = 30, 216, 4, 11
# Counted, not measured: what both passes read and write besides to make operands 8-bit. Each is
# read twice and written in half of its bytes: x of the products (7 values of model width a token,
# in both passes by row and in one by column), dy (9, once for each of its two products), and the
# weights, gathered in bfloat16, three times.
QUANTIZED, WEIGHTS_QUANTIZED = 2.5 * (7 + 7 + 7 + 9 + 9), 2.5 * 3 / 2


def parse(topology: str) -> tuple[Gpu, int, int] | None:
    """Return (GPU, hosts, GPUs per host) of "h200:8" or "h200:16x8"; None if it names no GPU.

    Raises ValueError if valid numbers do not follow the name of a GPU.
    """
    name, _, shape = topology.partition(":")
    gpu = next((gpu for gpu in GPUS if gpu.name == name), None)
    if gpu is None:
        return None
    numbers = re.fullmatch(r"(?:(\d+)x)?(\d+)", shape)
    hosts, devices = (int(n or 1) for n in numbers.groups()) if numbers else (0, 0)
    if not hosts * devices:
        raise ValueError(f"topology {topology!r}: use {name}:8, or {name}:16x8 for 16 hosts of 8")
    return gpu, hosts, devices


def model_step(
    config: TrainConfig, stage: Stage, topology: str, *, tokens: int | None = None
) -> StageReport:
    """Return the estimated report of a stage, at `tokens` or else at its longest bucket.

    Raises ValueError as `parse` does.
    """
    gpu, hosts, per_host = parse(topology)
    shape = suggest_mesh(config.mesh_of(stage), hosts * per_host).shape(hosts * per_host)
    device = jax.sharding.AbstractDevice(gpu.device_kind, gpu.cores, "gpu")
    mesh = AbstractMesh(
        shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), abstract_device=device
    )
    sizes = longest(config, stage) | ({"tokens": tokens} if tokens else {})

    def modelled(choice: Choice) -> StageReport:
        settled = choice.apply(stage)
        report, *_ = describe_stage(config.step, settled, mesh, **sizes, memory=int(gpu.memory))
        report.memory[TEMPORARIES] = _temporaries(report, config.step.of_stage(settled).model)
        report.peak_bytes_per_chip = sum(report.memory.values())
        report.fits = report.peak_bytes_per_chip <= report.hbm_bytes
        return report

    with jax.sharding.use_abstract_mesh(mesh):
        texts = sum(sizes["text_lengths"])
        choice, report = choose(config.step, stage, mesh, sizes["tokens"], texts, modelled)
    report.topology, report.chips, report.modelled = topology, hosts * per_host, True
    model = config.step.of_stage(choice.apply(stage)).model
    exchanged = token_axis(mesh, report.microbatch) is not None
    describe_time(report, _seconds(report, model, gpu, hosts, per_host, exchanged), gpu)
    return report


def _stream(report: StageReport, model: MMDiTConfig) -> float:
    """Return the bytes of one bfloat16 array (tokens of a device's microbatch, model width)."""
    mesh = report.mesh
    parts = mesh["data"] * mesh["fsdp"] * mesh["context"]
    rows = report.microbatch * (report.tokens + report.text_tokens)
    return 2 * rows * model.width / parts


def _temporaries(report: StageReport, model: MMDiTConfig) -> int:
    stream, tensor = _stream(report, model), report.mesh["tensor"]
    # The input of a block is always kept.
    kept = 1 + sum(ACTIVATIONS[name].values for name in model.kept) / tensor
    gradients = report.memory["weights"] * (2 if report.accumulate > 1 else 1)
    gathered = 2 * 2 * _block_weights(model) / tensor if _devices(report) > 1 else 0  # bfloat16
    return int(gradients + gathered + stream * (model.depth * kept + HELD / tensor))


def _seconds(
    report: StageReport,
    model: MMDiTConfig,
    gpu: Gpu,
    hosts: int,
    per_host: int,
    exchanged: bool,
) -> Prediction:
    """Return the predicted seconds of a step; `exchanged` if tokens are sharded over devices."""
    times, tensor = report.accumulate, report.mesh["tensor"]
    stream = _stream(report, model)
    trained = report.trained_part
    flops, share = model_flops(model, report.tokens, report.text_tokens, trained=trained)
    passes = (2 + trained) * BLOCK_MATRICES  # of the blocks' matrices in a step
    # Padding rows of a microbatch are computed too.
    flops *= report.microbatch * times / _devices(report)
    again = BLOCK_MATRICES - sum(ACTIVATIONS[name].matrices for name in model.kept)
    attention = flops * share / 3 * (1 if "attention" in model.kept else 2) / gpu.attention_forward
    attention += flops * share / 3 * 2 / gpu.attention_backward
    block, passed, weights_passed, rate = _block_weights(model), PASSED, WEIGHTS_PASSED, gpu.matmul
    if model.products != "full":
        passed, weights_passed = passed + QUANTIZED, weights_passed + WEIGHTS_QUANTIZED
        rate = gpu.matmul_8_bits
    moved = model.depth * (stream * passed + 4 * block * weights_passed) / tensor * times
    moved += report.memory["weights"] * UPDATE_PASSED
    sent = 0.0
    if _devices(report) > 1:  # gathered twice and summed once, in bfloat16
        sent += 3 * 2 * block * model.depth / tensor
    if exchanged:
        sent += 24 * stream * model.depth
    between = (hosts - 1) / hosts / (per_host * gpu.network)
    return Prediction(
        matmul=flops * (1 - share) * (1 + again / passes) / rate,
        attention=attention,
        elementwise=moved / gpu.bandwidth,
        collectives=sent * times * (1 / (4 * gpu.link) + between),
    )


def _block_weights(model: MMDiTConfig) -> int:
    return 24 * model.width**2 + 24 * model.time_width * model.width  # of text, video, modulation


def _devices(report: StageReport) -> int:
    return math.prod(report.mesh.values())
