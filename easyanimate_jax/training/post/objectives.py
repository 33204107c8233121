"""What a stage after pretraining trains for; `Stage.objective` holds one of these.

The teacher is always the model of `TrainConfig.init` without the run's changes. A student trained
as adapters shares its weights, so that both take the memory of one model.
"""

from dataclasses import dataclass
from typing import Literal

from easyanimate_jax.data.buckets import check_size, grid_of
from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES
from easyanimate_jax.facts import check_fields

Reward = str | tuple[tuple[str, float], ...]  # a name, or pairs of a name and a weight


class Rewarded:
    """The properties of all objectives that sample videos and have a `reward`."""

    @property
    def rewards(self) -> dict[str, float]:
        """Return {name: weight} of the rewards."""
        return {self.reward: 1.0} if isinstance(self.reward, str) else dict(self.reward)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Return the latent frames, token rows and token columns of a sampled video."""
        return grid_of(self.frames, self.height, self.width)


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

    times: tuple[float, ...] = ()
    """Times at which clips are compared, drawn for each pair: those of a distilled `init`, as in
    its `sampling.json`; it predicts nothing of use at others. () takes those of training."""

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", plain="[0, 1]", times=f"(-1, {NUM_TRAIN_TIMES}]")

    @property
    def evaluations(self) -> int:
        """Return how often the teacher is evaluated for each of the two clips."""
        return 1


@dataclass(frozen=True)
class RewardBackpropagation(Rewarded):
    """The student's videos get a higher reward, whose gradient goes back into the last steps.

    DRaFT-K (Clark et al. 2023, arXiv 2309.17400) with the inputs of the network detached, as in
    DRTune (arXiv 2405.00760) and the reference's `train_reward_lora.py`. The student samples videos
    of the batch's captions, the first latent frames are decoded, and the reward's gradient reaches
    the weights through `chosen` of the `last` steps. One step at a time is differentiated, so an
    update takes the memory of one training step and of the decoder.
    """

    reward: Reward
    """MODULE:FUNCTION, which takes frames (B, F, H, W, 3) in [-1, 1] and the text states, a tuple
    of (B, L, width), as JAX arrays, and returns B numbers. Larger is better. If it has a function
    `load`, the result of that, its weights, comes first. Several are pairs of a name and a weight;
    their weighted sum is raised."""

    frames: int = 49
    """Frames of a sampled video, 4n+1."""

    height: int = 256
    """Height of a sampled video in pixels, a multiple of 16."""

    width: int = 256
    """Width of a sampled video in pixels, a multiple of 16."""

    decoded: int = 1
    """Latent frames that are decoded for the reward: the first, or k for 4 (k - 1) + 1 frames."""

    steps: int = 50
    """Steps in which videos are sampled."""

    times: tuple[float, ...] = ()
    """Times of the steps, noise first, as in the `sampling.json` of a distilled model; () takes
    those of the noise process."""

    guidance: float = 6.0
    """Scale of classifier-free guidance while sampling (spec 4.5)."""

    chosen: int = 5
    """Steps that are trained in an update, drawn anew for each among the `last`."""

    last: int = 15
    """Last steps among which they are drawn. V5's last step moves far, so 1 of 1 is enough there;
    V5.1's last step moves almost nothing."""

    equal: bool = True
    """Give the gradients of all chosen steps one size, although steps move by different amounts."""

    scale: float = 1.0
    """Factor of the reward in the loss."""

    distance: float = 0.0
    """Weight of the mean squared distance to the teacher's predictions at the chosen steps."""

    plain: float = 0.0
    """Weight of the ordinary loss on the batch's clips."""

    def __post_init__(self):
        check_fields(
            self,
            reward="(0, inf)",
            frames="[1, inf)",
            height="[16, 1344]",
            width="[16, 1344]",
            decoded="[1, inf)",
            steps=f"[1, {NUM_TRAIN_TIMES}]",
            times=f"(-1, {NUM_TRAIN_TIMES}]",
            guidance="[1, 100]",
            chosen=f"[1, {NUM_TRAIN_TIMES}]",
            last=f"[1, {NUM_TRAIN_TIMES}]",
            scale="(0, inf)",
            distance="[0, inf)",
            plain="[0, inf)",
        )
        check_size(self.frames, self.height, self.width)
        if not self.chosen <= self.last <= self.steps:
            raise ValueError(
                f"RewardBackpropagation: chosen={self.chosen} of the last={self.last} of "
                f"steps={self.steps}: use chosen <= last <= steps"
            )
        if self.times and len(self.times) != self.steps:
            raise ValueError(
                f"RewardBackpropagation: {len(self.times)} times and steps={self.steps}: give as "
                f"many steps as times"
            )
        if self.decoded > self.grid[0]:
            raise ValueError(
                f"RewardBackpropagation: decoded={self.decoded} latent frames, and a video of "
                f"{self.frames} frames has {self.grid[0]}"
            )
        if servers := [name for name in self.rewards if "://" in name]:
            raise ValueError(
                f"RewardBackpropagation: reward={servers[0]!r} is a server, which has no gradient; "
                f"name a JAX function MODULE:FUNCTION, or use NegativeAwareFinetuning"
            )

    @property
    def evaluations(self) -> float:
        """Return how many forward passes an update makes for a row, beside one with its gradient.

        A pass with its gradient counts as three.
        """
        copies = 2 if self.guidance > 1 else 1
        return copies * self.steps + 3.0 * (copies * self.chosen - 1) + 3.0 * bool(self.plain)


