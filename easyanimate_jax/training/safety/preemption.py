"""Preemption by SIGTERM, which a training loop checks between its steps."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Records SIGTERM, so that the loop can check it between steps.

    With several processes, a signal to any of them stops all after the same step.
    """

    def __init__(self):
        self.signalled, self.steps = False, 0
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._signalled)

    def asked(self) -> bool:
        """Return whether to stop after this step; every process must call this once per step."""
        if jax.process_count() > 1:
            self.steps += 1
            reached = multihost_utils.reached_preemption_sync_point(self.steps)
            self.signalled = self.signalled or reached
        return self.signalled

    def _signalled(self, *_):
        self.signalled = True
