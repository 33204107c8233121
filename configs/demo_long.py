"""The demo with three times its clips and most of an hour of training: it also learns shapes.

Shapes need far more steps than colours and directions, and objects that span several tokens. So the
medium stage is longer, and its high learning rate decays to a low one.
"""

from dataclasses import replace

from configs.demo import config as demo

LONGER = {
    "medium_t2v": {"steps": 4500, "learning_rate": 8e-3, "end_learning_rate": 4e-4},
    "medium_i2v": {"steps": 800, "learning_rate": 2e-3},
}

config = replace(
    demo,
    source="runs/demo_long/data",
    prepared="runs/demo_long/latents",
    vae="runs/demo_long/vae",
    text="runs/demo_long/text",
    run="runs/demo_long/train",
    stages=tuple(replace(s, **LONGER.get(s.name, {})) for s in demo.stages),
    samples=replace(demo.samples, guidance=4.0),
    ema_decay=0.995,
)