@dataclass(frozen=True)
class NegativeAwareFinetuning(Rewarded):
    """The student's videos get a higher reward, of which no gradient is needed.

    DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117). In each update the averaged weights sample
    `count` videos of every caption of the batch, a reward rates them, and the student learns to
    make those above the mean of their caption more likely, and those below it less. The weights
    that sample are the run's average, so `TrainConfig.ema_decay` says how fast they follow: 0.5 to
    0.9. Videos are sampled in few steps without guidance, so begin with a distilled model.
    """

    reward: Reward
    """MODULE:FUNCTION, which takes frames (B, F, H, W, 3) as uint8 and B captions and returns B
    numbers, or the address of a server, http(s)://... Larger is better. Several are pairs of a name
    and a weight; each is compared within a caption, and the weighted comparisons are added."""

    frames: int = 49
    """Frames of a sampled video, 4n+1."""

    height: int = 256
    """Height of a sampled video in pixels, a multiple of 16."""

    width: int = 256
    """Width of a sampled video in pixels, a multiple of 16."""

    count: int = 8
    """Videos of each caption, which are compared with one another."""

    steps: int = 8
    """Steps in which videos are sampled, without guidance, at the times of `process.grid(steps)`. A
    model that was distilled to few steps needs their number."""

    times: int = 4
    """Of these times, how many are trained for each video in an update."""

    beta: float = 1.0
    """Size of the region in which the student is trusted: 0.1 learns faster, and less stably."""

    distance: float = 1e-3
    """Weight of the mean squared distance to the teacher's predictions."""

    plain: float = 0.0
    """Weight of the ordinary loss on the batch's clips."""

    request: int = 8
    """Videos that a server gets at once."""

    seconds: float = 120.0
    """Time in seconds for a server's answer."""

    tries: int = 5
    """Most requests for the same videos; the pauses between them grow."""

    format: Literal["mp4", "npz"] = "mp4"
    """Form in which a server gets videos: "mp4", or "npz" for exact pixels."""

    def __post_init__(self):
        check_fields(
            self,
            reward="(0, inf)",
            frames="[1, inf)",
            height="[16, 1344]",
            width="[16, 1344]",
            count="[2, inf)",
            steps=f"[1, {NUM_TRAIN_TIMES}]",
            times=f"[1, {NUM_TRAIN_TIMES}]",
            beta="(0, inf)",
            distance="[0, inf)",
            plain="[0, inf)",
            request="[1, inf)",
            seconds="(0, inf)",
            tries="[1, inf)",
        )
        check_size(self.frames, self.height, self.width)
        if self.times > self.steps:
            raise ValueError(
                f"NegativeAwareFinetuning: times={self.times} of steps={self.steps}: a video is "
                f"trained at the times of its steps, at most once at each"
            )

    @property
    def evaluations(self) -> float:
        """Return how many forward passes an update makes for a row, beside one with its gradient.

        A pass with its gradient counts as three.
        """
        return self.count * (self.steps + 5.0 * self.times) - 3.0 + 3.0 * bool(self.plain)


Distillation = GuidanceDistillation | SegmentDistillation | DistributionMatching
Objective = Distillation | DirectPreference | RewardBackpropagation | NegativeAwareFinetuning
