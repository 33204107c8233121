"""Better shapes and speeds from pairs of videos of one prompt (`make demo-preference`).

The same start as `demo_reward`. The verb `pairs` makes eight videos of each prompt, and the exact
verifier of the world, `demos/verifier.py`, chooses the best and the worst of them.
"""

from dataclasses import replace

from configs.demo import MEDIUM
from configs.demo_distill import config as distill
from configs.demo_reward import TIMES
from easyanimate_jax import DirectPreference, LatentSet, Stage

config = replace(
    distill,
    source="runs/demo_preference/pairs",
    prepared="runs/demo_preference/latents",
    run="runs/demo_preference/train",
    init="runs/demo_distill/merged",
    sets=(LatentSet("pairs", MEDIUM, kinds=("video",), condition_draws=1, pairs=True),),
    stages=(
        Stage(
            "preference",
            "pairs",
            task="i2v",
            batch_size=8,
            steps=300,
            learning_rate=5e-4,
            end_learning_rate=5e-5,
            warmup=20,
            picture_drop=1.0,
            objective=DirectPreference(times=TIMES),
        ),
    ),
    text_drop=0.0,
)
