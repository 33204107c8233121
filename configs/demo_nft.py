"""Better shapes and speeds by ratings without a gradient (`make demo-nft`).

The same start as `demo_reward`. The exact verifier of the world, `demos/verifier.py`, is a server
that rates the run's own videos.
"""

from dataclasses import replace

from configs.demo_reward import config as reward

OBJECTIVE = (
    None  # to be filled in: samples of 9x128x128 at `TIMES`, reward="http://127.0.0.1:8765/"
)

config = replace(
    reward,
    run="runs/demo_nft/train",
    stages=(replace(reward.stages[0], name="nft", objective=OBJECTIVE),),
)
