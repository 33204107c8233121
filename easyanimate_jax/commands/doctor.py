"""Check the hosts of a run before training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tyro.conf import Positional

from easyanimate_jax import processes
from easyanimate_jax.commands import parse
from easyanimate_jax.commands.train import ending
from easyanimate_jax.storage.probe import check_store
from easyanimate_jax.storage.stores import Remote, place
from easyanimate_jax.training.safety.exits import DONE, FOUND

HELP = """Check the hosts of a run. Start this command on every host, as you start the training.

It compares devices, versions, clocks and folders between the processes, and computes a sum over all
devices. With a config it also checks the mesh, and that the state fits memory and disk. Process 0
prints a table. Exit codes: 0, all checks pass; 1, a check fails; 2, wrong arguments; 6, a process
is gone.

Every field of the config is an option, `--field value`; `CONFIG --help` lists them."""


@dataclass(frozen=True)
class Options:
    """The arguments of `doctor`."""

    config: Positional[str | None] = None
    """Python file that defines `config`, such as configs/demo.py."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `doctor`; return the exit code."""
    return ending(partial(_examine, arguments))


def _examine(arguments: Sequence[str]) -> int:
    _, config = parse.options_and_config(Options, arguments, "doctor", HELP, ("TrainConfig",))
    import jax

    from easyanimate_jax.runs.doctor import examine, table

    if config is not None and isinstance(run := place(config.run), Remote):
        check_store("--run", run)

    processes.join()
    findings = examine(config)
    if jax.process_index() == 0:
        print(table(findings))
    return DONE if all(finding.good for finding in findings) else FOUND
