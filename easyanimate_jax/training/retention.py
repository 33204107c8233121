"""Which checkpoints of a run are kept, and how others are deleted."""

from collections.abc import Callable

from easyanimate_jax.storage.stores import delete_folder
from easyanimate_jax.training.safety.faults import Faults
from easyanimate_jax.weights.steps import Steps


class Retention:
    """Keeps the last `keep` verified steps, multiples of `keep_every`, and those of `keep_if`.

    `keep_if` looks at a step's metadata.
    """

    def __init__(
        self,
        steps: Steps,
        keep: int,
        keep_every: int | None,
        keep_if: Callable[[dict], bool],
        faults: Faults,
    ):
        self.steps, self.keep, self.keep_every = steps, keep, keep_every
        self.keep_if, self.faults = keep_if, faults

    def prune(self) -> None:
        """Delete the steps that need not be kept, if there are at least two verified steps."""
        steps = self.steps.complete()
        verified = [step for step in steps if self.steps.is_verified(step)]
        if len(verified) < 2:
            return
        last = set(verified[-self.keep :])
        for step in steps:
            if step < verified[-1] and not (step in last or self._kept(step)):
                self._delete(step)

    def drop_after(self, step: int) -> None:
        """Delete all steps after `step`."""
        for later in self.steps.complete():
            if later > step:
                self._delete(later)

    def _kept(self, step: int) -> bool:
        """Return whether a step is never deleted; this is true if its metadata is damaged."""
        if self.keep_every and step % self.keep_every == 0:
            return True
        try:
            return self.keep_if(self.steps.meta(step))
        except ValueError:
            return True

    def _delete(self, step: int) -> None:
        """Make a step no step any more, then delete its files, so that no part of it counts."""
        doomed = self.steps.withdraw(step)
        self.faults.kill("deleting", step)
        for folder in doomed:
            delete_folder(folder)
