"""What is visibly wrong with a generated video, and the likely cause."""

import numpy as np
from jaxtyping import UInt8

DARK = 6  # of 255: not even the brightest thousandth is above
FLAT = 3  # standard deviation of all pixels
STILL = 0.05  # mean change from frame to frame
UNRELATED = 0.35  # correlation of neighbouring pixels; of films it is above 0.8


def suspicion(video: UInt8[np.ndarray, "F H W 3"]) -> str:
    """One line that names black, flat, noisy or motionless output and its cause; "" if none."""
    pixels = video.astype(np.float32)
    if np.percentile(pixels, 99.9) <= DARK:
        return (
            "the video is black: the weights are not finite or the guidance is far too high; "
            "sample an earlier checkpoint, or less guidance"
        )
    if pixels.std() < FLAT:
        return (
            "the video is one flat colour: the transformer or the VAE has hardly been trained, or "
            "they do not belong together; check the checkpoint's step and its VAE"
        )
    a, b = (pixels[:, :, s].ravel() for s in (slice(None, -1), slice(1, None)))
    if np.corrcoef(a, b)[0, 1] < UNRELATED:
        return (
            "the video is noise: too few steps, weights that are not trained yet, or a sampler of "
            "another noise process"
        )
    if len(video) > 1 and np.abs(np.diff(pixels, axis=0)).mean() < STILL:
        return (
            "the video does not move: the model was trained on pictures only, or the given "
            "pictures hold it; use a later stage, more guidance or more --picture-noise"
        )
    return ""
