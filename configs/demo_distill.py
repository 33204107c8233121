"""Few steps instead of fifty: the long demo's model teaches a student (`make demo-distill`).

The student learns eight segments of the way from noise to data, then four. All its weights are
trained, and half of the rows begin with the student's own steps from noise, as in sampling.
"""

from dataclasses import replace

from configs.demo_long import config as demo
from easyanimate_jax import OptimizerConfig, SegmentDistillation, Stage

GUIDANCE = 2.0  # of the teacher: its speeds are right more often than with 4


def stage(name: str, segments: int, **settings) -> Stage:
    """Return a stage that teaches so many segments, as text to video."""
    return Stage(
        name,
        "medium",
        batch_size=8,
        task="i2v",
        picture_drop=1.0,
        warmup=20,
        objective=SegmentDistillation(segments, substeps=4, guidance=GUIDANCE, walked=0.5),
        **settings,
    )


config = replace(
    demo,
    run="runs/demo_distill/train",
    init="runs/demo_long/train",
    frozen="float32",
    stages=(
        stage("eight", 8, steps=400, learning_rate=1e-3, end_learning_rate=1e-4),
        stage("four", 4, steps=800, learning_rate=1e-3, end_learning_rate=1e-5),
    ),
    optimizer=OptimizerConfig(b2=0.99, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0),
    samples=replace(demo.samples, guidance=GUIDANCE, every=0),
    ema_decay=0.98,
    text_drop=0.0,
)
