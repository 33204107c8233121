"""The video autoencoder of `make demo-long`: the demo's, trained longer for sharp edges."""

from dataclasses import replace

from configs.demo_vae import config as demo_vae
from easyanimate_jax import VAEStage

config = replace(
    demo_vae,
    data="runs/demo_long/data",
    output="runs/demo_long/vae",
    stages=(
        VAEStage(steps=1600, batch_size=8, frames=5, size=32),
        VAEStage(steps=200, batch_size=2, frames=9, size=64),
    ),
)
