"""A small video autoencoder for the clips that curation cut, for `make demo-films`."""

from dataclasses import replace

from configs.demo_vae import config as demo_vae
from easyanimate_jax import VAEStage

config = replace(
    demo_vae,
    data="runs/demo_films/table/clips.parquet",
    output="runs/demo_films/vae",
    stages=(VAEStage(steps=40, batch_size=8, frames=5, size=32),),
)
