"""Weights from PyTorch and back, without torch: `python -m easyanimate_jax.convert --help`."""

from easyanimate_jax.convert.folder import load_mmdit, load_vae
from easyanimate_jax.convert.pipeline import Options, convert

__all__ = ["Options", "convert", "load_mmdit", "load_vae"]
