"""Goodput that is to be expected of a pod: a model, fed by a save stall and a time to recover.

    python benchmarks/reliability/goodput_model.py [--stall 1] [--recovery 130]

Faults come at random, one in 51,000 chip-hours: 419 unexpected interruptions in 54 days on 16,384
chips (Llama 3, arXiv 2407.21783, table 5). Checkpoints are made as often as is best (Young 1974):
every sqrt(2 x stall x time between faults) seconds. A fault costs half of that, and the recovery.
The defaults are a budget, not measurements: 1 s of stall; 10 s to notice, 60 s to start again, 60 s
to restore.
"""

import argparse
import math

from tiny import write_results

CHIP_HOURS = 51_000


def goodput(chips: int, stall: float, recovery: float) -> tuple[float, float, float]:
    """(share of time in new steps, seconds between faults, seconds between checkpoints)."""
    between = CHIP_HOURS * 3600 / chips
    interval = math.sqrt(2 * stall * between)
    return 1 - stall / interval - (interval / 2 + recovery) / between, between, interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stall", type=float, default=1.0, help="seconds that a save stops steps")
    parser.add_argument("--recovery", type=float, default=130.0, help="seconds from fault to steps")
    a = parser.parse_args()
    lines = [f"assumed: {a.stall:g} s of stall, {a.recovery:g} s to recover"]
    for chips in (1024, 4096, 16_384):
        share, between, interval = goodput(chips, a.stall, a.recovery)
        lines.append(
            f"{chips:,} chips: a fault in {between / 3600:.1f} h, a checkpoint every "
            f"{interval:.0f} s, goodput {share:.1%}"
        )
    write_results("goodput_model", "python benchmarks/reliability/goodput_model.py", lines)


if __name__ == "__main__":
    main()
