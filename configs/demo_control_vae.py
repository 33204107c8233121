"""The video autoencoder of `demo_base_vae` with a decoder that was trained further.

Generated edges are only as exact as the decoder draws them, so it is trained longer. The encoder
does not change, so existing latents and the models trained on them stay valid.
"""

from dataclasses import replace

from configs.demo_base_vae import config as demo_vae
from easyanimate_jax import VAEStage

config = replace(
    demo_vae,
    init=demo_vae.output,
    decoder_only=True,
    output="runs/demo_control/vae",
    stages=(
        VAEStage(steps=3000, batch_size=8, frames=5, size=32),
        VAEStage(steps=300, batch_size=2, frames=9, size=64),
    ),
    learning_rate=1e-3,
    controls=(),
    hidden_frames=False,
)
