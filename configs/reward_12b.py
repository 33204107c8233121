"""Rewards for V5.1's 12B, as adapters on its student of four steps (docs/posttraining.md).

`weights` is the released model with the adapters of configs/distill_12b.py, merged by
`python -m easyanimate_jax convert EasyAnimateV5.1-12b-zh weights --to jax --lora FILE`.

The stages "gradient" use a JAX function; put your own in the place of `contrast`. The stages "any"
use a server.
"""

from dataclasses import replace

import jax.numpy as jnp

from configs.v5_12b import TOKENS_3328, TOKENS_13312
from configs.v51_12b import config as v51_12b
from easyanimate_jax import (
    LatentSet,
    LoRAConfig,
    MeshConfig,
    NegativeAwareFinetuning,
    OptimizerConfig,
    RewardBackpropagation,
    Stage,
)

TIMES = tuple(map(float, v51_12b.process.grid(4)))
SHORT = {"frames": 49, "height": 256, "width": 256}  # 3,328 tokens
LONG = {"frames": 49, "height": 512, "width": 512}  # 13,312 tokens


def contrast(frames, texts):
    """Return the deviation of the pixels of each video (B, F, H, W, 3): an example of a reward."""
    return jnp.std(frames, axis=(1, 2, 3, 4))


def gradient(size: dict) -> RewardBackpropagation:
    """Return the objective of a stage that uses the reward's gradient."""
    few = {"steps": 4, "times": TIMES, "guidance": 1.0, "chosen": 2, "last": 4}
    return RewardBackpropagation(
        "configs.reward_12b:contrast", **size, **few, decoded=2, distance=0.1
    )


def online(size: dict) -> NegativeAwareFinetuning:
    """Return the objective of a stage that asks a server."""
    return NegativeAwareFinetuning("http://localhost:8080", **size, count=8, steps=4, times=2)


config = replace(
    v51_12b,
    run="runs/reward_12b",
    init="weights",
    lora=LoRAConfig(rank=64, alpha=64.0, targets=("attention", "mlp")),
    mesh=MeshConfig(fsdp=128),
    sets=(LatentSet("3328", TOKENS_3328), LatentSet("13312", TOKENS_13312, min_side=720)),
    stages=(
        Stage("gradient", "3328", 128, 1_000, learning_rate=1e-5, objective=gradient(SHORT)),
        Stage("gradient_long", "13312", 128, 500, learning_rate=1e-5, objective=gradient(LONG)),
        Stage("any", "3328", 128, 500, learning_rate=3e-5, objective=online(SHORT)),
        Stage("any_long", "13312", 128, 250, learning_rate=3e-5, objective=online(LONG)),
    ),
    optimizer=OptimizerConfig(weight_decay=0.0, max_grad_norm=0.3),
    ema_decay=0.9,
    text_drop=0.0,
    save_every=100,
)
