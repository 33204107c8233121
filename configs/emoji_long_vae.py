"""The second training of the emoji model's video autoencoder: on long crops of its large films.

A clip of 17 frames is decoded in five groups, and each group starts from what the one before left.
Short crops have only two groups.
"""

from dataclasses import replace

from configs.emoji_vae import config as first
from easyanimate_jax import VAEStage

config = replace(
    first,
    init=first.output,
    data="runs/emoji/data/large",
    output="runs/emoji/vae",
    stages=(VAEStage(steps=1000, batch_size=4, frames=9, size=48),),
    learning_rate=1.5e-3,
    kl_weight=0.003,
)
