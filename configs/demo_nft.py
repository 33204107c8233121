"""Better shapes and speeds by ratings without a gradient (`make demo-nft`).

The same start as `demo_reward`. The exact verifier of the world, `demos/verifier.py`, is a server
that rates the run's own videos.
"""

from dataclasses import replace

from configs.demo_reward import config as reward
from easyanimate_jax import NegativeAwareFinetuning

OBJECTIVE = NegativeAwareFinetuning(
    "http://127.0.0.1:8765/",
    frames=9,
    height=128,
    width=128,
    count=8,
    steps=4,
    times=4,
    beta=0.3,
    format="npz",
    request=32,
)

config = replace(
    reward,
    run="runs/demo_nft/train",
    stages=(
        replace(
            reward.stages[0],
            name="nft",
            batch_size=4,
            steps=80,
            learning_rate=3e-3,
            end_learning_rate=5e-4,
            warmup=5,
            objective=OBJECTIVE,
        ),
    ),
    ema_decay=0.8,
)
