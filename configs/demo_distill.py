"""Few steps instead of fifty: the long demo's model teaches its own adapters (`make demo-distill`).

The first stage learns eight segments of the way from noise to data, the second one four.
"""

from dataclasses import replace

from configs.demo_long import config as demo
from easyanimate_jax import LoRAConfig, OptimizerConfig, SegmentDistillation, Stage

config = replace(
    demo,
    run="runs/demo_distill/train",
    init="runs/demo_long/train",
    lora=LoRAConfig(rank=32, alpha=32.0),
    frozen="float32",
    stages=(
        Stage(
            "four",
            "medium",
            task="i2v",
            batch_size=8,
            steps=600,
            learning_rate=2e-3,
            end_learning_rate=1e-4,
            warmup=20,
            picture_drop=1.0,
            objective=SegmentDistillation(steps=4, substeps=4, guidance=4.0),
        ),
    ),
    optimizer=OptimizerConfig(b2=0.99, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0),
    ema_decay=0.98,
)
