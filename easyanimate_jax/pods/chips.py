"""A table of TPU chips: data-sheet peaks, and rates of the attention kernel.

Peaks, memory sizes and link rates are the makers' figures. Attention rates are not measured on a
chip. They come from the bundles (cycles) in the static schedule of the compiled Splash kernel, for
a block of 512 queries and 1536 keys with head width 64, at the clock that gives the peak. Head
width 128 takes as many bundles for twice the work.
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
    devices: int = 1  # JAX devices of one chip, which share its links


CHIPS = (
    Chip("v5p", "TPU v5", 459e12, 95.74 * 2**30, 1.75e9, 2, 90e9, 190e12, 196e12, 140e12),
    Chip("v6e", "TPU v6 lite", 918e12, 31.25 * 2**30, 1.75e9, 1, 90e9, 140e12, 165e12, 122e12),
    Chip("v5e", "TPU v5 lite", 197e12, 15.75 * 2**30, 1.5e9, 1, 45e9, 80e12, 80e12, 57e12),
    # Ironwood; a device is half a chip. Its clock is not published: 2.2 GHz is an assumption.
    Chip("tpu7x", "TPU7x", 1153.5e12, 94.75 * 2**30, 2.2e9, 1, 50e9, 157e12, 175e12, 130e12, 2),
)


def chip_of(device_kind: str) -> Chip:
    """Return the chip of a device kind. Raises ValueError for one that is not in the table."""
    for chip in CHIPS:
        if chip.device_kind == device_kind:
            return chip
    known = ", ".join(chip.name for chip in CHIPS)
    raise ValueError(f"unknown device kind {device_kind!r}; known chips are {known}")
