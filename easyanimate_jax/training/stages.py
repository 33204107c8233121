"""The staged schedule: latents, task, batch size and learning rate of each step (spec 9.4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from easyanimate_jax.diffusion.tasks import TASKS, TaskName
from easyanimate_jax.facts import MAX_STEPS, check_fields
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.training.post.objectives import Objective

Decay = Literal["polynomial", "cosine"]


@dataclass(frozen=True)
class Stage:
    """One stage of the schedule: one latent set, one task, one batch size."""

    name: str
    """Name of the stage, different from those of the other stages."""

    data: str
    """Name of the latent set that the stage reads."""

    batch_size: int
    """Clips in one update, over all devices (spec 9.4 lists the report's values)."""

    steps: int
    """Number of updates of the stage (spec 9.4 lists the report's values)."""

    task: TaskName = "t2v"
    """Task that the stage trains; it decides the network's input channels (spec 0)."""

    microbatch: int | Literal["auto"] | None = "auto"
    """Clips that go through the network at once; gradients are summed over the microbatches of a
    batch. None is the whole batch, "auto" the fastest number that fits the memory."""

    learning_rate: float = 2e-5
    """Learning rate after warm-up; the default is that of the released scripts (spec 9.1)."""

    end_learning_rate: float | None = None
    """Learning rate that the stage falls to at its end. None keeps it constant."""

    decay: Decay = "polynomial"
    """Curve from `learning_rate` to `end_learning_rate`: "polynomial" falls by (1 - step / steps)
    to the power `decay_power`, "cosine" by half a cosine wave."""

    decay_power: float = 1.0
    """Power of the polynomial decay; 1 is a straight line."""

    warmup: int = 100
    """Steps of the stage over which the learning rate rises linearly; 0 is no warm-up. The
    default is that of the released scripts (spec 9.1)."""

    weights: tuple[tuple[str, float], ...] = ()
    """Pairs of a kind or source of clips and its sampling weight. Other clips have weight 1; weight
    0 leaves clips out (see `data.plan.plan.Plan`)."""

    control_drop: float = 0.2
    """Share of rows of a control stage that are trained without their control; cameras are never
    dropped (spec 7.2)."""

    reference_drop: float = 0.2
    """Share of rows of a control stage that are trained without their reference (spec 7.2); with
    cameras it is never dropped."""

    picture_drop: float = 0.0
    """Share of rows of an i2v stage that are trained without their picture, as text to video."""

    objective: Objective | None = None
    """What the stage trains for; None is to predict noise from data. The others teach a student of
    fewer evaluations; their teacher is `TrainConfig.init`."""

    mesh: MeshConfig | None = None
    """Devices along each mesh axis in this stage. None takes the mesh of the config. An axis that
    the command line leaves out is that of `MeshConfig`."""

    save: Literal["auto"] | tuple[str, ...] | None = None
    """Activations that this stage keeps for its backward pass. None takes `save` of the model."""

    def __post_init__(self):
        check_fields(
            self,
            batch_size="[1, inf)",
            steps=f"[1, {MAX_STEPS}]",
            microbatch="[1, inf)",
            learning_rate="[0, inf)",
            end_learning_rate="[0, inf)",
            decay_power="(0, inf)",
            warmup="[0, inf)",
            weights="[0, inf)",
            control_drop="[0, 1]",
            reference_drop="[0, 1]",
            picture_drop="[0, 1]",
        )

    @property
    def in_channels(self) -> int:
        """Return the number of input channels of the network in this stage."""
        return TASKS[self.task].in_channels

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of the stage's own step `step`, counted from 0."""
        end = self.learning_rate if self.end_learning_rate is None else self.end_learning_rate
        part = step / self.steps
        if self.decay == "cosine":
            fallen = (1 - math.cos(math.pi * part)) / 2
        else:
            fallen = 1 - (1 - part) ** self.decay_power if self.decay_power != 1 else part
        rate = self.learning_rate + (end - self.learning_rate) * fallen
        return rate * min(1.0, (step + 1) / max(1, self.warmup))


def stage_at(stages: Sequence[Stage], step: int) -> tuple[int, int]:
    """Return (index of the stage that makes global step `step`, the stage's own step).

    Returns (len(stages), 0) for the step after the last one.
    """
    for index, stage in enumerate(stages):
        if step < stage.steps:
            return index, step
        step -= stage.steps
    return len(stages), 0


def boundaries(stages: Sequence[Stage]) -> list[int]:
    """Return the global step at which each stage ends."""
    ends, total = [], 0
    for stage in stages:
        total += stage.steps
        ends.append(total)
    return ends
