"""Start the processes of a run, watch and restart them; imports nothing heavy."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from easyanimate_jax.commands import parse
from easyanimate_jax.training.safety.supervisor import Supervisor

HELP = """Start the processes of a run on this host, watch them, and start them again.

Behind `--` comes the command of each rank. Example:

  python -m easyanimate_jax supervise --ranks 2 -- python train.py configs/demo.py

Exit codes, those of the ranks: 0 done, 2 wrong input, 3 diverged, 4 hang, 5 storage, 42 preempted:
run the same command again to go on."""


@dataclass(frozen=True)
class Options:
    ranks: int = 1
    """Processes on this host."""
    silence: float = 60.0
    """Seconds without a heartbeat after which a rank counts as dead."""


def main(arguments: Sequence[str]) -> int:
    return parse.run(partial(_supervise, arguments))


def _supervise(arguments: Sequence[str]) -> int:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = (
        parse.options(Options, arguments[:place], "supervise", HELP),
        arguments[place + 1 :],
    )
    if not command:
        raise ValueError("give the command of a rank behind --, as in -- python train.py CONFIG")
    for name, value in (("ranks", own.ranks), ("silence", own.silence)):
        if not value > 0:
            raise ValueError(f"--{name} {value}: use more than 0")
    supervisor = Supervisor(command, own.ranks, own.silence)
    try:
        return supervisor.run()
    finally:
        shutil.rmtree(supervisor.beats, ignore_errors=True)
