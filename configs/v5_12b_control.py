"""The control model of the report: 13312, then 53248 tokens, from 12B text-to-video weights.

The control video of a clip is the file `control_file_path`. V5 was trained without control dropout.
"""

from dataclasses import replace

from configs.v5_12b import TOKENS_13312, TOKENS_53248
from configs.v5_12b import config as v5_12b
from easyanimate_jax import LatentSet, Stage

config = replace(
    v5_12b,
    run="runs/v5_12b_control",
    sets=(
        LatentSet("13312", TOKENS_13312, control="file"),
        LatentSet("53248", TOKENS_53248, control="file"),
    ),
    stages=(
        Stage(
            "13312_control",
            "13312",
            task="control",
            batch_size=128,
            steps=5_000,
            control_drop=0.0,
        ),
        Stage(
            "53248_control",
            "53248",
            task="control",
            batch_size=96,
            microbatch=32,
            steps=2_000,
            control_drop=0.0,
        ),
    ),
    init="weights/transformer",
)
