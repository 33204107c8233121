"""Start, watch and restart the processes of a run; JAX is not imported."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from easyanimate_jax.commands import parse
from easyanimate_jax.training.safety.supervisor import Supervisor

HELP = """Start, watch and restart the processes of a run on this host.

Write the command of each rank after `--`. Example:

  python -m easyanimate_jax supervise --ranks 2 -- python train.py configs/demo.py

The exit code is that of the ranks: 0 done, 2 wrong input, 3 diverged, 4 hang, 5 storage, 6 another
process of the run is gone, 42 preempted. After 42, run the same command to resume."""


@dataclass(frozen=True)
class Options:
    """The arguments of `supervise`."""

    ranks: int = 1
    """Number of processes on this host."""
    silence: float = 60.0
    """Seconds without a heartbeat after which a rank counts as dead."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `supervise`; return the exit code."""
    return parse.run(partial(_supervise, arguments))


def _supervise(arguments: Sequence[str]) -> int:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = (
        parse.options(Options, arguments[:place], "supervise", HELP),
        arguments[place + 1 :],
    )
    if not command:
        raise ValueError("give the command of a rank behind --, such as -- python train.py CONFIG")
    for name, value in (("ranks", own.ranks), ("silence", own.silence)):
        if not value > 0:
            raise ValueError(f"--{name} {value}: use more than 0")
    supervisor = Supervisor(command, own.ranks, own.silence)
    try:
        return supervisor.run()
    finally:
        shutil.rmtree(supervisor.beats, ignore_errors=True)
