"""Fine-tuning the released V5.1 12B text-to-video weights on your own clips (docs/weights.md).

`python -m easyanimate_jax convert EasyAnimateV5.1-12b-zh weights --to jax` writes `weights`.
"""

from dataclasses import replace

from configs.v5_12b import TOKENS_13312
from configs.v51_12b import config as v51_12b
from easyanimate_jax import LatentSet, Stage

config = replace(
    v51_12b,
    run="runs/v51_12b_finetune",
    init="weights/transformer",
    model=replace(v51_12b.model, save="auto"),
    sets=(LatentSet("13312", TOKENS_13312),),
    stages=(Stage("13312_t2v", "13312", batch_size=32, steps=2_000),),
    save_every=200,
)
