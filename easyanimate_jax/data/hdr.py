"""Map high dynamic range video (PQ and HLG, ITU-R BT.2100) to standard dynamic range.

Reference white, 203 cd/m2 by BT.2408, maps to 255; brighter values are clipped. Colours are
converted from BT.2020 to BT.709 primaries, and light to levels by the 2.4 gamma of BT.1886.
"""

import functools

import numpy as np
from jaxtyping import UInt8, UInt16

PQ, HLG = 16, 18  # FFmpeg's numbers of the transfer characteristics
BT709, UNKNOWN, BT2020 = 1, 2, 9  # FFmpeg's numbers of the primaries
WHITE = 203.0  # cd/m2
HLG_PEAK, HLG_GAMMA = 1000.0, 1.2
LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020
TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)  # ITU-R BT.2087


def to_sdr(
    rgb: UInt16[np.ndarray, "H W 3"], transfer: int, primaries: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Return 8-bit BT.709 levels of a 16-bit frame. Raises ValueError for unsupported primaries."""
    if primaries not in (BT709, UNKNOWN, BT2020):
        raise ValueError(f"is HDR with primaries {primaries}; only BT.2020 and BT.709 are mapped")
    light = _light(transfer)[rgb]
    if transfer == HLG:  # the display's gamma applies to the luminance
        light *= (light @ LUMA)[..., None] ** np.float32(HLG_GAMMA - 1) * (HLG_PEAK / WHITE)
    if primaries != BT709:
        light = light @ TO_BT709.T
    return np.rint(np.clip(light, 0, 1) ** np.float32(1 / 2.4) * 255).astype(np.uint8)


@functools.cache
def _light(transfer: int) -> np.ndarray:
    """Return the light of every level: of PQ relative to reference white, of HLG from 0 to 1."""
    x = np.arange(65536) / 65535
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = x ** (1 / m2)
        light = (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * 10_000 / WHITE
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(x <= 0.5, x**2 / 3, (np.exp((x - c) / a) + b) / 12)
    return light.astype(np.float32)
