"""Better shapes and speeds from pairs of videos of one prompt (`make demo-preference`).

The long demo's model learns adapters. The verb `pairs` makes four of its videos of each of 500
prompts, and the exact verifier of the world, `demos/verifier.py`, chooses the best and the worst.
"""

from dataclasses import replace

from configs.demo import MEDIUM
from configs.demo_long import config as demo
from configs.demo_reward import config as reward
from easyanimate_jax import DirectPreference, LatentSet, Stage

config = replace(
    demo,
    source="runs/demo_preference/pairs",
    prepared="runs/demo_preference/latents",
    run="runs/demo_preference/train",
    init="runs/demo_long/train",
    lora=reward.lora,
    frozen="float32",
    optimizer=reward.optimizer,
    sets=(LatentSet("pairs", MEDIUM, kinds=("video",), condition_draws=1, pairs=True),),
    stages=(
        Stage(
            "preference",
            "pairs",
            task="i2v",
            batch_size=8,
            steps=300,
            learning_rate=5e-4,
            end_learning_rate=5e-5,
            warmup=20,
            picture_drop=1.0,
            objective=DirectPreference(),
        ),
    ),
    samples=replace(demo.samples, every=0),
    ema_decay=0.98,
    text_drop=0.0,
)
