"""Which checkpoints of a folder are kept, how others are deleted, and damaged ones set aside."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from easyanimate_jax.training.safety.faults import Faults
from easyanimate_jax.weights.run_folder import complete_steps, is_verified, read_step_meta

logger = logging.getLogger(__name__)

LEFTOVERS = ("*.orbax-checkpoint-tmp*", "*.deleting")


class Retention:
    """Keeps the last `keep` verified steps, multiples of `keep_every`, and those of `keep_if`.

    `keep_if` looks at a step's metadata.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None,
        keep_if: Callable[[dict], bool],
        faults: Faults,
    ):
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.keep_if, self.faults = keep_if, faults

    def prune(self) -> None:
        """Delete the steps that need not be kept, if there are at least two verified steps."""
        steps = complete_steps(self.folder)
        verified = [step for step in steps if is_verified(self.folder / str(step))]
        if len(verified) < 2:
            return
        last = set(verified[-self.keep :])
        for step in steps:
            if step < verified[-1] and not (step in last or self._kept(step)):
                self._delete(step)

    def drop_after(self, step: int) -> None:
        """Delete all steps after `step`."""
        for later in complete_steps(self.folder):
            if later > step:
                self._delete(later)

    def _kept(self, step: int) -> bool:
        """Return whether a step is never deleted; this is true if its metadata is damaged."""
        if self.keep_every and step % self.keep_every == 0:
            return True
        try:
            return self.keep_if(read_step_meta(self.folder / str(step)))
        except ValueError:
            return True

    def _delete(self, step: int) -> None:
        """Rename a step, then delete its files, so that no partial step has a valid name."""
        path = self.folder / str(step)
        doomed = path.with_name(f"{path.name}.deleting")
        os.replace(path, doomed)
        self.faults.kill("deleting", step)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the files that killed or failed saves and killed deletions left in `folder`."""
    for pattern in LEFTOVERS:
        for path in Path(folder).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged step to STEP.corrupt, so that it is never restored, and store `reason`."""
    target, number = path.with_name(f"{path.name}.corrupt"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.corrupt{number}")
    try:
        os.replace(path, target)
    except FileNotFoundError:  # another process found the damage, too
        return
    (target / "reason").write_text(reason + "\n")
    logger.error("checkpoint %s is damaged, set aside as %s: %s", path.name, target.name, reason)
