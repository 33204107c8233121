"""Records with the shapes of real ones, for benchmarks: no clip is decoded and no model runs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from easyanimate_jax.data.buckets import grid_of
from easyanimate_jax.data.index import INDEX_TYPES
from easyanimate_jax.data.records import LatentSet, write_set, write_texts
from easyanimate_jax.runs.config import TrainConfig

ROOT = Path(__file__).parent.parent
WIDTH = 64  # numbers of a token: 16 channels of 2 x 2 latent pixels
CAPTIONS = 2  # of a clip
CAPTION_TOKENS = 160  # that a masking encoder sees of a caption; its other states are equal
NUMBERS = 2**20  # different random numbers


def text_shapes(config: TrainConfig) -> list[tuple[int, int]]:
    """Return (rows, width) of each encoder's states: T5's and BERT's, or Qwen2's."""
    widths = config.model.text_widths
    return list(zip((77, 256) if len(widths) == 2 else (256,), widths, strict=True))


def masks(config: TrainConfig) -> bool:
    """Return True if the text encoder masks its padding, so that this is stored once."""
    return len(config.model.text_widths) == 1


def grid(latents: LatentSet, tokens: int) -> tuple[int, int, int]:
    """Return the grid of a clip of the set with so many tokens, of the budget's if there is one."""
    for shape, count, _ in latents.budget.describe():
        if count == tokens:
            return grid_of(*shape)
    rows = max(n for n in range(1, int(tokens**0.5) + 1) if not tokens % n)
    return 1, rows, tokens // rows


def record(config: TrainConfig, latents: LatentSet, tokens: int) -> dict[str, np.ndarray]:
    """Return the arrays of a clip of a set as `Records` returns them, of random numbers."""
    numbers = np.random.default_rng(tokens).standard_normal(NUMBERS, np.float32)
    numbers = numbers.astype(np.float16)

    def draw(*shape: int) -> np.ndarray:
        return np.resize(numbers, shape)

    def posterior(name: str, *shape: int) -> dict[str, np.ndarray]:
        return {f"{name}mean": draw(*shape, WIDTH), f"{name}logvar": draw(*shape, WIDTH) - 4}

    _, rows, columns = grid(latents, tokens)
    made = posterior("", tokens)
    if draws := latents.condition_draws:
        made |= posterior("condition_", draws, tokens)
        made |= {"condition_mask": draw(draws, tokens, 4), "condition_flag": np.ones(draws, "f2")}
    if count := len(latents.control):
        made |= posterior("control_", count, tokens) | posterior("reference_", rows * columns)
    for number, shape in enumerate(text_shapes(config)):
        states = draw(CAPTIONS, *shape)
        if masks(config):
            states[:, CAPTION_TOKENS:] = states[:, CAPTION_TOKENS : CAPTION_TOKENS + 1]
        made[f"text{number}"] = states
    return made


def row(latents: LatentSet, tokens: int) -> dict:
    """Return the row of such a record in the index."""
    names = ("clip", "kind", "T", "gh", "gw", "tokens", "num_captions", "source")
    values = ("clip.mp4", latents.kinds[-1], *grid(latents, tokens), tokens, CAPTIONS, "")
    return dict.fromkeys(INDEX_TYPES, 720) | dict(zip(names, values, strict=True))


def write(folder: Path, config: TrainConfig, latents: LatentSet, tokens: int, count: int) -> None:
    """Write a set of `count` equal records of so many tokens, and the states of no caption."""
    made, rows = [record(config, latents, tokens)] * count, [row(latents, tokens)] * count
    names = ("condition_draws", "control")
    header = {"set": {name: getattr(latents, name) for name in names}}
    write_set(folder / latents.name, header, made, rows)
    empty: Sequence[np.ndarray] = [np.zeros((1, *s), np.float16) for s in text_shapes(config)]
    write_texts(folder / "empty.safetensors", tuple(empty))
