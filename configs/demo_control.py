"""A control model from `demo_base`'s text-to-video checkpoint: 48 channels, for edges and paths.

A clip is led by its Canny edges or by the spot that runs along its object's path, drawn for every
row, and by its first frame.
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
            reference_drop=0.8,  # beside the first frame a control says little, and is not learned
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
    samples=replace(demo.samples, prompts=()),  # they would be made without a control
    init=demo.run,
    init_step=boundaries(demo.stages)[2],  # the end of text to video
)
