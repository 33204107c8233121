"""Measure a trained autoencoder: PSNR and pictures of held-out clips, latent statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from easyanimate_jax.data import media
from easyanimate_jax.facts import to_bytes
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.training.vae.config import VAEStage, VAETrainConfig
from easyanimate_jax.training.vae.crops import Clips, Crops, pixels

MEASURED = 64  # held-out crops over which the PSNR is averaged
PICTURED = 4  # crops in a picture
STATISTICS = 16  # batches from which the latent statistics are computed


class HeldOut:
    """Crops of held-out clips, in the shape of the last stage; they are the same at every step."""

    def __init__(self, clips: Clips, config: VAETrainConfig):
        self.crops, self.stage = Crops(clips.held_out, config.seed), config.stages[-1]
        self.last = None  # (step, result)

    def __call__(self, vae: CausalVAE, step: int) -> tuple[float, UInt8[np.ndarray, "H W 3"]]:
        """Return the mean PSNR in dB over `MEASURED` crops, and a picture of the first ones.

        In the picture the frames of a crop stand side by side, and their reconstruction below.
        """
        if self.last is None or self.last[0] != step:
            self.last = step, self._measure(vae)
        return self.last[1]

    def _measure(self, vae: CausalVAE):
        rows = range(self.stage.batch_size)
        numbers = range(-(-MEASURED // self.stage.batch_size))
        errors, shown = [], []
        for frames in (self.crops.batch(self.stage, number, rows) for number in numbers):
            output, error = _reconstruct(vae, frames)
            errors.append(np.asarray(error))
            if len(shown) < PICTURED:
                shown += zip(frames, np.asarray(output), strict=True)
        psnr = float(np.mean(10 * np.log10(4 / np.concatenate(errors))))
        return psnr, media.contact_sheet(np.stack([v for pair in shown[:PICTURED] for v in pair]))


@jax.jit
def _reconstruct(
    vae: CausalVAE, frames: UInt8[Array, "B F H W 3"]
) -> tuple[UInt8[Array, "B F H W 3"], Float[Array, "B"]]:
    """Return the reconstructed frames and the mean squared error of each crop."""
    video = pixels(frames)
    output = jnp.clip(vae.decode(vae.encode(video)[0]), -1, 1)
    return to_bytes(output), jnp.mean((output - video) ** 2, axis=(1, 2, 3, 4))


def with_statistics(vae: CausalVAE, crops: Crops, stage: VAEStage, step: int) -> CausalVAE:
    """Return `vae` with a config that normalises latents to mean 0 and standard deviation 1.

    The statistics are measured on `STATISTICS` batches, from `step` on.
    """
    encode = jax.jit(lambda vae, frames: vae.encode(pixels(frames)))
    rows = range(stage.batch_size)
    moments = [encode(vae, crops.batch(stage, step + i, rows)) for i in range(STATISTICS)]
    means, logvars = (np.concatenate(parts) for parts in zip(*moments, strict=True))
    mean = means.mean((0, 1, 2, 3))
    deviation = np.sqrt(means.var((0, 1, 2, 3)) + np.exp(logvars).mean((0, 1, 2, 3)))
    vae = nnx.clone(vae)
    vae.config = dataclasses.replace(
        vae.config, latent_mean=tuple(mean.tolist()), latent_scale=tuple((1 / deviation).tolist())
    )
    return vae


def local(vae: CausalVAE) -> CausalVAE:
    """Return a copy of a replicated module on the first device of this process."""
    return jax.tree.map(lambda x: x.addressable_data(0), vae)
