"""The config of a run: `TrainConfig` composes the configs of model, data, stages and optimizer.

`load` reads a Python file of `configs/`; the command line overrides its fields (commands/parse.py).
Every run folder holds a JSON copy of its config, from which the run can be rebuilt.
"""

import dataclasses
import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from easyanimate_jax.data.buckets import Budget, check_size
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES
from easyanimate_jax.facts import MAX_STEPS, SEEDS, TrackerName, check_fields
from easyanimate_jax.models.lora import LoRAConfig
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.models.vae import VAEConfig
from easyanimate_jax.runs.stage_checks import check_stages, rewards_of
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.storage.local import local_path, resolve_fields
from easyanimate_jax.storage.mirror import work_folder
from easyanimate_jax.storage.stores import Place, Remote, place
from easyanimate_jax.training.optimizer import OptimizerConfig, Rates
from easyanimate_jax.training.post.objectives import (
    DirectPreference,
    DistributionMatching,
    GuidanceDistillation,
    NegativeAwareFinetuning,
    RewardBackpropagation,
    Rewarded,
    SegmentDistillation,
)
from easyanimate_jax.training.program import StepConfig
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.vae.config import VAEStage, VAETrainConfig
from easyanimate_jax.weights.module import without_removed

Frozen = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class SampleConfig:
    """The samples that a run makes from its averaged weights, always with the same seed.

    The default size, steps, guidance and seed are the reference's (spec 10.1).
    """

    prompts: tuple[str, ...] = ()
    """Prompts to sample. Control models cannot show them."""

    clips: int = 4
    """Held-out clips of the stage to make again, from their captions and their own start picture,
    control or camera; `validation.share` holds clips out."""

    every: int = 1000
    """Steps between samplings; the run also samples at the end of each stage. 0 makes no samples at
    all."""

    frames: int = 49
    """Frames of a sample, 4n+1."""

    height: int = 384
    """Height of a sample in pixels, a multiple of 16."""

    width: int = 672
    """Width of a sample in pixels, a multiple of 16."""

    steps: int = 50
    """Denoising steps."""

    guidance: float = 6.0
    """Scale of classifier-free guidance; 1 means no guidance (spec 4.5)."""

    seed: int = 43
    """Seed of the noise of every sample."""

    def __post_init__(self):
        check_fields(
            self,
            clips="[0, inf)",
            every="[0, inf)",
            frames="[1, inf)",
            height="[16, 1344]",
            width="[16, 1344]",
            steps=f"[1, {NUM_TRAIN_TIMES}]",
            guidance="[0, 100]",
            seed=SEEDS,
        )
        try:
            check_size(self.frames, self.height, self.width)
        except ValueError as error:
            raise ValueError(f"SampleConfig: {error}") from error


@dataclass(frozen=True)
class ValidationConfig:
    """Clips that are held out of training, and the loss that the run computes on them."""

    share: float = 0.0
    """Share of the files that are held out, chosen by a hash of their name; all clips of a film are
    on one side. 0 holds none out and makes no validation."""

    every: int = 1000
    """Steps between validations; the run also validates before the first and after the last step of
    each stage. 0 makes none, and the clips are still held out."""

    clips: int = 64
    """Most held-out clips of a stage to use, always the same."""

    times: int = 10
    """Times at which the loss of each clip is computed: the middles of as many equal shares of the
    training times."""

    seed: int = 44
    """Seed of the noise, captions and masks, which follow from it and the name of a clip."""

    def __post_init__(self):
        check_fields(
            self,
            share="[0, 1)",
            every="[0, inf)",
            clips="[1, inf)",
            times=f"[1, {NUM_TRAIN_TIMES}]",
            seed=SEEDS,
        )


PLACES = ("source", "prepared", "vae", "text", "run", "init", "init_lora")  # also gs://, s3://
LOCAL = ("links",)  # local paths


