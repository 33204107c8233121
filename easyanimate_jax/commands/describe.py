"""Print the schedule of a config without touching a device."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tyro.conf import Positional

from easyanimate_jax.commands import parse

HELP = """Print the schedule of a config: parameters, state bytes per device, stages, and every
resolution and duration of every bucket. No device is touched.

Every field of the config is an option, `--field value`; `CONFIG --help` lists them."""


@dataclass(frozen=True)
class Options:
    config: Positional[str]
    """Python file that defines `config`, as those of configs/."""


def main(arguments: Sequence[str]) -> int:
    return parse.run(partial(_describe, arguments))


def _describe(arguments: Sequence[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported
    _, config = parse.options_and_config(Options, arguments, "describe", HELP, ("TrainConfig",))
    from easyanimate_jax.runs.describe import describe_run

    print(describe_run(config))
    return 0
