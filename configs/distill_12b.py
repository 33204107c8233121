"""Four steps instead of fifty for V5.1's 12B, as adapters on a frozen base (docs/posttraining.md).

`python -m easyanimate_jax convert EasyAnimateV5.1-12b-zh weights --to jax` writes `weights`. First
the student learns eight and four segments of the teacher's way, the four also at 13312 tokens, then
its videos are made sharp at both lengths.
"""

from dataclasses import replace

from configs.v5_12b import TOKENS_3328, TOKENS_13312
from configs.v51_12b import config as v51_12b
from easyanimate_jax import (
    DistributionMatching,
    LatentSet,
    LoRAConfig,
    MeshConfig,
    OptimizerConfig,
    SegmentDistillation,
    Stage,
)

config = replace(
    v51_12b,
    run="runs/distill_12b",
    init="weights/transformer",
    lora=LoRAConfig(rank=64, alpha=64.0, targets=("attention", "mlp")),
    mesh=MeshConfig(fsdp=128),
    sets=(LatentSet("3328", TOKENS_3328), LatentSet("13312", TOKENS_13312, min_side=720)),
    stages=(
        Stage(
            "segments_8",
            "3328",
            batch_size=128,
            steps=2_000,
            learning_rate=5e-5,
            objective=SegmentDistillation(steps=8, substeps=4),
        ),
        Stage(
            "segments_4",
            "3328",
            batch_size=128,
            steps=2_000,
            learning_rate=5e-5,
            end_learning_rate=5e-6,
            objective=SegmentDistillation(steps=4, substeps=5),
        ),
        Stage(
            "segments_4_long",
            "13312",
            batch_size=128,
            steps=1_000,
            learning_rate=5e-6,
            objective=SegmentDistillation(steps=4, substeps=5),
        ),
        Stage(
            "matching_4",
            "3328",
            batch_size=128,
            steps=3_000,
            learning_rate=1e-5,
            objective=DistributionMatching(steps=4),
        ),
        Stage(
            "matching_4_long",
            "13312",
            batch_size=128,
            steps=1_000,
            learning_rate=5e-6,
            objective=DistributionMatching(steps=4),
        ),
    ),
    # Of the published runs (docs/posttraining.md).
    optimizer=OptimizerConfig(b1=0.0, weight_decay=0.0, max_grad_norm=1.0),
    ema_decay=0.99,
    text_drop=0.0,
    save_every=250,
)
