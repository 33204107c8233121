"""Examine the hosts of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tyro.conf import Positional

from easyanimate_jax import processes
from easyanimate_jax.commands import parse

HELP = """Examine the hosts of a run; start it as you start the training, on every host.

It compares what the processes see (devices, versions, clocks, folders) and sums over all devices.
With a config it also checks the mesh, and the state against memory and disk. Process 0 prints a
table. Exit code 0: all is well; 1: something is not; 2: wrong arguments.

Every field of the config is an option, `--field value`; `CONFIG --help` lists them."""


@dataclass(frozen=True)
class Options:
    config: Positional[str | None] = None
    """Python file that defines `config`, as those of configs/."""


def main(arguments: Sequence[str]) -> int:
    return parse.run(partial(_examine, arguments))


def _examine(arguments: Sequence[str]) -> int:
    _, config = parse.options_and_config(Options, arguments, "doctor", HELP, ("TrainConfig",))
    import jax

    from easyanimate_jax.runs.doctor import examine, table

    processes.join()
    findings = examine(config)
    if jax.process_index() == 0:
        print(table(findings))
    return 0 if all(finding.good for finding in findings) else 1
