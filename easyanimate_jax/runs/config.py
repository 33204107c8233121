"""A run is a value: `TrainConfig` composes the configs of the rooms below it.

`load` reads a Python file of `configs/`; the command line overrides its fields (commands/parse.py).
A JSON copy of the config lies in every run folder and is enough to rebuild everything.
"""

import dataclasses
import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.models.vae import VAEConfig
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.training.optimizer import OptimizerConfig
from easyanimate_jax.training.program import StepConfig
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.vae.loop import VAEStage, VAETrainConfig


@dataclass(frozen=True)
class SampleConfig:
    """What a run shows of itself: `prompts` sampled every `every` steps with fixed noise."""

    prompts: tuple[str, ...] = ()
    every: int = 1000
    frames: int = 49
    height: int = 384
    width: int = 672
    steps: int = 50
    guidance: float = 6.0
    seed: int = 43


@dataclass(frozen=True)
class TrainConfig:
    """One run through the staged schedule.

    `source` is the folder of captioned files, `prepared` what `easyanimate_jax.prepare` made of it,
    `vae` and `text` the folders of the two frozen models, `run` where checkpoints and metrics go.
    `init` is what the transformer starts from, for `convert.load_mmdit` to read; "" is noise. Of a
    run it is the newest checkpoint, or that of `init_step`.
    Kept are the last `keep` checkpoints, every stage's last, and the multiples of `keep_every`.
    A step that lasts `hang_seconds` ends the process, unless steps always last about as long.
    `goodput_job` is the name under which Google Cloud is told where the time goes; "" tells nobody.
    """

    source: str
    prepared: str
    vae: str
    text: str
    run: str
    model: MMDiTConfig
    process: DDPM | Flow
    sets: tuple[LatentSet, ...]
    stages: tuple[Stage, ...]
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    samples: SampleConfig = SampleConfig()
    ema_decay: float = 0.9999
    text_drop: float = 0.1
    seed: int = 42
    init: str = ""
    init_step: int | None = None
    save_every: int = 1000
    keep: int = 3
    keep_every: int | None = None
    hang_seconds: float = 120.0
    goodput_job: str = ""
    log_every: int = 10

    def __post_init__(self):
        names = [s.name for s in self.sets]
        for stage in self.stages:
            if stage.data not in names:
                raise ValueError(
                    f"stage {stage.name!r} reads latent set {stage.data!r}, and the config has "
                    f"{names}. Add the set, or correct the stage's `data`."
                )
            latents = self.set(stage.data)
            if stage.task == "i2v" and not (latents.condition_draws or latents.pixels):
                raise ValueError(
                    f"stage {stage.name!r} trains {stage.task}, and latent set {stage.data!r} "
                    f"holds no conditioning; give the set `condition_draws` of 1 or more."
                )
            if stage.task not in ("t2v", "i2v") and not latents.control:
                raise ValueError(
                    f"stage {stage.name!r} trains {stage.task}, and latent set {stage.data!r} "
                    f"holds no control; give the set one: 'file', 'camera' or an operator's name."
                )
        for group in (names, [s.name for s in self.stages]):
            if len(set(group)) < len(group):
                raise ValueError(f"names must differ: {group}")

    @property
    def step(self) -> StepConfig:
        """What the train step of every stage depends on."""
        return StepConfig(self.model, self.optimizer, self.process, self.ema_decay)

    def set(self, name: str) -> LatentSet:
        """The latent set of that name."""
        return next(s for s in self.sets if s.name == name)


def load(path: str) -> TrainConfig | VAETrainConfig:
    """Return the `config` of a file. Raises ValueError for a missing file or value."""
    if not Path(path).is_file():
        raise ValueError(f"there is no config {path!r}; the ones that come with us are in configs/")
    sys.path.append(str(Path(path).resolve().parent.parent))  # configs import one another
    try:
        config = runpy.run_path(path).get("config")
    finally:
        sys.path.pop()
    if not isinstance(config, TrainConfig | VAETrainConfig):
        raise ValueError(f"{path} defines no `config = TrainConfig(...)` or `VAETrainConfig(...)`")
    return config


_ROOMS = (VAETrainConfig, VAEStage, VAEConfig, MMDiTConfig, DDPM, Flow, LatentSet, Budget, Stage)
_CLASSES = {
    c.__name__: c for c in (TrainConfig, SampleConfig, OptimizerConfig, MeshConfig, *_ROOMS)
}


def to_json(config) -> str:
    """A config as JSON; every dataclass carries its name under "class"."""

    def encode(x):
        if dataclasses.is_dataclass(x):
            fields = {f.name: encode(getattr(x, f.name)) for f in dataclasses.fields(x)}
            return {"class": type(x).__name__} | fields
        return [encode(v) for v in x] if isinstance(x, tuple) else x

    return json.dumps(encode(config), indent=1, ensure_ascii=False)


def from_json(text: str):
    """The inverse of `to_json`. Raises ValueError for a class or field this version lacks."""

    def decode(x):
        if isinstance(x, list):
            return tuple(decode(v) for v in x)
        if not isinstance(x, dict):
            return x
        name = x.get("class")
        if name not in _CLASSES:
            raise ValueError(f"config names class {name!r}; known are {sorted(_CLASSES)}")
        try:
            return _CLASSES[name](**{k: decode(v) for k, v in x.items() if k != "class"})
        except TypeError as error:
            raise ValueError(f"config of {name} does not fit this version: {error}") from error

    return decode(json.loads(text))
