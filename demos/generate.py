"""Generate videos from a run's prompts and inputs, and reconstruct videos with its VAE.

A `run` is the result of `easyanimate_jax.load_pipeline`.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import numpy as np
from jaxtyping import UInt8

from easyanimate_jax import (
    CausalVAE,
    Pipeline,
    Request,
    SampleConfig,
    Sampling,
    TextEncoder,
    text_to_video,
)

ROWS = 32  # videos at once
FOLLOWING = 1.0  # guidance with pictures or controls; more pulls the video away from them
RECONSTRUCTED = 4  # videos per VAE call, so that their features fit the CPU caches

Videos = UInt8[np.ndarray, "B F H W 3"]


def generate(
    run: Pipeline,
    encoder: TextEncoder,
    texts: list[str],
    pipeline: Callable = text_to_video,
    inputs: Mapping[str, np.ndarray] = MappingProxyType({}),
    guidance: float | None = None,
    samples: SampleConfig | None = None,
    sampling: Sampling | None = None,
) -> Videos:
    """Return one video per text with consecutive seeds, at the size and steps of `samples`.

    `inputs` are further arrays of the pipeline such as `start` or `video`, one row per text. The
    default of `samples` and `guidance` is the run's. `sampling` replaces steps and guidance.
    """
    samples, videos = samples or run.samples, []
    sampling = sampling or Sampling(steps=samples.steps, guidance=guidance or samples.guidance)
    empty = encoder.encode([""])
    for first in range(0, len(texts), ROWS):
        rows = slice(first, first + ROWS)
        request = Request(
            encoder.encode(texts[rows]),
            empty,
            size=(samples.frames, samples.height, samples.width),
            seeds=[samples.seed + i for i in range(len(texts))[rows]],
            sampling=sampling,
        )
        given = {name: x[rows] for name, x in inputs.items()}
        videos.append(pipeline(run.diffusion, request, **given))
    return np.concatenate(videos)


def reconstruct(vae: CausalVAE, videos: Videos) -> Videos:
    """Return the videos after encoding and decoding by the VAE, uint8."""
    program = jax.jit(lambda vae, x: vae(x))
    out = []
    for first in range(0, len(videos), RECONSTRUCTED):
        pixels = np.stack(videos[first : first + RECONSTRUCTED]).astype(np.float32) / 127.5 - 1
        pixels = np.asarray(program(vae, pixels))
        out += list(((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8))
    return out


def psnr(a, b) -> float:
    """Return the peak signal-to-noise ratio over all frames, in dB."""
    error = np.mean(
        [np.mean((np.float32(x) - np.float32(y)) ** 2) for x, y in zip(a, b, strict=True)]
    )
    return float(20 * math.log10(255) - 10 * math.log10(max(error, 1e-9)))
