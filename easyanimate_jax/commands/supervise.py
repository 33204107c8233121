"""Start the processes of a run, watch and restart them; imports nothing heavy."""

import argparse
import shutil
from collections.abc import Sequence

from easyanimate_jax.training.safety.supervisor import Supervisor


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m easyanimate_jax supervise")
    parser.add_argument("--ranks", type=int, default=1, help="processes on this host")
    parser.add_argument("--silence", type=float, default=60.0, help="seconds without a heartbeat")
    parser.add_argument("command", nargs="+", help="after --: what each rank runs")
    a = parser.parse_args(arguments)
    supervisor = Supervisor(a.command, a.ranks, a.silence)
    try:
        return supervisor.run()
    finally:
        shutil.rmtree(supervisor.beats, ignore_errors=True)
