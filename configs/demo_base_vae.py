"""The base video autoencoder of `make demo-control`: the demo's, trained on model inputs too.

A quarter of its crops are Canny edges, which the control model reads. Another quarter are clips
with hidden frames, which the inpaint model reads.
"""

from dataclasses import replace

from configs.demo_vae import config as demo_vae
from easyanimate_jax import VAEStage

config = replace(
    demo_vae,
    data="runs/demo_base/data",
    output="runs/demo_base/vae",
    stages=(
        VAEStage(steps=2700, batch_size=8, frames=5, size=32),
        VAEStage(steps=300, batch_size=2, frames=9, size=64),
    ),
    controls=("canny",),
    hidden_frames=True,
)
