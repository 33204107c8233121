"""The samples that a run makes while it trains, always with the same seed."""

from pathlib import Path

import jax
import numpy as np

from easyanimate_jax.data import media, records
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.generation.pipelines import LatentDiffusion, Request, text_to_video
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.weights.folder import load_vae


class Sampler:
    """Samples the config's prompts with the averaged weights; writes an array and a picture."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.run) / "samples"
        # Sampling has its own programs, which do not support arrays of several processes.
        self.prompts = config.samples.prompts if jax.process_count() == 1 else ()
        if self.prompts:
            self.vae = load_vae(config.vae)
            self.texts = records.read_texts(Path(config.prepared) / "prompts.safetensors")
            self.empty = records.read_texts(Path(config.prepared) / "empty.safetensors")

    def __call__(self, model: MMDiT, step: int) -> None:
        """Sample the prompts, if there are any, and write `samples/STEP.npz` and `.png`.

        The array `videos` is uint8 of shape (prompts, F, H, W, 3).
        """
        samples = self.config.samples
        if not self.prompts:
            return
        request = Request(
            self.texts,
            self.empty,
            size=(samples.frames, samples.height, samples.width),
            seeds=[samples.seed] * len(self.prompts),
            sampling=Sampling(steps=samples.steps, guidance=samples.guidance),
        )
        videos = text_to_video(LatentDiffusion(model, self.vae, self.config.process), request)
        self.folder.mkdir(exist_ok=True)
        np.savez_compressed(self.folder / f"{step:07d}.npz", videos=videos)
        media.write_png(self.folder / f"{step:07d}.png", media.contact_sheet(videos))
