"""Train a video autoencoder: `python -m easyanimate_jax vae-train CONFIG [--field value ...]`."""

from easyanimate_jax.commands.train import main as main
