"""Saves by time: every process of a run learns at the same step that a checkpoint is due.

The clock of process 0 decides. The others learn its decision when they meet: at steps that they
agreed on at the meeting before. A meeting is planned for half of the time that is left, and for as
many steps ahead as lie behind. So there are few between two saves, steps that become twice as long
still save in time, and no step waits for a message otherwise. The updates of a run do not depend on
its saves.
"""

import time
from collections.abc import Callable

import numpy as np

from easyanimate_jax.training.saving import same_for_all


class SaveClock:
    """Says after which steps a run saves because `minutes` have passed; 0 is never.

    Every process calls `due` after each step that `meets`, and `restart` after each save.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = 60 * minutes, clock
        self.restart()

    def restart(self) -> None:
        """Begin to count the time to the next save."""
        self.began = self.clock()
        self.meeting = self.first = None  # steps: of the next meeting, and the first since then

    def meets(self, step: int) -> bool:
        """Return whether the processes meet after `step`."""
        return self.seconds > 0 and (self.meeting is None or step >= self.meeting)

    def due(self, step: int) -> bool:
        """Return whether to save after `step`, because the time would be over after the next.

        The caller waits for the step first: on CPUs, two collectives at the same time can deadlock.
        """
        self.first = step if self.first is None else self.first
        made, spent = step + 1 - self.first, self.clock() - self.began
        left, a_step = self.seconds - spent, max(spent / made, 1e-9)
        steps = max(1, min(left / 2 / a_step, made))
        save, steps = map(int, same_for_all(np.array([left < a_step, steps], np.int32)))
        self.meeting = step + steps
        return bool(save)
