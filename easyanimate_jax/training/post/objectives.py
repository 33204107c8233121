"""What a stage after pretraining trains for; `Stage.objective` holds one of these.

The teacher is always the model of `TrainConfig.init` without the run's changes. A student trained
as adapters shares its weights, so that both take the memory of one model.
"""

from dataclasses import dataclass

from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES
from easyanimate_jax.facts import check_fields


@dataclass(frozen=True)
class GuidanceDistillation:
    """The student predicts in one evaluation what the teacher predicts with guidance in two.

    It is sampled with any number of steps and without guidance (Meng et al. 2022, arXiv
    2210.03142).
    """

    guidance: float = 6.0
    """Scale of the teacher's classifier-free guidance (spec 4.5)."""

    guidance_given: float | None = None
    """Scale for rows that have a picture or a control. None is `guidance`."""

    def __post_init__(self):
        check_fields(self, guidance="[1, 100]", guidance_given="[1, 100]")

    steps = None  # of the student: any number

    @property
    def evaluations(self) -> int:
        """Return how often the teacher is evaluated for a row of an update."""
        return 2


@dataclass(frozen=True)
class SegmentDistillation:
    """The student makes in one evaluation a part of the way for which the teacher takes several.

    The way from noise to data is cut into `steps` segments, which begin at the times of
    `process.grid(steps)`. From a noised clip at the beginning of a segment, the teacher goes to its
    end in `substeps` guided moves; the student learns the one velocity that leads there (Salimans
    and Ho 2022, arXiv 2202.00512; Wang et al. 2024, arXiv 2405.18407). It is sampled at those times
    and without guidance.
    """

    steps: int = 4
    """Number of segments: the steps, of one evaluation each, in which the student is sampled."""

    substeps: int = 4
    """Moves of the teacher in a segment, of two evaluations each with guidance. More are closer to
    the teacher's own samples of many steps."""

    guidance: float = 6.0
    """Scale of the teacher's classifier-free guidance (spec 4.5)."""

    guidance_given: float | None = None
    """Scale for rows that have a picture or a control. None is `guidance`."""

    walked: float = 0.0
    """Share of rows whose noised clip comes from the student's own steps from pure noise, as in
    sampling, instead of a noised clip of the data."""

    def __post_init__(self):
        check_fields(
            self,
            steps=f"[1, {NUM_TRAIN_TIMES}]",
            substeps=f"[1, {NUM_TRAIN_TIMES}]",
            guidance="[1, 100]",
            guidance_given="[1, 100]",
            walked="[0, 1]",
        )
        if self.steps * self.substeps > NUM_TRAIN_TIMES:
            raise ValueError(
                f"SegmentDistillation: {self.steps} steps of {self.substeps} substeps are more "
                f"than the {NUM_TRAIN_TIMES} training times; use fewer"
            )

    @property
    def evaluations(self) -> int:
        """Return how often teacher or student is evaluated, without gradient, for a row."""
        guided = max(self.guidance, self.guidance_given or 1) > 1
        return (2 if guided else 1) * self.substeps + (self.steps - 1) * bool(self.walked)


@dataclass(frozen=True)
class DistributionMatching:
    """The student's videos get the distribution of the teacher's, without the teacher's noise.

    DMD2 (Yin et al. 2024, arXiv 2405.14867) without its discriminator. The student makes videos in
    `steps` evaluations, each from new noise on the clean estimate before. A critic learns to
    denoise them. At a noised video, the difference between the critic's estimate and the teacher's
    guided one is the direction in which the student is moved. It is sharp where
    `SegmentDistillation` is soft; begin with the adapters of that (`TrainConfig.init_lora`, or an
    earlier stage). It is sampled at the times of `process.grid(steps)` and without guidance.
    """

    steps: int = 4
    """Number of evaluations in which the student makes a video."""

    guidance: float = 6.0
    """Scale of the teacher's classifier-free guidance (spec 4.5). If colours become too strong, use
    less."""

    guidance_given: float | None = None
    """Scale for rows that have a picture or a control. None is `guidance`."""

    critic_updates: int = 5
    """Updates of the critic for each of the student, which is trained in the last of them."""

    critic_rate: float = 1.0
    """Factor of the learning rate for the critic."""

    def __post_init__(self):
        check_fields(
            self,
            steps=f"[1, {NUM_TRAIN_TIMES}]",
            guidance="[1, 100]",
            guidance_given="[1, 100]",
            critic_updates="[1, inf)",
            critic_rate="[0, inf)",
        )

    @property
    def evaluations(self) -> float:
        """Return how often networks are evaluated for a row, besides the critic's own update.

        The student makes half of its steps on average. In its own updates it has a backward pass
        too, which counts twice.
        """
        mean = (self.steps + 1) / 2
        return mean + (mean + 2 + 3) / self.critic_updates


@dataclass(frozen=True)
class DirectPreference:
    """The student prefers the better clip of each pair to the worse one, more than its teacher.

    Flow-DPO (Liu et al. 2025, arXiv 2501.13918), the form of direct preference optimization for
    diffusion (Wallace et al. 2023, arXiv 2311.12908) whose errors are those of the velocity. It
    reads a set with `pairs=True`, and is sampled as its teacher.
    """

    beta: float = 100.0
    """Weight of the margin between student and teacher: the larger, the closer the student stays to
    its teacher. The default is that of yifan123/flow_grpo, `config/dpo.py`, for errors of the
    velocity; 100 to 500 is usual."""

    plain: float = 0.0
    """Weight of the ordinary loss on the better clip, added to the loss of preference. Above 0 it
    keeps the error of the better clip from rising together with that of the worse."""

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", plain="[0, 1]")

    @property
    def evaluations(self) -> int:
        """Return how often the teacher is evaluated for each of the two clips."""
        return 1


Distillation = GuidanceDistillation | SegmentDistillation | DistributionMatching
Objective = Distillation | DirectPreference
