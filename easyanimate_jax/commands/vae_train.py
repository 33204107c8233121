"""Train a video autoencoder by a VAE's config; run the same command to resume."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tyro.conf import Positional

from easyanimate_jax.commands import parse
from easyanimate_jax.commands.train import ending, run_config

HELP = """Train a video autoencoder. Run the same command to resume.

Every field of the config is an option, `--field value`; `CONFIG --help` lists them. Example:

  python -m easyanimate_jax vae-train configs/demo_vae.py --stages.0.steps 10"""


@dataclass(frozen=True)
class Options:
    """The arguments of `vae-train`."""

    config: Positional[str]
    """Python file that defines a VAETrainConfig `config`, such as configs/demo_vae.py."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `vae-train`; return the exit code."""
    return ending(partial(_train, arguments))


def _train(arguments: Sequence[str]) -> int:
    kinds = ("VAETrainConfig",)
    _, config = parse.options_and_config(Options, arguments, "vae-train", HELP, kinds)
    return run_config(config)
