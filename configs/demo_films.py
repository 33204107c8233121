"""Two short stages on the clips that curation cut, for `make demo-films`.

The demo shows the steps from films to training. The training is too short for good samples.
"""

from dataclasses import replace

from configs.demo import config as demo
from easyanimate_jax import Budget, LatentSet, SampleConfig, Stage

BUDGET = Budget(192, lengths=(96, 192), sizes=(96, 128), frames=9, min_fill=0.5)

config = replace(
    demo,
    source="runs/demo_films/table/clips.parquet",
    prepared="runs/demo_films/latents",
    vae="runs/demo_films/vae",
    text="runs/demo_films/text",
    run="runs/demo_films/train",
    sets=(LatentSet("films", BUDGET, kinds=("video",), condition_draws=2),),
    stages=(
        Stage("t2v", "films", batch_size=4, steps=20, learning_rate=1e-3, warmup=5),
        Stage("i2v", "films", batch_size=4, steps=10, learning_rate=1e-3, warmup=5, task="i2v"),
    ),
    samples=SampleConfig(),
    log_every=1,
)
