"""The samples that a run makes while it trains, always with the same seeds.

    RUN/samples/STEP.npz, .png          the config's prompts
    RUN/samples/STEP_clips.npz, .png    held-out clips, made again, below the true ones

A held-out clip is made again from its caption and from what its task gives beside it: its own
first picture, or its own control video or camera. All processes take part, and the first one
writes.
"""

import logging
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt8

from easyanimate_jax.data import media, records
from easyanimate_jax.data.loader import Batch, Loader
from easyanimate_jax.diffusion.tasks import TASKS, TaskName
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.generation.pipelines import (
    LatentDiffusion,
    Request,
    condition_to_video,
    image_to_video,
    text_to_video,
)
from easyanimate_jax.generation.pixels import decode
from easyanimate_jax.models.mmdit import MMDiT, unpatchify
from easyanimate_jax.runs.batches import place
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.sharding import moved, shardings
from easyanimate_jax.storage.stores import place as place_of
from easyanimate_jax.training.metrics import MetricsWriter
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.weights.defaults import RELEASED, Defaults, of_objective, of_source
from easyanimate_jax.weights.folder import load_vae

logger = logging.getLogger(__name__)


def rows_of(loader: Loader, number: int, mesh: Mesh) -> Batch:
    """Return the rows of a batch of a loader, without padding rows, on every host."""
    count = len(loader.plan(number)[1])
    whole = NamedSharding(mesh, PartitionSpec())
    arrays = place(loader.batch(number)[1], mesh)
    arrays = jax.jit(lambda batch: batch, out_shardings=whole)(arrays)
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:count], arrays)


def rebuilt(vae, batch: Batch, grid: tuple[int, int, int]) -> UInt8[np.ndarray, "B F H W 3"]:
    """Return the videos that the VAE decodes from the latents of rows of one grid."""
    latents = batch.mean[:, : math.prod(grid)].astype(np.float32)
    return decode(vae, unpatchify(latents, grid))


def made_again(
    diffusion, task: TaskName, request: Request, batch: Batch, true: UInt8[np.ndarray, "B F H W 3"]
) -> UInt8[np.ndarray, "B F H W 3"]:
    """Return new videos of the rows of a batch, from what their task gives beside the caption.

    This is the first picture of `true`, or the rows' own control or camera.
    """
    if TASKS[task].is_control:
        tokens = math.prod(batch.grid[0].tolist())
        condition = batch.condition[:, :tokens].astype(np.float32)
        return condition_to_video(diffusion, request, condition=condition)
    if task == "i2v" and true.shape[1] > 1:
        return image_to_video(diffusion, request, start=true[:, 0])
    return text_to_video(diffusion, request)


class Sampler:
    """Samples the config's prompts and held-out clips with the averaged weights.

    `meshes` has the mesh of each stage, `held_out` a loader for each stage, or none. `writer` is
    None in all processes but the first, which write nothing.
    """

    def __init__(
        self, config: TrainConfig, meshes: Mapping[str, Mesh], held_out: dict[str, Loader]
    ):
        self.config, self.meshes = config, meshes
        self.held_out = held_out if config.samples.clips else {}
        self.folder = config.folder / "samples"
        self.writer: MetricsWriter | None = None
        self.wanted = bool(config.samples.every and (config.samples.prompts or self.held_out))
        init = config.init if config.step.taught else ""
        self.teacher = of_source(init, config.init_step) if init else RELEASED
        if self.wanted:
            self.vae = load_vae(config.vae, mesh=meshes[config.stages[0].name])
            self.empty = records.read_texts(place_of(config.prepared) / "empty.safetensors")
        if self.wanted and config.samples.prompts:
            self.texts = records.read_texts(place_of(config.prepared) / "prompts.safetensors")

    def __call__(self, stage: Stage, model: MMDiT, step: int) -> None:
        """Sample what the model of a stage can show, after `step` updates."""
        if not self.wanted:
            return
        with jax.set_mesh(self.meshes[stage.name]):
            self._sample(stage, model, step)

    def _sample(self, stage: Stage, model: MMDiT, step: int) -> None:
        self.vae = moved(self.vae, shardings(self.meshes[stage.name], self.vae))
        diffusion = LatentDiffusion(model, self.vae, self.config.process)
        if self.config.samples.prompts and not TASKS[stage.task].is_control:
            self._write(f"{step:07d}", videos=self._prompts(stage, diffusion))
        if stage.name in self.held_out:
            true, made = self._clips(stage, diffusion)
            self._write(f"{step:07d}_clips", true=true, videos=made)
            if self.writer is not None:
                for number, pair in enumerate(zip(true, made, strict=True)):
                    film = np.concatenate(pair, axis=2)  # side by side, the true one on the left
                    rate = self.config.set(stage.data).fps
                    self.writer.film(f"held-out {stage.task}/{number}", step, film, rate)

    def _prompts(self, stage: Stage, diffusion: LatentDiffusion) -> UInt8[np.ndarray, "B F H W 3"]:
        samples = self.config.samples
        size = samples.frames, samples.height, samples.width
        seeds = [samples.seed] * len(samples.prompts)
        return text_to_video(diffusion, self._request(stage, self.texts, size, seeds))

    def _clips(self, stage: Stage, diffusion: LatentDiffusion) -> tuple[np.ndarray, np.ndarray]:
        """Return the true and the new videos of held-out clips, uint8 (B, F, H, W, 3) each."""
        loader = self.held_out[stage.name]
        batch, ids = self._batch(loader, self.meshes[stage.name])
        grids = [tuple(grid.tolist()) for grid in batch.grid]
        grid = max(dict.fromkeys(grids), key=grids.count)  # one size, so one program
        rows = [i for i, one in enumerate(grids) if one == grid][: self.config.samples.clips]
        batch = jax.tree.map(lambda x: x[rows], batch)
        true = rebuilt(self.vae, batch, grid)
        seeds = [loader.plan.keys[ids[row]] for row in rows]
        texts = tuple(text.astype(np.float32) for text in batch.texts)
        request = self._request(stage, texts, true.shape[1:4], seeds)
        return true, made_again(diffusion, stage.task, request, batch, true)

    def _batch(self, loader: Loader, mesh: Mesh) -> tuple[Batch, list[int]]:
        """Return the largest held-out batch on the host, without padding rows, and its records."""
        number = max(range(len(loader.plan)), key=lambda i: len(loader.plan(i)[1]))
        return rows_of(loader, number, mesh), loader.plan(number)[1].tolist()

    def _request(self, stage: Stage, texts, size: tuple[int, int, int], seeds) -> Request:
        samples = self.config.samples
        name, process = type(stage.objective).__name__, type(self.config.process).__name__
        own = Defaults(samples.steps, samples.guidance)
        steps = getattr(stage.objective, "steps", None)
        own = of_objective(name, steps, process, own, self.teacher)
        sampling = Sampling(**own.filled())
        return Request(texts, self.empty, size=size, seeds=seeds, sampling=sampling)

    def _write(self, name: str, **videos: UInt8[np.ndarray, "B F H W 3"]) -> None:
        """Write arrays of videos, and a picture with a row for each video of each array."""
        if self.writer is None:
            return
        pairs = (one[None] for row in zip(*videos.values(), strict=True) for one in row)
        sheet = np.concatenate([media.contact_sheet(one) for one in pairs])
        try:
            self.folder.mkdir(exist_ok=True)
            np.savez_compressed(self.folder / f"{name}.npz", **videos)
            media.write_png(self.folder / f"{name}.png", sheet)
        except OSError as error:  # a full disk costs the samples, not the run
            logger.warning("the samples %s were not written: %s", name, error)
