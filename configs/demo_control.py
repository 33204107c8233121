"""A control model from `demo_base`'s text-to-video checkpoint: 48 channels, for edges and paths.

A clip is controlled by its first frame and by either its Canny edges or a spot that moves along its
object's path. The choice is random for every row.
"""

from dataclasses import replace

from configs.demo_base import config as demo
from easyanimate_jax import Stage, boundaries

CONTROL = {"control": ("canny", "file"), "condition_draws": 0}

config = replace(
    demo,
    prepared="runs/demo_control/latents",
    vae="runs/demo_control/vae",
    run="runs/demo_control/train",
    sets=tuple(replace(demo.set(name), **CONTROL) for name in ("medium", "large")),
    stages=(
        Stage(
            "medium_control",
            "medium",
            task="control_ref",
            batch_size=8,
            steps=4000,
            learning_rate=6e-3,
            end_learning_rate=3e-4,
            warmup=20,
            reference_drop=0.8,  # with the first frame a control adds little and is not learned
        ),
        Stage(
            "large_control",
            "large",
            task="control_ref",
            batch_size=2,
            steps=20,
            learning_rate=1e-4,
        ),
    ),
    samples=replace(demo.samples, prompts=()),  # samples during training would have no control
    init=demo.run,
    init_step=boundaries(demo.stages)[2],  # the end of the last text-to-video stage
)
