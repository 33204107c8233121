"""The video autoencoder of `demo_base_vae` with a decoder trained on.

Edges follow a control as well as it draws them. Latents stay as they were, and so does what was
trained on them.
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
