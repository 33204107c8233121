"""Train a video autoencoder by a VAE's config; run the same command to resume."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tyro.conf import Positional

from easyanimate_jax.commands import parse

HELP = """Train a video autoencoder. Run the same command to resume.

Every field of the config is an option, `--field value`; `CONFIG --help` lists them. Example:

  python -m easyanimate_jax vae-train configs/demo_vae.py --stages.0.steps 10"""


@dataclass(frozen=True)
class Options:
    config: Positional[str]
    """Python file that defines a `config` of class VAETrainConfig, as configs/demo_vae.py."""


def main(arguments: Sequence[str]) -> int:
    return parse.run(partial(_train, arguments))


def _train(arguments: Sequence[str]) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # JAX's default is 75 %
    kinds = ("VAETrainConfig",)
    _, config = parse.options_and_config(Options, arguments, "vae-train", HELP, kinds)
    return train(config)


def train(config) -> int:
    """Train by a VAETrainConfig; return the exit code."""
    from easyanimate_jax.training.vae import loop
    from easyanimate_jax.weights.folder import load_vae

    start = load_vae(config.init, dtype=config.vae.dtype) if config.init else None
    loop.train(config, start)
    return 0
