"""The config of a video autoencoder's training."""

from dataclasses import dataclass

from easyanimate_jax.data.control import OPERATORS
from easyanimate_jax.facts import MAX_STEPS, SEEDS, TrackerName, check_fields
from easyanimate_jax.models.borders import check_video
from easyanimate_jax.models.vae import VAEConfig
from easyanimate_jax.storage.local import resolve_fields
from easyanimate_jax.storage.stores import place
from easyanimate_jax.training.optimizer import Matrices

PYRAMID_LEVELS = 4  # scales of the perceptual term; each halves the crop
FROM_0 = (
    *("warmup_steps", "weight_decay", "l2_weight", "perceptual_weight", "kl_weight"),
    *("outlier_weight", "gan_weight", "discriminator_start"),
    *("save_every", "save_minutes", "log_every", "picture_every"),
)


@dataclass(frozen=True)
class VAEStage:
    """Steps on crops of one shape, with one compiled program; too small clips are skipped."""

    steps: int
    """Number of updates of the weights."""

    batch_size: int
    """Crops in a global batch; a multiple of the number of devices."""

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
    """The training of a video autoencoder; run the same config to resume it."""

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
    """Decoupled weight decay of AdamW."""

    l2_weight: float = 0.1
    """Weight of the squared error."""

    perceptual_weight: float = 1.0
    """Weight of the error's image gradients."""

    kl_weight: float = 1e-6
    """Weight of the divergence of latents from a standard normal."""

    outlier_weight: float = 1e5
    """Weight of latents beyond three standard deviations."""

    gan_weight: float = 0.5
    """Weight of the adversarial term, after its gradients were balanced with the others."""

    discriminator_start: int | None = 50_001
    """First step with the adversarial term. None trains without discriminators."""

    matrices: Matrices = "adam"
    """Update rule of the inner convolutions' kernels; use "muon" to train from random weights."""

    links: str = ""
    """Folder that links in `data` may lead into, such as the cache of a hub. "" follows no link out
    of `data`."""

    controls: tuple[str, ...] = ()
    """Operators of `data/control.py` whose signals replace a quarter of the crops. A control model
    reads such signals as latents, and an autoencoder not trained on thin lines loses them."""

    hidden_frames: bool = False
    """Make frames of a quarter of the crops black, as an inpaint model reads them. The first and
    last frame and one in four of the others stay. Without this option, a last frame after black
    ones loses its colours and shows traces of the first frame."""

    init: str = ""
    """Autoencoder to start from, in any layout; "" starts from random weights."""

    decoder_only: bool = False
    """Train only the decoder of `init`. Encoder and latent statistics keep their bits, so existing
    latents, and models trained on them, stay valid."""

    ema_decay: float = 0.999
    """Decay per step of the averaged weights, which are written and measured; it warms up as
    (1 + n) / (10 + n). 0 keeps no average."""

    seed: int = 0
    """Seed of weights, crops and noise."""

    save_every: int = 1000
    """Steps between checkpoints; the run also saves at its end and by time. 0 saves none by
    steps."""

    save_minutes: float = 30.0
    """Minutes after the last checkpoint until the run saves another, between two steps. 0 saves
    none by time."""

    log_every: int = 20
    """Steps between rows of metrics; the end also writes one. 0 writes no others."""

    picture_every: int = 1000
    """Steps between pictures of held-out clips; the end also makes one. 0 makes no others."""

    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where numbers and pictures are shown beside the metrics file: "tensorboard", "wandb",
    "trackio", each in the output folder."""

    hang_seconds: float = 120.0
    """Seconds that a step or a wait for data may take before the process exits. Five times the
    slowest recent step is always allowed. 0 sets no limit."""

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
        resolve_fields(self, "data", "init", by=place)
        resolve_fields(self, "output", "links")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(
                f"VAETrainConfig.stages has {self.steps} steps in all; use 1 to {MAX_STEPS} steps"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"VAETrainConfig.warmup_steps is {self.warmup_steps}, and the stages have "
                f"{self.steps} steps in all: use fewer warm-up steps than those, or 0"
            )
        if self.decoder_only and not self.init:
            raise ValueError("decoder_only without init: set init to the autoencoder to start from")
        for name in self.controls:
            if name not in OPERATORS:
                raise ValueError(f"controls: no operator {name!r}; use {', '.join(OPERATORS)}")

    @property
    def steps(self) -> int:
        """Return the number of updates of all stages."""
        return sum(stage.steps for stage in self.stages)

    def number_at(self, step: int) -> int:
        """Return the index, from 0, of the stage that makes the update after `step` updates."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number
            step -= stage.steps
        return len(self.stages) - 1

    def stage_at(self, step: int) -> VAEStage:
        """Return the stage that makes the update after `step` updates; the last one at the end."""
        return self.stages[self.number_at(step)]

    def adversarial(self, step: int) -> bool:
        """Return whether update number `step`, counted from 1, has the adversarial term."""
        return self.discriminator_start is not None and step >= self.discriminator_start
