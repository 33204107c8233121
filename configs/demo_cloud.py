"""The demo with few clips and few steps: `make demo-cloud` runs it on a disk and in two stores."""

from dataclasses import replace

from configs.demo import config as demo
from easyanimate_jax import SampleConfig

STEPS = {"image": 6, "small_t2v": 8, "medium_i2v": 6}

config = replace(
    demo,
    source="runs/demo_cloud/local/data",
    prepared="runs/demo_cloud/local/latents",
    vae="runs/demo_cloud/local/vae",
    text="runs/demo_cloud/local/text",
    run="runs/demo_cloud/local/train",
    stages=tuple(
        replace(stage, steps=STEPS[stage.name], batch_size=4)
        for stage in demo.stages
        if stage.name in STEPS
    ),
    samples=SampleConfig(every=0, frames=9, height=64, width=64, steps=3, guidance=2.0),
    save_every=3,
    log_every=1,
    trackers=(),
)
