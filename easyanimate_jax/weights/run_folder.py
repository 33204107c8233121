"""A run folder, on a disk or in a store: its checkpoints, and the transformer in them.

Metadata is JSON, and weights are read slice by slice from the files of a checkpoint. Nothing here
starts a device or depends on the training code.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal

from easyanimate_jax.storage.errors import is_of_the_system
from easyanimate_jax.storage.stores import Place, Remote, place
from easyanimate_jax.weights import array_item, orbax_item
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.module import WEIGHTS
from easyanimate_jax.weights.pretrained import model_place
from easyanimate_jax.weights.steps import steps_in

logger = logging.getLogger(__name__)

Frozen = Literal["vae", "text", "init"]  # fields of a TrainConfig

VAE = "CausalVAE"  # "class" in the meta of VAE checkpoints; transformer checkpoints have none
LEAF = ".value"  # orbax's names end in the attribute of an nnx variable


def is_run(path: Place) -> bool:
    """Return True for a folder with checkpoints and no finished model.

    A finished VAE training has both; its folder counts as a model.
    """
    return (path / "checkpoints").is_dir() and not (path / WEIGHTS).is_file()


def read_meta(folder: str | Place, step: int | None = None) -> tuple[int, dict]:
    """Return (step, meta) of a transformer checkpoint, without starting a device.

    `step` names the checkpoint; None is the newest. Raises ValueError if there is none, if its meta
    is damaged, or if it belongs to a VAE.
    """
    folder = place(folder)
    root = folder / "checkpoints"
    check_format(folder)
    steps = complete_steps(root)
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"checkpoint {step}"
        raise ValueError(f"{folder} holds no {wanted}; complete ones in {root}: {steps or 'none'}")
    step = steps[-1] if step is None else step
    meta = read_step_meta(root / str(step))
    if meta.get("class") == VAE and (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds a VAE; give the run folder of a transformer")
    if meta.get("class") == VAE:
        raise ValueError(
            f"{folder} holds a VAE's training that has not ended: run the same command again to "
            f"resume it"
        )
    return step, meta


def check_format(folder: Place) -> None:
    """Raise ValueError if a folder holds VAE checkpoints of an earlier version."""
    if isinstance(folder, Remote):  # to which earlier versions did not write
        return
    if any((folder / "checkpoints").glob("*/default")):  # orbax's name for a single item
        raise ValueError(
            f"{folder} holds checkpoints of a VAE's training by an earlier version (their only "
            f"item is named 'default'), which cannot be resumed: train in a new folder, or remove "
            f"{folder / 'checkpoints'} to start again"
        )


def frozen_model(folder: str | Place, config: Mapping, name: Frozen) -> Place:
    """Return the path of a model that a run reads and does not train.

    It is the first of `frozen_places` that exists. If none exists, return the path that the config
    names.
    """
    places = frozen_places(folder, config, name)
    found = next((one for one in places if one.exists()), places[0])
    if found != places[0]:
        logger.info("%s: its %s is read from %s, not %s", folder, name, found, places[0])
    return found


def frozen_places(folder: str | Place, config: Mapping, name: Frozen) -> list[Place]:
    """Return the paths to search for a run's VAE, text encoders or first weights, in order.

    1. The path that `config` names (the JSON of the run's TrainConfig), or the model of the package
    that has this name (`weights.pretrained`). 2. The same path relative to the run, for a run that
    was moved together with it. 3. The folder of that name beside the run. 4. The folder of that
    name in the run. The second is one of local runs.
    """
    run, named = place(folder), model_place(config[name])
    places = [named, run.parent / named.name, run / named.name]
    if isinstance(run, Path) and isinstance(named, Path):
        moved = os.path.normpath(run / os.path.relpath(named, config["run"]))
        places.insert(1, Path(moved))
    return list(dict.fromkeys(places))


def complete_steps(folder: str | Place) -> list[int]:
    """Return the steps whose checkpoints are complete, in ascending order."""
    return steps_in(folder).complete()


def read_step_meta(path: Place) -> dict:
    """Return the meta of the step FOLDER/STEP. Raises ValueError if it is missing or damaged.

    Raises OSError if the system is the reason why it does not read.
    """
    return steps_in(path.parent).meta(int(path.name))


def is_verified(path: Place) -> bool:
    """Return True if all processes of some run have read the step FOLDER/STEP as it was saved."""
    return steps_in(path.parent).is_verified(int(path.name))


def reader(meta: Mapping) -> ModuleType:
    """Return the module that reads the items of a checkpoint with this meta.

    Raises ValueError for a format of a later version.
    """
    readers = {"orbax": orbax_item, "arrays": array_item}
    name = meta.get("format", "orbax")
    if name not in readers:
        raise ValueError(
            f"checkpoint {meta.get('step')} has the format {name!r}, which this "
            f"version does not read: install a later one"
        )
    return readers[name]


def open_transformer(
    folder: Place, weights: Literal["ema", "raw"], step: int | None
) -> tuple[dict, dict[str, Tensor]]:
    """Return (metadata, weights by our names) of a checkpoint.

    `weights` selects the averaged ("ema") or the trained ("raw") weights, which are also those of a
    run without an average; `step` None is the newest checkpoint. Every file is read once, a chunk
    at a time, to compare its fingerprint with the saved one. Raises ValueError if there is no such
    checkpoint, if its files are damaged, or if it is deleted while it is read.
    """
    step, meta = read_meta(folder, step)
    averaged = weights == "ema" and "ema" in meta.get("arrays", {"ema": {}})
    item, prefix = ("ema", "") if averaged else ("state", "model.")
    steps, items = steps_in(folder / "checkpoints"), reader(meta)
    where = steps.data(step, meta) / item
    names = [name for name in items.names(where) if name.startswith(prefix)]
    wrong = [
        name
        for name, (saved, _, _) in meta.get("arrays", {}).get(item, {}).items()
        if name in names and not _as_saved(items, where, name, saved)
    ]
    if wrong and step not in steps.complete():
        raise ValueError(f"checkpoint {step} of {folder} was deleted meanwhile; choose a later one")
    if wrong:
        raise ValueError(
            f"{where} is damaged: {', '.join(wrong)} differ from what was saved; choose another "
            f"checkpoint with --step"
        )
    tensors = {
        name.removeprefix(prefix).removesuffix(LEAF): items.tensor(where, name) for name in names
    }
    return meta, tensors


def _as_saved(items: ModuleType, where: Place, name: str, saved: str) -> bool:
    try:
        return f"{items.fingerprint_on_disk(where, name):08x}" == saved
    except ValueError as error:  # tensorstore raises it for bytes that do not decode
        if is_of_the_system(error):
            raise
        return False