@dataclass(frozen=True)
class TrainConfig:
    """One run through the staged schedule."""

    source: str
    """Folder, table or list of captioned clips (docs/data.md)."""

    prepared: str
    """Folder of the encoded latent sets, which `prepare` makes from `source`."""

    vae: str
    """Folder of the video autoencoder, which is not trained; "emoji" names the package's own."""

    text: str
    """Folder of the tokenizers and text encoders, which are not trained; also "emoji"."""

    run: str
    """Folder of the run: its checkpoints, metrics and samples; also gs:// or s3://."""

    model: MMDiTConfig
    """Size of the transformer."""

    process: DDPM | Flow
    """Noise process: `DDPM` for V5, `Flow` for V5.1 (spec 4)."""

    sets: tuple[LatentSet, ...]
    """Latent sets that the stages read; their names must differ."""

    stages: tuple[Stage, ...]
    """Stages of the schedule in their order; their names must differ."""

    links: str = ""
    """Folder that links in `source` may lead into, such as the cache of a hub. "" follows no link
    out of `source`."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule of all stages."""

    lora: LoRAConfig = LoRAConfig()
    """Adapters to train beside the frozen weights of `init`."""

    train: Rates = ()
    """Weights of `init` to train: pairs of a pattern such as "blocks.*.attention.*" and a factor of
    the learning rate; the first pattern that a weight matches counts. All other weights are frozen.
    () trains all weights, or with `lora` the adapters alone."""

    frozen: Frozen = "bfloat16"
    """Type in which kernels that are not trained are stored; "int8" stores those of the blocks in 8
    bits."""

    mesh: MeshConfig = MeshConfig()
    """Devices along each mesh axis, in all stages that have no mesh of their own."""

    samples: SampleConfig = SampleConfig()
    """Samples that the run makes while it trains."""

    validation: ValidationConfig = ValidationConfig()
    """Clips that are held out, and the loss on them while the run trains."""

    ema_decay: float = 0.9999
    """Decay of the averaged weights per step (spec 9.3). 0 keeps no average, and samples and
    exports then have the trained weights."""

    text_drop: float = 0.1
    """Share of captions that are replaced by the empty caption, for guidance (spec 5.3); 0 replaces
    none."""

    seed: int = 42
    """Seed of the weights, the order of clips and all random draws; the default is that of the
    released scripts (spec 9.1)."""

    init: str = ""
    """Weights that the transformer starts from: a run folder, a model folder, a file, or "emoji".
    "" starts from random weights."""

    init_step: int | None = None
    """Checkpoint step to load if `init` is a run. None loads the newest."""

    init_lora: str = ""
    """LoRA file that the adapters begin with, of a rank up to `lora.rank`; a resume ignores it."""

    save_every: int = 1000
    """Steps between checkpoints; the run also saves at the end of each stage and by time. 0 saves
    none by steps."""

    save_minutes: float = 30.0
    """Minutes after the last checkpoint until the run saves another, between two steps. 0 saves
    none by time."""

    keep: int = 3
    """Number of newest checkpoints to keep, besides the last of each stage. At least 2 are always
    kept, in case one is damaged."""

    keep_every: int | None = None
    """Also keep the checkpoints whose step is a multiple of this. None and 0 keep no others."""

    hang_seconds: float = 120.0
    """Seconds that a step or a wait for data may take before the process exits. Five times the
    slowest recent step is always allowed. 0 sets no limit."""

    goodput_job: str = ""
    """Job name under which the run reports its goodput to Google Cloud; "" reports nothing."""

    log_every: int = 10
    """Steps between progress lines; the first step of each stage also prints one. 0 prints no
    others. The metrics file has every step."""

    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where numbers, pictures and films are shown beside the metrics file: "tensorboard", "wandb",
    "trackio", each in the run's folder."""

    def __post_init__(self):
        check_fields(
            self,
            train="[0, inf)",
            ema_decay="[0, 1)",
            text_drop="[0, 1]",
            seed=SEEDS,
            init_step="[0, inf)",
            save_every="[0, inf)",
            save_minutes="[0, inf)",
            keep="[1, inf)",
            keep_every="[0, inf)",
            hang_seconds="[0, inf)",
            log_every="[0, inf)",
        )
        resolve_fields(self, *PLACES, by=place)
        resolve_fields(self, *LOCAL)
        steps = sum(stage.steps for stage in self.stages)
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(
                f"TrainConfig.stages has {steps} steps in all; use 1 to {MAX_STEPS} steps"
            )
        if self.step.partial and not self.init:
            what = "lora.rank asks for adapters" if self.adapters else "train asks for a part"
            raise ValueError(
                f"TrainConfig: {what} of existing weights, and init is empty; give the path of the "
                f"weights, such as --init EasyAnimateV5.1-12b-zh-InP"
            )
        if self.adapters and self.optimizer.matrices != "adam":
            raise ValueError(
                f"TrainConfig: optimizer.matrices={self.optimizer.matrices!r} with lora: adapters "
                f"are trained by Adam; use 'adam'"
            )
        check_stages(self)

    @property
    def step(self) -> StepConfig:
        """Return the settings that the train step of every stage depends on."""
        rewarded = any(isinstance(stage.objective, Rewarded) for stage in self.stages)
        return StepConfig(
            self.model,
            self.optimizer,
            self.process,
            self.ema_decay,
            self.adapters,
            self.train,
            self.frozen,
            any(stage.objective is not None for stage in self.stages),
            any(isinstance(stage.objective, DistributionMatching) for stage in self.stages),
            (tuple(sorted(rewards_of(self))), self.vae) if rewarded else None,
        )

    @property
    def folder(self) -> Path:
        """Return the local folder of the run's small files; a run in a store uploads them."""
        run = place(self.run)
        return work_folder(run) if isinstance(run, Remote) else run

    @property
    def checkpoints(self) -> Place:
        """Return the folder of the run's checkpoints."""
        return place(self.run) / "checkpoints"

    @property
    def adapters(self) -> LoRAConfig | None:
        """Return the adapters that the run trains; None without any."""
        return self.lora if self.lora.rank else None

    def mesh_of(self, stage: Stage) -> MeshConfig:
        """Return the mesh of a stage: its own, or that of the config."""
        return self.mesh if stage.mesh is None else stage.mesh

    def set(self, name: str) -> LatentSet:
        """Return the latent set with this name."""
        return next(s for s in self.sets if s.name == name)


