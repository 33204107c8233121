"""The video autoencoder of `make demo-real`: the demo's, wider and trained longer."""

from dataclasses import replace

from configs.demo_vae import config as demo_vae
from easyanimate_jax import VAEStage

config = replace(
    demo_vae,
    vae=replace(demo_vae.vae, channels=(40, 80, 80)),
    data="runs/demo_real/data",
    output="runs/demo_real/vae",
    stages=(
        VAEStage(steps=1000, batch_size=8, frames=5, size=32),
        VAEStage(steps=150, batch_size=2, frames=9, size=64),
    ),
)
