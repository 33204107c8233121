"""A table of chips: data-sheet peaks, and rates of the attention kernel.

Peaks, memory sizes and link rates are the makers' figures. The attention rates of TPUs are not
measured on a chip. They come from the bundles (cycles) in the static schedule of the compiled
Splash kernel, for a block of 512 queries and 1536 keys with head width 64, at the clock that gives
the peak. Head width 128 takes as many bundles for twice the work. The rates of the other kernels
are four fifths of what the memory and their bundles allow, at width 3072: the backward pass of
models/modulated_norm.py, and the forward pass of models/heads.py. The rates of GPUs were measured
on an H200 (benchmarks/results/gpu.md), but for that of 8 bits. TPUs need none for products: the
compiler's cycles are those of the products' own type.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One JAX device. Rates are per second, sizes in bytes."""

    name: str  # as in a topology's name
    device_kind: str
    peak_flops: float  # bfloat16
    memory: float  # what a program may use, by the compiler
    clock: float  # Hz
    cores: int
    link: float  # bytes a second in one direction of one torus link
    attention_forward: float  # useful FLOP/s of Splash at head width 64
    attention_backward: float
    attention_split_backward: float
    norms: float  # bytes a second that the kernels of norms read and write
    heads: float  # and those that prepare heads for attention
    devices: int = 1  # JAX devices of one chip, which share its links


@dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """A GPU. `link` is a quarter of the rate at which it sends to the other GPUs of its host."""

    matmul: float  # FLOP/s that matrix products reach
    matmul_8_bits: float  # the same in int8 or fp8
    bandwidth: float  # bytes a second of its memory, reading and writing
    network: float  # bytes a second that each device sends to other hosts


# Attention forward, backward and split backward; norms; heads (see `Chip`).
KERNELS = {
    "v5p": (190e12, 196e12, 140e12, 1.9e12, 0.83e12),
    "v6e": (140e12, 165e12, 122e12, 1.3e12, 0.58e12),
    "v5e": (80e12, 80e12, 57e12, 0.66e12, 0.35e12),
    "tpu7x": (157e12, 175e12, 130e12, 1.6e12, 0.75e12),
}
CHIPS = (
    Chip("v5p", "TPU v5", 459e12, 95.74 * 2**30, 1.75e9, 2, 90e9, *KERNELS["v5p"]),
    Chip("v6e", "TPU v6 lite", 918e12, 31.25 * 2**30, 1.75e9, 1, 90e9, *KERNELS["v6e"]),
    Chip("v5e", "TPU v5 lite", 197e12, 15.75 * 2**30, 1.5e9, 1, 45e9, *KERNELS["v5e"]),
    # Ironwood; a device is half a chip. Its clock is not published: 2.2 GHz is an assumption.
    Chip("tpu7x", "TPU7x", 1153.5e12, 94.75 * 2**30, 2.2e9, 1, 50e9, *KERNELS["tpu7x"], devices=2),
)

GPUS = tuple(
    Gpu(
        name,
        kind,
        989e12,
        0.95 * memory * 2**20,
        1.98e9,
        1,
        112.5e9,
        *(430e12, 334e12, 334e12),  # the backward pass as useful FLOPs, twice the forward pass's
        norms=bandwidth,
        heads=bandwidth,
        matmul=800e12,
        matmul_8_bits=1600e12,  # not measured: the same share of the data sheet's 1,979e12
        bandwidth=bandwidth,
        network=50e9,  # 400 Gb/s: an assumption
    )
    for name, kind, memory, bandwidth in (
        ("h100", "NVIDIA H100 80GB HBM3", 81559, 2.4e12),  # scaled by the data sheets
        ("h200", "NVIDIA H200", 143771, 3.3e12),
    )
)


def chip_of(device_kind: str) -> Chip:
    """Return the chip of a device kind. Raises ValueError for one that is not in the table."""
    for chip in CHIPS:
        if chip.device_kind == device_kind:
            return chip
    known = ", ".join(chip.name for chip in CHIPS)
    raise ValueError(f"unknown device kind {device_kind!r}; known chips are {known}")


def peak_flops(device_kind: str) -> float | None:
    """Return the bfloat16 FLOP/s of a device kind by its data sheet; None if it is not known."""
    chip = find_chip(device_kind)
    return chip and chip.peak_flops


def find_chip(device_kind: str | None) -> Chip | None:
    """Return the TPU or GPU of a device kind; None for one that is not in the table."""
    known = (chip for chip in (*CHIPS, *GPUS) if chip.device_kind == device_kind)
    return next(known, None)
