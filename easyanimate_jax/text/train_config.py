"""Sizes of the two small text encoders, and how they are trained; without JAX."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextTrainConfig:
    """Sizes of both encoders and their training."""

    width: int = 128
    """Width of both encoders."""
    layers: int = 2
    """Transformer layers of each encoder."""
    heads: int = 4
    """Attention heads of each layer."""
    steps: int = 400
    """Training steps of each encoder."""
    batch: int = 64
    """Pairs of captions in a step."""
    learning_rate: float = 2e-3
    """Learning rate at its peak."""
    temperature: float = 0.1
    """Temperature of the contrastive loss between captions."""
    seed: int = 0
    """Seed of weights and batches."""
