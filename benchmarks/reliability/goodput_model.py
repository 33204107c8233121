"""Model the goodput of a pod from the stall of a save and the time to recover.

    python benchmarks/reliability/goodput_model.py [--stall 0.1 --recovery 20]

Faults are random, one in 51,000 chip-hours: 419 unexpected interruptions in 54 days on 16,384 chips
(Llama 3, arXiv 2407.21783, table 5). The interval between checkpoints is the optimum of Young
(1974): sqrt(2 x stall x time between faults) seconds. A fault costs half an interval and the
recovery. The result compares measured values with a budget: 1 s of stall; 10 s to notice, 60 s to
start again, 60 s to restore.
"""

import argparse
import math

from tiny import write_results

CHIP_HOURS = 51_000
BUDGET = 1.0, 130.0  # seconds of stall, seconds to recover


def goodput(chips: int, stall: float, recovery: float) -> tuple[float, float, float]:
    """Return (share of time in new steps, seconds between faults, seconds between checkpoints)."""
    between = CHIP_HOURS * 3600 / chips
    interval = math.sqrt(2 * stall * between)
    return 1 - stall / interval - (interval / 2 + recovery) / between, between, interval


def main() -> None:
    """Write the table of the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stall", type=float, help="measured seconds that a save stops the steps")
    parser.add_argument("--recovery", type=float, help="measured seconds from fault to steps")
    a = parser.parse_args()
    inputs = {"a budget": BUDGET}
    if a.stall and a.recovery:
        inputs["measured with the tiny run on CPUs"] = a.stall, a.recovery
    lines = []
    for name, (stall, recovery) in inputs.items():
        for chips in (1024, 4096, 16_384):
            share, between, interval = goodput(chips, stall, recovery)
            lines.append(
                f"{name}, {stall:g} s of stall and {recovery:g} s to recover; {chips:,} chips: a "
                f"fault in {between / 3600:.1f} h, a checkpoint every {interval:.0f} s, goodput "
                f"{share:.1%}"
            )
    words = f" --stall {a.stall:g} --recovery {a.recovery:g}" if len(inputs) > 1 else ""
    write_results("goodput_model", f"python benchmarks/reliability/goodput_model.py{words}", lines)


if __name__ == "__main__":
    main()
