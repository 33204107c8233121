"""Detect divergence: many updates that are not finite, or a loss that jumps and stays high.

A single non-finite update is skipped inside the step. Many in a row, or a loss spike, mean bad
weights or bad data. Then the run returns to an earlier checkpoint and skips some batches, as in the
training of PaLM (arXiv 2204.02311, section 5.1). `divergence.jsonl` in the run folder has one line
for each return. A restarted run reads it and skips the same batches.
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path

SKIPPED_IN_A_ROW = 10  # non-finite updates before a run goes back
SPIKE = 10.0  # times the median loss
SPIKE_STEPS = 3  # in a row: clipping already handles a single extreme batch
HISTORY = 100  # losses in the median
SKIP_BATCHES = 200
MAX_RETURNS = 3


class DivergedError(Exception):
    """The run went back MAX_RETURNS times and diverged again."""


class Detector:
    """Checks the steps in order. `first_bad` is the step at which the divergence began."""

    def __init__(self):
        self.losses = deque(maxlen=HISTORY)
        self.skipped = self.high = 0
        self.first_bad = 0

    def see(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Check the next step; return the reason why the run has to go back, or None."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        high = (
            finite
            and len(self.losses) >= HISTORY // 5
            and loss > SPIKE * statistics.median(self.losses)
        )
        if not (self.skipped or self.high):
            self.first_bad = step
        self.skipped = 0 if finite else self.skipped + 1
        self.high = self.high + 1 if high else 0
        if self.skipped == SKIPPED_IN_A_ROW:
            return f"{self.skipped} updates in a row were not finite"
        if self.high == SPIKE_STEPS:
            return f"the loss was above {SPIKE:g} times its median {self.high} times in a row"
        if finite and not high:
            self.losses.append(loss)
        return None


class Returns:
    """The returns of a run so far, and the batches of each stage's plan that they skip."""

    def __init__(self, folder: Path):
        self.file = folder / "divergence.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.events = [json.loads(line) for line in lines]

    def offset(self, stage: str) -> int:
        """Return how many batches of the stage's plan are skipped."""
        return max((e["offset"] for e in self.events if e["stage"] == stage), default=0)

    def add(self, event: dict, write: bool) -> None:
        """Add a return; `event` has its stage, step, reason, offset and batches.

        Raises DivergedError if the run already went back MAX_RETURNS times.
        """
        if len(self.events) == MAX_RETURNS:
            raise DivergedError(
                f"{event['reason']} at step {event['step']}, after {MAX_RETURNS} returns to "
                f"earlier checkpoints; {self.file} has their batches. Lower the learning rate or "
                f"repair the data, remove that file, and start again"
            )
        self.events.append(event)
        if write:
            with self.file.open("a") as file:
                file.write(json.dumps(event) + "\n")
