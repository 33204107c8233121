"""Sizes of the small text encoders, and how they are trained; without JAX."""

from dataclasses import dataclass

from easyanimate_jax.facts import MAX_STEPS, SEEDS, check_fields


@dataclass(frozen=True)
class TextTrainConfig:
    """Sizes and training of the encoders."""

    second: bool = True
    """Train T5's encoder beside BERT's, as V5 has it. With one encoder, as in V5.1, a transformer
    reads half as many text tokens."""

    width: int = 128
    """Width of an encoder's states, a multiple of `heads`."""

    layers: int = 2
    """Number of blocks in an encoder."""

    heads: int = 4
    """Number of attention heads in a block."""

    steps: int = 400
    """Training steps of each encoder."""

    batch: int = 64
    """Caption pairs in a training step."""

    learning_rate: float = 2e-3
    """Highest learning rate; it rises for a tenth of the steps and falls along a cosine to 0."""

    places: int | None = None
    """States of a caption that predict its words, drawn anew in each step; None is all. With
    thousands of words, few places make a step several times faster."""

    telling: float = 1.0
    """Weight of the prediction of words beside the contrastive loss."""

    temperature: float = 0.1
    """Divisor of the similarities in the contrastive loss."""

    seed: int = 0
    """Seed of the initial weights and of the random pairs."""

    def __post_init__(self):
        check_fields(
            self,
            width="[1, inf)",
            layers="[1, inf)",
            heads="[1, inf)",
            steps=f"[1, {MAX_STEPS}]",
            batch="[1, inf)",
            learning_rate="[0, inf)",
            places="[1, inf)",
            telling="[0, inf)",
            temperature="(0, inf)",
            seed=SEEDS,
        )
        if self.width % self.heads:
            raise ValueError(
                f"TextTrainConfig.width is {self.width}; use a multiple of heads, {self.heads}"
            )
