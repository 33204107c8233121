"""The demo with more of everything: where shapes and digits are asked for, in about an hour."""

from dataclasses import replace

from configs.demo import config as demo

FACTORS = {"image": 4, "small_t2v": 4, "medium_t2v": 5, "medium_i2v": 4, "large_i2v": 2}

config = replace(
    demo,
    run="runs/demo_long/train",
    stages=tuple(replace(s, steps=s.steps * FACTORS[s.name]) for s in demo.stages),
    ema_decay=0.995,
)
