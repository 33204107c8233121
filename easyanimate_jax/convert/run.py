"""The transformer in the checkpoints of a training run, read slice by slice from orbax's files."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.tensors import orbax_item
from easyanimate_jax.tensors.lazy import Tensor
from easyanimate_jax.tensors.module import WEIGHTS

LEAF = ".value"  # orbax's names end in the variable's own


def is_run(path: Path) -> bool:
    """Checkpoints and no finished model: the VAE's own training leaves both in its folder."""
    return (path / "checkpoints").is_dir() and not (path / WEIGHTS).is_file()


def config_of(folder: Path, step: int | None = None):
    """The TrainConfig of a run's newest or named checkpoint."""
    return _meta(folder, step)[1]


def open_transformer(
    folder: Path, weights: Literal["ema", "raw"], step: int | None
) -> tuple[MMDiTConfig, dict[str, Tensor]]:
    """The averaged or the raw weights of a checkpoint, the newest if no step is named.

    Raises ValueError where there is no such checkpoint, or its files have other bits than were
    saved: they are read once for this, a chunk at a time.
    """
    step, config, in_channels, arrays = _meta(folder, step)
    item, prefix = ("ema", "") if weights == "ema" else ("state", "model.")
    place = folder / "checkpoints" / str(step) / item
    names = [name for name in orbax_item.names(place) if name.startswith(prefix)]
    wrong = [
        name
        for name, (saved, _, _) in arrays.get(item, {}).items()
        if name in names and not _as_saved(place, name, saved)
    ]
    if wrong:
        raise ValueError(f"{place} is damaged: {', '.join(wrong)} are other than saved; use --step")
    tensors = {
        name.removeprefix(prefix).removesuffix(LEAF): orbax_item.tensor(place, name)
        for name in names
    }
    return dataclasses.replace(config.model, in_channels=in_channels), tensors


def _as_saved(place: Path, name: str, saved: str) -> bool:
    try:
        return f"{orbax_item.fingerprint_on_disk(place, name):08x}" == saved
    except ValueError:  # of tensorstore, for bytes that do not decode
        return False


def _meta(folder: Path, step: int | None):
    """(step, TrainConfig, input channels at that step, its arrays' fingerprints)."""
    # Imported here: they bring in data and training, which other conversions do not need.
    from easyanimate_jax.config import from_json
    from easyanimate_jax.training.checkpoint import read_meta

    if any((folder / "checkpoints").glob("*/default")):  # orbax's name where there is one item
        raise ValueError(
            f"{folder} holds a VAE's training that has not ended: run its command again, which "
            "goes on from there"
        )
    step, meta = read_meta(folder, step)
    config = from_json(json.dumps(meta["config"]))
    return step, config, meta["in_channels"], meta.get("arrays", {})
