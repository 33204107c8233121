"""Print the schedule of a config without a device."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tyro.conf import Positional

from easyanimate_jax.commands import parse
from easyanimate_jax.training.safety.exits import DONE

HELP = """Print the schedule of a config: parameters, state bytes per device, stages, and every
resolution and duration of every bucket. No device is used.

Every field of the config is an option, `--field value`; `CONFIG --help` lists them."""


@dataclass(frozen=True)
class Options:
    """The arguments of `describe`."""

    config: Positional[str]
    """Python file that defines `config`, such as configs/demo.py."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `describe`; return the exit code."""
    return parse.run(partial(_describe, arguments))


def _describe(arguments: Sequence[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported
    _, config = parse.options_and_config(Options, arguments, "describe", HELP, ("TrainConfig",))
    from easyanimate_jax.runs.describe import describe_run

    print(describe_run(config))
    return DONE