def load(path: str) -> TrainConfig | VAETrainConfig:
    """Return the `config` that a Python file defines.

    Raises ValueError if the file does not exist or defines no config.
    """
    path = str(local_path(path))
    if not Path(path).is_file():
        raise ValueError(f"there is no config {path!r}; use a file such as those in configs/")
    sys.path.append(str(Path(path).resolve().parent.parent))  # configs import one another
    try:
        config = runpy.run_path(path).get("config")
    finally:
        sys.path.pop()
    if not isinstance(config, TrainConfig | VAETrainConfig):
        raise ValueError(f"{path} defines no `config = TrainConfig(...)` or `VAETrainConfig(...)`")
    return config


_ROOMS = (VAETrainConfig, VAEStage, VAEConfig, MMDiTConfig, DDPM, Flow, LatentSet, Budget, Stage)
_ROOMS += (GuidanceDistillation, SegmentDistillation, DistributionMatching, DirectPreference)
_ROOMS += (RewardBackpropagation, NegativeAwareFinetuning)
_CLASSES = {
    c.__name__: c
    for c in (
        TrainConfig,
        SampleConfig,
        ValidationConfig,
        OptimizerConfig,
        MeshConfig,
        LoRAConfig,
        *_ROOMS,
    )
}


def to_json(config) -> str:
    """Return a config as JSON text; every dataclass stores its name under the key "class"."""

    def encode(x):
        if dataclasses.is_dataclass(x):
            fields = {f.name: encode(getattr(x, f.name)) for f in dataclasses.fields(x)}
            return {"class": type(x).__name__} | fields
        return [encode(v) for v in x] if isinstance(x, tuple) else x

    return json.dumps(encode(config), indent=1, ensure_ascii=False)


def from_json(text: str):
    """Return the config that `to_json` wrote as `text`.

    Raises ValueError for a class or field that this version does not have.
    """

    def decode(x):
        if isinstance(x, list):
            return tuple(decode(v) for v in x)
        if not isinstance(x, dict):
            return x
        name = x.get("class")
        if name not in _CLASSES:
            raise ValueError(f"config names class {name!r}; known are {sorted(_CLASSES)}")
        try:
            fields = without_removed(name, x)
            return _CLASSES[name](**{k: decode(v) for k, v in fields.items() if k != "class"})
        except TypeError as error:
            raise ValueError(f"config of {name} does not fit this version: {error}") from error

    return decode(json.loads(text))
