"""Recovery: a run that diverges returns to an earlier checkpoint and skips batches."""

import logging
from collections.abc import Mapping

import jax

from easyanimate_jax.data.loader import Loader
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.runs.position import Position
from easyanimate_jax.runs.states import States
from easyanimate_jax.training.checkpoint import named_leaves
from easyanimate_jax.training.safety.divergence import SKIP_BATCHES, Detector, Returns
from easyanimate_jax.training.step import TrainState
from easyanimate_jax.weights.fingerprint import fingerprint

logger = logging.getLogger(__name__)


class Recovery:
    """Watches the rows of the journal; `reason` says why the run has to go back, or is None."""

    def __init__(self, config: TrainConfig, loaders: Mapping[str, Loader]):
        self.config, self.loaders = config, loaders
        self.returns = Returns(config.folder)
        self.detector, self.reason = Detector(), None

    def enter(self) -> None:
        """Forget the losses so far, because those of another stage are not comparable."""
        self.detector, self.reason = Detector(), None

    def offset(self, place: Position) -> int:
        """Return how many batches of the stage's plan are skipped."""
        return self.returns.offset(place.stage.name)

    def see(self, row: dict | None) -> None:
        """Pass the row of the next step to the detector; None is ignored."""
        if row is not None:
            found = self.detector.see(row["step"], row["loss"], row["grad_norm"])
            self.reason = self.reason or found

    def not_finite(self, step: int, why: str) -> None:
        """Record that the state made by update `step` is not finite and was not saved."""
        self.detector.first_bad, self.reason = step, why

    def evidence(self, place: Position, last_bad: int, state: TrainState) -> dict:
        """Return the event for divergence.jsonl: step, reason, batches, weight fingerprints."""
        first_bad, start = self.detector.first_bad, place.made - place.step
        offset = self.offset(place)
        positions = range(max(first_bad, start) - start + offset, last_bad - start + offset + 1)
        plan = self.loaders[place.stage.name].plan
        weights = named_leaves(state.model)
        return {
            "step": last_bad,
            "reason": self.reason,
            "stage": place.stage.name,
            "batches": {p: plan(p)[1].tolist() for p in positions},
            "weights": {name: f"{int(fingerprint(x)):08x}" for name, x in weights.items()},
        }

    def go_back(self, place: Position, event: dict, states: States) -> tuple[int, TrainState]:
        """Return (updates made, state) of a checkpoint from before the divergence.

        The batches around the divergence are skipped from now on. Raises DivergedError after too
        many returns. The caller must hold no state, because two may not fit in memory.
        """
        states.checkpoints.finish()
        last_bad, start = event["step"], place.made - place.step
        # A checkpoint made at step k holds the updates before k.
        found = states.newest(before=self.detector.first_bad + 1)
        step, state = found or (0, states.first())
        # However old the checkpoint is, the run must not read the bad batches again.
        skip = max(SKIP_BATCHES, last_bad + 1 - max(step, start))
        event |= {"returned_to": step, "offset": self.offset(place) + skip}
        self.returns.add(event, jax.process_index() == 0)
        states.checkpoints.drop_after(step)
        logger.warning(
            "%s at step %d: back to step %d, without %d batches of stage %r",
            *(event["reason"], last_bad, step, skip, event["stage"]),
        )
        self.reason = None
        return step, state
