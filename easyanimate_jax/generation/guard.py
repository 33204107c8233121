"""Checks that find black, flat, noisy or motionless output, and name its likely cause."""

import numpy as np
from jaxtyping import UInt8

DARK = 6  # of 255; a video is black if its 99.9th percentile is at most this
FLAT = 3  # a video is flat below this standard deviation of all pixels
STILL = 0.05  # a video is still below this mean change from frame to frame
UNRELATED = 0.35  # correlation of neighbouring pixels; films have more than 0.8


def suspicion(video: UInt8[np.ndarray, "F H W 3"]) -> str:
    """Return one line that names the visible fault and its likely cause, or "" without a fault."""
    pixels = video.astype(np.float32)
    if np.percentile(pixels, 99.9) <= DARK:
        return (
            "the video is black: the weights are not finite or the guidance is far too high; "
            "use an earlier checkpoint, or less guidance"
        )
    if pixels.std() < FLAT:
        return (
            "the video is one flat colour: the transformer or the VAE has hardly been trained, or "
            "they do not belong together; check the step of the checkpoint and its VAE"
        )
    a, b = (pixels[:, :, s].ravel() for s in (slice(None, -1), slice(1, None)))
    if np.corrcoef(a, b)[0, 1] < UNRELATED:
        return (
            "the video is noise: there are too few steps, the weights are not trained enough, or "
            "the sampler belongs to another noise process"
        )
    if len(video) > 1 and np.abs(np.diff(pixels, axis=0)).mean() < STILL:
        return (
            "the video does not move: the model was trained on pictures only, or the given "
            "pictures stop the motion; use a later stage, more guidance or more --picture-noise"
        )
    return ""
