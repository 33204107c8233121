"""A LoRA of the released V5.1 12B control weights, for edges of your own clips (docs/finetune.md).

`python -m easyanimate_jax convert EasyAnimateV5.1-12b-zh-Control weights --to jax` writes
`weights`. The other settings are those of configs/lora_12b.py.
"""

from dataclasses import replace

from configs.lora_12b import config as lora_12b
from configs.v5_12b import TOKENS_3328
from easyanimate_jax import LatentSet, Stage

config = replace(
    lora_12b,
    run="runs/lora_control",
    prepared="data/control_latents",
    sets=(LatentSet("canny", TOKENS_3328, control="canny"),),
    stages=(
        Stage(
            "lora",
            "canny",
            task="control",
            batch_size=4,
            steps=2_000,
            learning_rate=1e-4,
        ),
    ),
)
