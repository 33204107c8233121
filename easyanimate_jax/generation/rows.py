"""The request that every pipeline function takes: texts, size, seeds and sampling options."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from easyanimate_jax.data.buckets import check_size
from easyanimate_jax.facts import MAX_SEED
from easyanimate_jax.generation.denoising import Sampling, Texts
from easyanimate_jax.generation.request import check_tile
from easyanimate_jax.models.mmdit import MMDiTConfig


class Request(NamedTuple):
    """The arguments of every pipeline function, one video per row.

    `texts` are encoder states, one (B, L, width) float32 array for each text encoder of the model.
    `negative_texts` are states of the same L and width; a single row applies to all videos. `seeds`
    holds one whole number from 0 to 2^32 - 1 per row. `progress` is called with the number of each
    finished network evaluation; an exception that it raises ends the request there.
    """

    texts: Texts
    negative_texts: Texts
    size: tuple[int, int, int]  # frames, height, width in pixels; one frame is a picture
    seeds: Sequence[int]
    sampling: Sampling = Sampling()
    tile: int | None = None  # pixels of a side: decode tiles of this size, which needs less memory
    progress: Callable[[int], None] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return (B, F, H, W) of the videos."""
        return len(self.seeds), *self.size

    def check(self, config: MMDiTConfig) -> None:
        """Raise ValueError if a model of `config` cannot serve this request."""
        check_size(*self.size)
        check_tile(self.tile)
        rows = len(self.seeds)
        wrong = [seed for seed in self.seeds if not 0 <= seed <= MAX_SEED or seed != int(seed)]
        if not rows or wrong:
            raise ValueError(
                f"seeds {list(self.seeds)}: give a whole number from 0 to {MAX_SEED} for each video"
            )
        for name in ("texts", "negative_texts"):
            shapes = [np.shape(text) for text in getattr(self, name)]
            widths = tuple(shape[-1] for shape in shapes if len(shape) == 3)
            if widths != config.text_widths:
                raise ValueError(
                    f"{name} of shapes {shapes}: the model reads one array (rows, length, width) "
                    f"for each of its text encoders, of widths {config.text_widths}; encode the "
                    f"prompts with the model's own text encoders"
                )
            allowed = {rows} if name == "texts" else {rows, 1}
            if not {shape[0] for shape in shapes} <= allowed:
                raise ValueError(
                    f"{name} of shapes {shapes} and {rows} seeds: give a seed each, and "
                    f"one row of text for each seed"
                )
        lengths = [[np.shape(text)[1] for text in t] for t in (self.texts, self.negative_texts)]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"texts of {lengths[0]} tokens and negative_texts of {lengths[1]}: encode both "
                f"with the same text encoders"
            )
