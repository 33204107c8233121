"""A run folder as something to sample from: the averaged weights, the VAE, the config."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from easyanimate_jax.config import TrainConfig, from_json
from easyanimate_jax.convert.folder import load_vae
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.pipelines import LatentDiffusion
from easyanimate_jax.training.checkpoint import read_meta, restore_ema


class Run(NamedTuple):
    step: int
    config: TrainConfig
    model: MMDiT
    vae: CausalVAE

    @property
    def diffusion(self) -> LatentDiffusion:
        return LatentDiffusion(self.model, self.vae, self.config.process)


def load_run(folder: str | Path, step: int | None = None) -> Run:
    """The newest (or the named) checkpoint of a run folder, averaged weights.

    Raises ValueError where there is no checkpoint, or one that does not fit this version.
    """
    step, meta = read_meta(folder, step)
    config = from_json(json.dumps(meta["config"]))
    vae = load_vae(config.vae)
    model = dataclasses.replace(config.model, in_channels=meta["in_channels"])
    like = jax.eval_shape(lambda key: MMDiT(model, rngs=nnx.Rngs(params=key)), jax.random.key(0))
    device = SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), like)
    return Run(step, config, restore_ema(folder, step, like), vae)
