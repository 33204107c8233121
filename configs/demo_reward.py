"""Better shapes and speeds by the gradient of a judge's reward (`make demo-reward`).

The long demo's student of four steps learns adapters. It is sampled at the four times that it was
distilled for. `demos/judge.py` is the reward.
"""

from dataclasses import replace

from configs.demo_distill import config as distill
from easyanimate_jax import Flow, LoRAConfig, OptimizerConfig, RewardBackpropagation, Stage

TIMES = tuple(map(float, Flow().grid(4)))  # of the student

config = replace(
    distill,
    run="runs/demo_reward/train",
    init="runs/demo_distill/train",
    lora=LoRAConfig(rank=32, alpha=32.0),
    optimizer=OptimizerConfig(b2=0.99, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0),
    stages=(
        Stage(
            "reward",
            "medium",
            task="i2v",
            batch_size=4,  # most of a step is the gradient of decoding nine frames
            steps=160,
            learning_rate=1e-3,
            end_learning_rate=1e-4,
            warmup=20,
            picture_drop=1.0,
            objective=RewardBackpropagation(
                "demos.judge:reward",
                frames=9,
                height=128,
                width=128,
                decoded=3,
                steps=4,
                times=TIMES,
                guidance=1.0,
                chosen=2,
                last=4,
                distance=1.0,
            ),
        ),
    ),
    text_drop=0.0,  # a video without a caption has no reward
)
