"""The video autoencoder of `make demo-real`: the demo's, wider, on real footage."""

from dataclasses import replace

from configs.demo_vae import config as demo_vae
from easyanimate_jax.training.vae import VAEStage

config = replace(
    demo_vae,
    vae=replace(demo_vae.vae, channels=(64, 96, 96)),
    data="runs/demo_real/data",
    output="runs/demo_real/vae",
    stages=(
        VAEStage(steps=1500, batch_size=8, frames=5, size=32),
        VAEStage(steps=200, batch_size=2, frames=9, size=64),
    ),
)
