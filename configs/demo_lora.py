"""A LoRA that teaches the demo's model a new direction from 24 clips (`make demo-lora`).

The model, its VAE and its text encoders are those of `make demo`.
"""

from dataclasses import replace

from configs.demo import config as demo
from easyanimate_jax import Budget, LatentSet, LoRAConfig, OptimizerConfig, SampleConfig, Stage

ALL = Budget(192, lengths=(192,), sizes=(80, 96, 128), frames=17, min_fill=0.5)

config = replace(
    demo,
    source="runs/demo_lora/data",
    prepared="runs/demo_lora/latents",
    run="runs/demo_lora/train",
    init="runs/demo/train",
    process=replace(demo.process, train_shift=20.0),
    lora=LoRAConfig(
        rank=8,
        alpha=8.0,
        targets=("texts.*", "blocks.*.text.attention.*", "blocks.*.video.attention.out"),
    ),
    sets=(LatentSet("northeast", ALL, kinds=("video",)),),
    stages=(
        Stage(
            "northeast",
            "northeast",
            batch_size=4,
            steps=700,
            learning_rate=1e-2,
            end_learning_rate=1e-3,
        ),
    ),
    optimizer=OptimizerConfig(weight_decay=0.0, b2=0.99, max_grad_norm=1.0),
    samples=SampleConfig(every=0, frames=9, height=128, width=128, steps=10, guidance=2.0),
)
