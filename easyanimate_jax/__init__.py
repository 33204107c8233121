"""EasyAnimateV5 in JAX and Flax: video diffusion transformers, trained and sampled on TPU and GPU.

    import easyanimate_jax as ea

    pipeline = ea.load_pipeline("runs/demo/train")
    frames = pipeline("a red circle moves right slowly on a black background")

The package imports each name at its first use, so `import easyanimate_jax` does not load JAX.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from easyanimate_jax.commands.parse import load_config as load_config
    from easyanimate_jax.data.buckets import Budget as Budget
    from easyanimate_jax.data.records import LatentSet as LatentSet
    from easyanimate_jax.diffusion.ddpm import DDPM as DDPM
    from easyanimate_jax.diffusion.flow import Flow as Flow
    from easyanimate_jax.generation.denoising import Sampling as Sampling
    from easyanimate_jax.generation.pipelines import LatentDiffusion as LatentDiffusion
    from easyanimate_jax.generation.pipelines import control_to_video as control_to_video
    from easyanimate_jax.generation.pipelines import denoise_latents as denoise_latents
    from easyanimate_jax.generation.pipelines import image_to_video as image_to_video
    from easyanimate_jax.generation.pipelines import long_video as long_video
    from easyanimate_jax.generation.pipelines import text_to_video as text_to_video
    from easyanimate_jax.generation.pipelines import video_to_video as video_to_video
    from easyanimate_jax.generation.rows import Request as Request
    from easyanimate_jax.models.lora import LoRAConfig as LoRAConfig
    from easyanimate_jax.models.mmdit import MMDiT as MMDiT
    from easyanimate_jax.models.mmdit import MMDiTConfig as MMDiTConfig
    from easyanimate_jax.models.vae import CausalVAE as CausalVAE
    from easyanimate_jax.models.vae import VAEConfig as VAEConfig
    from easyanimate_jax.runs.config import SampleConfig as SampleConfig
    from easyanimate_jax.runs.config import TrainConfig as TrainConfig
    from easyanimate_jax.runs.config import ValidationConfig as ValidationConfig
    from easyanimate_jax.runs.load import Pipeline as Pipeline
    from easyanimate_jax.runs.load import load_pipeline as load_pipeline
    from easyanimate_jax.runs.loop import train as train
    from easyanimate_jax.runs.parts import Parts as Parts
    from easyanimate_jax.sharding import MeshConfig as MeshConfig
    from easyanimate_jax.text.encode import TextEncoder as TextEncoder
    from easyanimate_jax.training.optimizer import OptimizerConfig as OptimizerConfig
    from easyanimate_jax.training.post.objectives import DirectPreference as DirectPreference
    from easyanimate_jax.training.post.objectives import (
        DistributionMatching as DistributionMatching,
    )
    from easyanimate_jax.training.post.objectives import (
        GuidanceDistillation as GuidanceDistillation,
    )
    from easyanimate_jax.training.post.objectives import (
        NegativeAwareFinetuning as NegativeAwareFinetuning,
    )
    from easyanimate_jax.training.post.objectives import (
        RewardBackpropagation as RewardBackpropagation,
    )
    from easyanimate_jax.training.post.objectives import SegmentDistillation as SegmentDistillation
    from easyanimate_jax.training.stages import Stage as Stage
    from easyanimate_jax.training.stages import boundaries as boundaries
    from easyanimate_jax.training.vae.config import VAEStage as VAEStage
    from easyanimate_jax.training.vae.config import VAETrainConfig as VAETrainConfig
    from easyanimate_jax.weights.adapters import open_loras as open_loras
    from easyanimate_jax.weights.conversion import Options as ConvertOptions  # noqa: F401
    from easyanimate_jax.weights.conversion import convert as convert
    from easyanimate_jax.weights.folder import load_mmdit as load_mmdit
    from easyanimate_jax.weights.folder import load_vae as load_vae

_HOMES = {
    "commands.parse": ("load_config",),
    "data.buckets": ("Budget",),
    "data.records": ("LatentSet",),
    "diffusion.ddpm": ("DDPM",),
    "diffusion.flow": ("Flow",),
    "generation.denoising": ("Sampling",),
    "generation.pipelines": (
        "LatentDiffusion",
        "control_to_video",
        "denoise_latents",
        "image_to_video",
        "long_video",
        "text_to_video",
        "video_to_video",
    ),
    "generation.rows": ("Request",),
    "models.lora": ("LoRAConfig",),
    "models.mmdit": ("MMDiT", "MMDiTConfig"),
    "models.vae": ("CausalVAE", "VAEConfig"),
    "runs.config": ("SampleConfig", "TrainConfig", "ValidationConfig"),
    "runs.load": ("Pipeline", "load_pipeline"),
    "runs.loop": ("train",),
    "runs.parts": ("Parts",),
    "sharding": ("MeshConfig",),
    "text.encode": ("TextEncoder",),
    "training.optimizer": ("OptimizerConfig",),
    "training.post.objectives": (
        "DirectPreference",
        "DistributionMatching",
        "GuidanceDistillation",
        "NegativeAwareFinetuning",
        "RewardBackpropagation",
        "SegmentDistillation",
    ),
    "training.stages": ("Stage", "boundaries"),
    "training.vae.config": ("VAEStage", "VAETrainConfig"),
    "weights.adapters": ("open_loras",),
    "weights.conversion": ("ConvertOptions", "convert"),
    "weights.folder": ("load_mmdit", "load_vae"),
}
_THERE = {"ConvertOptions": "Options"}  # names that differ in their modules
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), _THERE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
