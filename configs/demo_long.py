"""The demo with most of an hour for one stage: where shapes and digits are asked for.

Edges need far more steps than colours and directions do, and objects that span several tokens: the
medium stage, and high learning rates, which decay until they are fine enough.
"""

from dataclasses import replace

from configs.demo import config as demo

LONGER = {
    "image": {"steps": 300},
    "medium_t2v": {"steps": 8500, "learning_rate": 8e-3, "end_learning_rate": 3e-4},
    "medium_i2v": {"steps": 1200, "learning_rate": 1.5e-3, "end_learning_rate": 1e-4},
}

config = replace(
    demo,
    run="runs/demo_long/train",
    stages=tuple(replace(s, **LONGER.get(s.name, {})) for s in demo.stages),
    ema_decay=0.995,
)
