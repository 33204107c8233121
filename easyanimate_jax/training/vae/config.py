"""The config of a video autoencoder's training: a value, beside what it configures."""

from dataclasses import dataclass

from easyanimate_jax.data.control import OPERATORS
from easyanimate_jax.facts import MAX_STEPS, SEEDS, check_fields
from easyanimate_jax.models.borders import check_video
from easyanimate_jax.models.vae import VAEConfig
from easyanimate_jax.training.optimizer import Matrices

PYRAMID_LEVELS = 4  # of the perceptual term; each halves the crop
FROM_0 = (
    *("warmup_steps", "weight_decay", "l2_weight", "perceptual_weight", "kl_weight"),
    *("outlier_weight", "gan_weight", "discriminator_start"),
    *("save_every", "log_every", "picture_every"),
)


@dataclass(frozen=True)
class VAEStage:
    """Steps on crops of one shape: one compiled program. Clips that are too small are left out."""

    steps: int
    """Updates of the weights."""

    batch_size: int
    """Crops in a global batch, a multiple of the devices."""

    frames: int
    """Frames of a crop, 4n+1."""

    size: int
    """Side of the square crop in pixels, a multiple of 8."""

    def __post_init__(self):
        check_fields(
            self,
            steps=f"[1, {MAX_STEPS}]",
            batch_size="[1, inf)",
            frames="[1, inf)",
            size=f"[{2**PYRAMID_LEVELS}, inf)",
        )
        check_video((self.batch_size, self.frames, self.size, self.size, 3))


@dataclass(frozen=True)
class VAETrainConfig:
    """One training of a video autoencoder; run the same config to resume it."""

    vae: VAEConfig
    """Size of the autoencoder."""

    data: str
    """Folder, table or list of captioned clips (docs/data.md); the captions are not read."""

    output: str
    """Folder of the finished autoencoder, its checkpoints, metrics and pictures."""

    stages: tuple[VAEStage, ...]
    """Stages of the schedule in their order."""

    learning_rate: float = 1e-4
    """Learning rate after the warm-up; it falls to a hundredth along a cosine."""

    warmup_steps: int = 1000
    """Steps in which the learning rate rises from 0."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two moments."""

    weight_decay: float = 0.05
    """Decay of the weights, apart from their gradients."""

    l2_weight: float = 0.1
    """Weight of the squared error."""

    perceptual_weight: float = 1.0
    """Weight of the error's image gradients."""

    kl_weight: float = 1e-6
    """Weight of the divergence of latents from a standard normal."""

    outlier_weight: float = 1e5
    """Weight of latents beyond three standard deviations."""

    gan_weight: float = 0.5
    """Weight of the adversarial term, whose gradients are balanced first."""

    discriminator_start: int | None = 50_001
    """First step with the adversarial term. None has no discriminators."""

    matrices: Matrices = "adam"
    """Update rule of the inner convolutions' kernels; Muon is for training from noise."""

    controls: tuple[str, ...] = ()
    """Operators of `data/control.py` whose signals replace a quarter of the crops. A control model
    reads signals as latents, and an autoencoder that never saw thin lines loses them."""

    hidden_frames: bool = False
    """Give a quarter of the crops black frames: their first and last frame stay, and one in four of
    the others, as an inpaint model reads them. Without this, a last frame after black ones loses
    its colours and gets the ghost of the first."""

    init: str = ""
    """Autoencoder to start from, in any layout; "" is noise."""

    decoder_only: bool = False
    """Train the decoder of `init` alone. Its encoder and latent statistics keep their bits, so
    latents that were made stay right, and so do models that were trained on them."""

    ema_decay: float = 0.999
    """Decay of the averaged weights a step, which are what is written, measured and shown; it warms
    up as (1 + n) / (10 + n). 0 keeps no average."""

    seed: int = 0
    """Seed of weights, crops and noise."""

    save_every: int = 1000
    """Steps from one checkpoint to the next, besides that at the end; 0 saves at the end alone."""

    log_every: int = 20
    """Steps from one row of metrics to the next, besides that at the end; 0 writes no others."""

    picture_every: int = 1000
    """Steps from one picture of held-out clips to the next, besides that at the end; 0 makes no
    others."""

    hang_seconds: float = 120.0
    """Seconds that a step or a wait for data may last before the process ends itself; five times
    the slowest recent step is always allowed. 0 never ends it."""

    def __post_init__(self):
        check_fields(
            self,
            learning_rate="[0, inf)",
            betas="[0, 1)",
            ema_decay="[0, 1)",
            seed=SEEDS,
            hang_seconds="[0, inf)",
            **dict.fromkeys(FROM_0, "[0, inf)"),
        )
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(
                f"VAETrainConfig.stages has {self.steps} steps in all; use 1 to {MAX_STEPS} steps"
            )
        if self.decoder_only and not self.init:
            raise ValueError("decoder_only without init: name the autoencoder whose decoder it is")
        for name in self.controls:
            if name not in OPERATORS:
                raise ValueError(f"controls: no operator {name!r}; use {', '.join(OPERATORS)}")

    @property
    def steps(self) -> int:
        """Updates of all stages."""
        return sum(stage.steps for stage in self.stages)

    def number_at(self, step: int) -> int:
        """Return the number, from 0, of the stage that makes the update after `step` updates."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number
            step -= stage.steps
        return len(self.stages) - 1

    def stage_at(self, step: int) -> VAEStage:
        """Return the stage that makes the update after `step` updates; the last one at the end."""
        return self.stages[self.number_at(step)]

    def adversarial(self, step: int) -> bool:
        """Return True where the update that makes it `step` has the adversarial term."""
        return self.discriminator_start is not None and step >= self.discriminator_start
