"""When a run has to go back: updates that are not finite, or a loss that jumps and stays.

One non-finite update is skipped inside the step and costs nothing. Many in a row, or a spike, mean
that the weights or the data are no good here; then the run returns to a checkpoint from before and
goes on with other batches, as PaLM's did (arXiv 2204.02311, section 5.1). `divergence.jsonl` in the
run folder has a line for every return, and is what a restarted run reads to skip the same batches.
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path

SKIPPED_IN_A_ROW = 10  # non-finite updates that make a run go back
SPIKE = 10.0  # times the median loss
SPIKE_STEPS = 3  # in a row: one extreme batch is clipped, and no reason to go back
HISTORY = 100  # losses that the median is of
SKIP_BATCHES = 200
MAX_RETURNS = 3


class DivergedError(Exception):
    """The run went back MAX_RETURNS times and diverged again."""


class Detector:
    """Looks at the steps in order. `first_bad` is the step at which the trouble began."""

    def __init__(self):
        self.losses = deque(maxlen=HISTORY)
        self.skipped = self.high = 0
        self.first_bad = 0

    def see(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why the run has to go back, or None."""
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
    """The returns of a run so far, and the batches of each stage's plan that they leave out."""

    def __init__(self, folder: Path):
        self.file = folder / "divergence.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.events = [json.loads(line) for line in lines]

    def offset(self, stage: str) -> int:
        """How many batches of the stage's plan are left out."""
        return max((e["offset"] for e in self.events if e["stage"] == stage), default=0)

    def add(self, event: dict, write: bool) -> None:
        """Raises DivergedError if there were enough. `event` has stage, offset and the evidence."""
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
