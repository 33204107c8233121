"""EasyAnimateV5.1 12B: Qwen2-VL text states, rectified flow, batches and steps of its report."""

from dataclasses import replace

from configs.v5_12b import config as v5_12b
from easyanimate_jax import Flow, OptimizerConfig

SCHEDULE = {  # batch size, steps (spec 9.4)
    "3328_t2v": (1024, 100_000),
    "13312_t2v": (512, 60_000),
    "13312_i2v": (256, 5_000),
    "53248_i2v": (256, 5_000),
}

config = replace(
    v5_12b,
    run="runs/v51_12b",
    model=replace(v5_12b.model, text_widths=(3584,), text_norm=True),
    process=Flow(),
    optimizer=OptimizerConfig(weight_decay=5e-2),
    stages=tuple(
        replace(s, batch_size=SCHEDULE[s.name][0], steps=SCHEDULE[s.name][1])
        if s.name in SCHEDULE
        else s
        for s in v5_12b.stages
    ),
)
