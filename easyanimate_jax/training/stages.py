"""The staged schedule: which latents, task, batch and learning rate at which step (spec 9.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

from easyanimate_jax.diffusion.tasks import TASKS, TaskName


@dataclass(frozen=True)
class Stage:
    """One stage: `steps` updates of `batch_size` clips from the latent set named `data`.

    `microbatch` rows go through the network at once (all of them when None); the rest of the batch
    is accumulated. The learning rate warms up linearly over `warmup` steps of the stage, then goes
    linearly to `end_learning_rate` (constant when None). `weights` say how often clips of a kind or
    a source come beside others, see `data.plan.Plan`. A control stage learns to do without its
    control in `control_drop` of the rows, and without its reference in `reference_drop` of them;
    cameras are always there.
    """

    name: str
    data: str
    batch_size: int
    steps: int
    task: TaskName = "t2v"
    microbatch: int | None = None
    learning_rate: float = 2e-5
    end_learning_rate: float | None = None
    warmup: int = 100
    weights: tuple[tuple[str, float], ...] = ()
    control_drop: float = 0.2
    reference_drop: float = 0.2

    def __post_init__(self):
        for name in ("batch_size", "steps", "microbatch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"stage {self.name!r}: {name} is {getattr(self, name)}; use 1 or more"
                )

    @property
    def in_channels(self) -> int:
        """Input channels of the network in this stage."""
        return TASKS[self.task].in_channels

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the stage's own step `step`, counted from 0."""
        end = self.learning_rate if self.end_learning_rate is None else self.end_learning_rate
        rate = self.learning_rate + (end - self.learning_rate) * step / self.steps
        return rate * min(1.0, (step + 1) / max(1, self.warmup))


def stage_at(stages: Sequence[Stage], step: int) -> tuple[int, int]:
    """(index of the stage that makes global step `step`, the stage's own step).

    The step after the last one is (len(stages), 0).
    """
    for index, stage in enumerate(stages):
        if step < stage.steps:
            return index, step
        step -= stage.steps
    return len(stages), 0


def boundaries(stages: Sequence[Stage]) -> list[int]:
    """The global step at which each stage ends."""
    ends, total = [], 0
    for stage in stages:
        total += stage.steps
        ends.append(total)
    return ends
