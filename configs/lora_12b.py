"""A LoRA of the released V5.1 12B text-to-video weights, on one GPU of 80 GB (docs/finetune.md).

`python -m easyanimate_jax convert EasyAnimateV5.1-12b-zh weights --to jax` writes `weights`. The
run uses the memory that the card has. On a smaller card: `--frozen int8`. On four v6e chips:
`--mesh.fsdp 4`.
"""

from dataclasses import replace

from configs.v5_12b import TOKENS_3328
from configs.v51_12b import config as v51_12b
from easyanimate_jax import LatentSet, LoRAConfig, MeshConfig, OptimizerConfig, Stage

config = replace(
    v51_12b,
    run="runs/lora_12b",
    init="weights/transformer",
    lora=LoRAConfig(rank=64, alpha=32.0, targets=("attention", "mlp")),
    model=replace(v51_12b.model, save="auto"),
    mesh=MeshConfig(fsdp=1),
    sets=(LatentSet("3328", TOKENS_3328),),
    # Rate, decay and clipping are those of the reference's LoRA script (spec 11.1).
    stages=(Stage("lora", "3328", batch_size=4, steps=2_000, learning_rate=1e-4),),
    optimizer=OptimizerConfig(),
    save_every=200,
)
