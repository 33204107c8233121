"""A run folder as something to sample from: the averaged weights, the text encoders, the VAE."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.runs.config import TrainConfig, from_json
from easyanimate_jax.text.encode import TextEncoder
from easyanimate_jax.weights.folder import load_mmdit, load_vae
from easyanimate_jax.weights.module import with_weights
from easyanimate_jax.weights.run_folder import read_meta


class Resident:
    """The parts of a `LatentDiffusion` and its text encoders, each read when it is asked for.

    With `alone` a part takes the place of the one before it, so that memory holds one of the three.
    Whoever keeps a part keeps it from being freed: ask again instead.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        process: DDPM | Flow,
        read: Mapping[str, Callable],
        *,
        alone: bool = False,
    ):
        self.config, self.process = config, process
        self._read, self._alone, self._parts = read, alone, {}

    @property
    def encoder(self) -> TextEncoder:
        return self._part("encoder")

    @property
    def model(self) -> MMDiT:
        return self._part("model")

    @property
    def vae(self) -> CausalVAE:
        return self._part("vae")

    def _part(self, name: str):
        if name not in self._parts:
            if self._alone:
                self._parts.clear()
            self._parts[name] = self._read[name]()
        return self._parts[name]


class Run(NamedTuple):
    step: int
    config: TrainConfig
    diffusion: Resident

    @property
    def encoder(self) -> TextEncoder:
        return self.diffusion.encoder

    @property
    def vae(self) -> CausalVAE:
        return self.diffusion.vae


def load_run(
    folder: str | Path, step: int | None = None, *, alone: bool = False, int8: bool = False
) -> Run:
    """The newest (or the named) checkpoint of a run folder, on the current mesh if there is one.

    `alone` as in `Resident`; with `int8` the transformer's kernels are stored in eight bits. Raises
    ValueError where there is no checkpoint, or one that does not fit this version.
    """
    step, meta = read_meta(folder, step)
    training = from_json(json.dumps(meta["config"]))
    config = dataclasses.replace(training.model, in_channels=meta["in_channels"])
    mesh = None if jax.sharding.get_mesh().empty else jax.sharding.get_mesh()
    if int8 and mesh is not None:
        raise ValueError("eight-bit weights are for one device: leave out the mesh, or int8")

    def read_model():
        if not int8:
            return load_mmdit(folder, step=step, mesh=mesh, store=_kernels(config.dtype))
        from easyanimate_jax.models.int8 import store

        return load_mmdit(folder, step=step, store=store)

    read = {
        "encoder": lambda: TextEncoder.load(training.text),
        "model": read_model,
        "vae": lambda: as_computed(load_vae(training.vae)),
    }
    return Run(step, training, Resident(config, training.process, read, alone=alone))


def as_computed(vae: CausalVAE) -> CausalVAE:
    """The VAE with its kernels in the type that it computes in."""
    return with_weights(vae, _kernels(vae.config.dtype))


def _kernels(dtype) -> Callable:
    """Kernels as they are computed with: every use would round them so."""
    return lambda name, x: x.astype(dtype) if name.endswith("kernel") else x
