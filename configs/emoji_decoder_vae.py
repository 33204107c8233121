"""The emoji model's video autoencoder with a decoder that was trained further.

The encoder keeps its bits, so the latents and the transformer trained on them stay valid.
"""

from dataclasses import replace

from configs.emoji_long_vae import config as long
from easyanimate_jax import VAEStage

config = replace(
    long,
    init=long.output,
    output="runs/emoji/decoder",
    decoder_only=True,
    stages=(VAEStage(steps=3000, batch_size=4, frames=9, size=48),),
)
