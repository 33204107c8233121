"""Distances between videos: PSNR, SSIM, and the Fréchet distance between two sets of features.

Sources: SSIM from Wang et al., "Image quality assessment: from error visibility to structural
similarity", 2004; the distance from Heusel et al., "GANs trained by a two time-scale update rule",
2017. Letters: N videos of a set, D numbers of a feature.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

SIGMA, WINDOW = 1.5, 11  # pixels: the window of SSIM, and its width
STABLE = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # the constants C1 and C2 of SSIM
RESAMPLED = 200  # resampled sets behind an interval
PERCENT = (2.5, 97.5)  # of a 95 % interval

Video = UInt8[np.ndarray, "F H W 3"]


class Measured(NamedTuple):
    """A figure, and the interval in which 95 of 100 such figures of resampled videos lie."""

    value: float
    low: float
    high: float


def psnr(a: Video, b: Video) -> float:
    """Return the peak signal-to-noise ratio over all frames, in dB; at most 100."""
    error = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2)
    return float(min(100.0, 20 * math.log10(255) - 10 * math.log10(max(error, 1e-20))))


def ssim(a: Video, b: Video) -> float:
    """Return the structural similarity, averaged over frames, colours and pixels.

    Raises ValueError if a side is smaller than the window.
    """
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} pixels a side, and a video has {a.shape[1:3]}")
    return float(np.mean([_ssim(*pair) for pair in zip(a, b, strict=True)]))


def _ssim(a: UInt8[np.ndarray, "H W 3"], b: UInt8[np.ndarray, "H W 3"]) -> float:
    def blur(x):
        return cv2.GaussianBlur(x, (WINDOW, WINDOW), SIGMA)

    a, b, (c1, c2) = a.astype(np.float64), b.astype(np.float64), STABLE
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    value = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    value /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    rim = WINDOW // 2  # here the window leaves the picture
    return float(value[rim : -rim or None, rim : -rim or None].mean())


def mean(values: Sequence[float], seed: int = 0) -> Measured:
    """Return the mean of the videos' figures."""
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(RESAMPLED)]
    return Measured(float(values.mean()), *map(float, np.percentile(means, PERCENT)))


def frechet(real: Float[np.ndarray, "N D"], made: Float[np.ndarray, "_N D"]) -> float:
    """Return the Fréchet distance between Gaussians of the features of real and made videos.

    Raises ValueError for fewer than two videos, and for features that are not finite.
    """
    for name, features in (("real", real), ("made", made)):
        if len(features) < 2:
            raise ValueError(f"the distance needs 2 {name} videos or more, and has {len(features)}")
        if not np.isfinite(features).all():
            raise ValueError(f"features of {name} videos are not finite")
    means, roots = [], []
    for features in (real, made):
        features = np.asarray(features, np.float64)
        means.append(features.mean(axis=0))
        root = (features - means[-1]) / math.sqrt(len(features) - 1)
        roots.append(np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root)
    a, b = roots  # the covariances are a.T @ a and b.T @ b
    # The singular values of a @ b.T are the roots of the eigenvalues of the covariances' product.
    product = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    gap = np.sum((means[0] - means[1]) ** 2) + np.sum(a * a) + np.sum(b * b) - 2 * product
    return float(max(gap, 0.0))


def frechet_interval(
    real: Float[np.ndarray, "N D"], made: Float[np.ndarray, "_N D"], seed: int = 0
) -> Measured:
    """Return the Fréchet distance with its interval.

    Resampled sets repeat videos, which raises their distance. The interval is moved down by the
    mean rise, so that it tells the spread about the value. The value itself is too high for few
    videos: compare figures of equally many only.
    """
    value, rng = frechet(real, made), np.random.default_rng(seed)
    found = [
        frechet(*(x[rng.integers(len(x), size=len(x))] for x in (real, made)))
        for _ in range(RESAMPLED)
    ]
    low, high = np.percentile(found, PERCENT) - (np.mean(found) - value)
    return Measured(value, float(max(low, 0.0)), float(high))
