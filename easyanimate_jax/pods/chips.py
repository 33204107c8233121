"""What is known of TPU chips: data-sheet peaks, and rates of the attention kernel.

Peaks, memory bandwidth and link rates are the makers' figures. Attention rates are not measured on
a chip: they are the bundles (cycles) of the compiled Splash kernel for a block of 512 queries and
1536 keys at heads of 64, counted in its static schedule, at the clock that gives the peak. A kernel
takes as many bundles for heads of 128, which are twice the work.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them. Rates are per second, sizes in bytes."""

    name: str  # as in a topology's name
    device_kind: str
    peak_flops: float  # bfloat16
    memory: float  # what the compiler lets a program use
    clock: float  # Hz
    cores: int
    link: float  # bytes one way over one link of a torus direction
    attention_forward: float  # useful FLOP/s of Splash at heads of 64
    attention_backward: float
    attention_split_backward: float
    devices: int = 1  # of one chip, which share its links


CHIPS = (
    Chip("v5p", "TPU v5", 459e12, 95.74 * 2**30, 1.75e9, 2, 90e9, 190e12, 196e12, 140e12),
    Chip("v6e", "TPU v6 lite", 918e12, 31.25 * 2**30, 1.75e9, 1, 90e9, 140e12, 165e12, 122e12),
    Chip("v5e", "TPU v5 lite", 197e12, 15.75 * 2**30, 1.5e9, 1, 45e9, 80e12, 80e12, 57e12),
    # Ironwood, half a chip. Its clock is not published: 2.2 GHz is an assumption.
    Chip("tpu7x", "TPU7x", 1153.5e12, 94.75 * 2**30, 2.2e9, 1, 50e9, 157e12, 175e12, 130e12, 2),
)


def chip_of(device_kind: str) -> Chip:
    """The chip of a device. Raises ValueError for one that is not in the table."""
    for chip in CHIPS:
        if chip.device_kind == device_kind:
            return chip
    known = ", ".join(chip.name for chip in CHIPS)
    raise ValueError(f"nothing is known of device kind {device_kind!r}; known chips are {known}")
