"""The config of a video autoencoder's training: a value, beside what it configures."""

from dataclasses import dataclass

from easyanimate_jax.data.control import OPERATORS
from easyanimate_jax.models.borders import check_video
from easyanimate_jax.models.vae import VAEConfig
from easyanimate_jax.training.optimizer import Matrices, check_matrices

PYRAMID_LEVELS = 4  # of the perceptual term; each halves the crop


@dataclass(frozen=True)
class VAEStage:
    """Steps on crops of one shape: one compiled program. Clips that are too small are left out."""

    steps: int  # updates of the weights
    batch_size: int  # crops in a global batch
    frames: int  # of a crop, 4n+1
    size: int  # side of the square crop, in pixels

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self}: {name} must be 1 or more.")
        check_video((self.batch_size, self.frames, self.size, self.size, 3))
        if self.size < 2**PYRAMID_LEVELS:
            raise ValueError(f"{self}: size must be {2**PYRAMID_LEVELS} or more.")


@dataclass(frozen=True)
class VAETrainConfig:
    """One training of an autoencoder: on the clips of `data`, into the folder `output`.

    With `controls`, operators of `data/control.py`, a quarter of the crops are their signals. A
    control model reads signals as latents: an autoencoder that never saw thin lines loses them.
    With `hidden_frames`, a quarter keep their first and last frame and one in four of the others,
    the rest black, as an inpaint model reads them: else a last frame after black ones loses its
    colours and gets the ghost of the first.
    `init` is an autoencoder to go on from. `decoder_only` leaves its encoder and statistics as they
    are, so latents that were made stay right, and so do models that were trained on them.
    The averaged weights are what is written at the end, measured and shown. A step that lasts
    `hang_seconds` ends the process, unless steps always last about as long.
    """

    vae: VAEConfig  # the autoencoder's shape
    data: str  # any source of captioned clips; captions are not read
    output: str  # folder of the finished model, its checkpoints, metrics and pictures
    stages: tuple[VAEStage, ...]  # one after the other
    learning_rate: float = 1e-4  # after the warm-up; it falls to a hundredth along a cosine
    warmup_steps: int = 1000  # steps in which the learning rate rises from 0
    betas: tuple[float, float] = (0.9, 0.999)  # decay of Adam's two moments
    weight_decay: float = 0.05  # decoupled from the gradient
    l2_weight: float = 0.1  # of the squared error
    perceptual_weight: float = 1.0  # of the error's image gradients
    kl_weight: float = 1e-6  # of the divergence of latents from a standard normal
    outlier_weight: float = 1e5  # of latents beyond three standard deviations
    gan_weight: float = 0.5  # of the adversarial term, after its gradients are balanced
    discriminator_start: int | None = 50_001  # first adversarial step; None: never
    matrices: Matrices = "adam"  # what updates the kernels of convolutions (`optimizer.py`)
    controls: tuple[str, ...] = ()  # operators whose signals replace a quarter of the crops
    hidden_frames: bool = False  # black frames in a quarter of the crops
    init: str = ""  # autoencoder to start from, in any layout; "" is new weights
    decoder_only: bool = False  # train the decoder of `init` alone
    ema_decay: float = 0.999  # of the averaged weights; it warms up as (1 + n) / (10 + n)
    seed: int = 0  # of weights, crops and noise
    save_every: int = 1000  # steps between checkpoints; 0: at the end alone
    log_every: int = 20  # steps between rows of metrics; 0: at the end alone
    picture_every: int = 1000  # steps between pictures of reconstructions; 0: at the end alone
    hang_seconds: float = 120.0  # seconds that a step or a wait for data may last

    def __post_init__(self):
        check_matrices(self.matrices)
        if self.decoder_only and not self.init:
            raise ValueError("decoder_only without init: name the autoencoder whose decoder it is")
        for name in self.controls:
            if name not in OPERATORS:
                raise ValueError(f"controls: no operator {name!r}; use {', '.join(OPERATORS)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; use 0 (no average) to below 1.")
        for name in ("save_every", "log_every", "picture_every"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; use 0 (at the end alone) or more."
                )

    @property
    def steps(self) -> int:
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
