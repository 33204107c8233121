"""The transformer in the checkpoints of a training run, read slice by slice from orbax's files."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from easyanimate_jax.models.mmdit import MMDiTConfig
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

    Raises ValueError where there is no such checkpoint.
    """
    step, config, in_channels = _meta(folder, step)
    item, prefix = ("ema", "") if weights == "ema" else ("state", "model.")
    place = folder / "checkpoints" / str(step) / item
    if not (place / "_METADATA").is_file():
        raise ValueError(f"{place} is no item of an orbax checkpoint: _METADATA is missing")
    keys = json.loads((place / "_METADATA").read_text())["tree_metadata"].values()
    names = [".".join(part["key"] for part in key["key_metadata"]) for key in keys]
    tensors = {
        name.removeprefix(prefix).removesuffix(LEAF): _tensor(place, name)
        for name in names
        if name.startswith(prefix)
    }
    return dataclasses.replace(config.model, in_channels=in_channels), tensors


def _meta(folder: Path, step: int | None):
    """(step, TrainConfig, input channels at that step)."""
    # Imported here: they bring in data and training, which other conversions do not need.
    from easyanimate_jax.config import from_json
    from easyanimate_jax.training.checkpoint import read_meta

    step, meta = read_meta(folder, step)
    return step, from_json(json.dumps(meta["config"])), meta["in_channels"]


def _tensor(place: Path, name: str) -> Tensor:
    @cache
    def array():
        import tensorstore

        store = {"driver": "ocdbt", "base": f"file://{place.absolute()}/", "path": name}
        return tensorstore.open({"driver": "zarr", "kvstore": store}).result()

    shape, dtype = array().shape, array().dtype.numpy_dtype
    return Tensor(shape, dtype, lambda box: np.asarray(array()[box].read().result()))
