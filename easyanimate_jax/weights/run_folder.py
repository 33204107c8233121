"""A run folder on disk: its checkpoints, their metadata, and the transformer in them.

Metadata is JSON, and weights are read slice by slice from orbax's files. Nothing here starts a
device or depends on the training code.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from easyanimate_jax.storage.errors import is_of_the_system
from easyanimate_jax.storage.stores import Place, Remote, place
from easyanimate_jax.weights import orbax_item
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.module import WEIGHTS

logger = logging.getLogger(__name__)

Frozen = Literal["vae", "text", "init"]  # fields of a TrainConfig

VAE = "CausalVAE"  # "class" in the meta of VAE checkpoints; transformer checkpoints have none
LEAF = ".value"  # orbax's names end in the attribute of an nnx variable


def is_run(path: Place) -> bool:
    """Return True for a folder with checkpoints and no finished model.

    A finished VAE training has both; its folder counts as a model.
    """
    return (path / "checkpoints").is_dir() and not (path / WEIGHTS).is_file()


def read_meta(folder: str | Path, step: int | None = None) -> tuple[int, dict]:
    """Return (step, meta) of a transformer checkpoint, without starting a device.

    `step` names the checkpoint; None is the newest. Raises ValueError if there is none, if its meta
    is damaged, or if it belongs to a VAE.
    """
    root = Path(folder) / "checkpoints"
    check_format(Path(folder))
    steps = complete_steps(root)
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"checkpoint {step}"
        raise ValueError(f"{folder} holds no {wanted}; complete ones in {root}: {steps or 'none'}")
    step = steps[-1] if step is None else step
    meta = read_step_meta(root / str(step))
    if meta.get("class") == VAE and (Path(folder) / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds a VAE; give the run folder of a transformer")
    if meta.get("class") == VAE:
        raise ValueError(
            f"{folder} holds a VAE's training that has not ended: run the same command again to "
            f"resume it"
        )
    return step, meta


def check_format(folder: Path) -> None:
    """Raise ValueError if a folder holds VAE checkpoints of an earlier version."""
    if any((folder / "checkpoints").glob("*/default")):  # orbax's name for a single item
        raise ValueError(
            f"{folder} holds checkpoints of a VAE's training by an earlier version (their only "
            f"item is named 'default'), which cannot be resumed: train in a new folder, or remove "
            f"{folder / 'checkpoints'} to start again"
        )


def frozen_model(folder: str | Path, config: Mapping, name: Frozen) -> Place:
    """Return the path of a model that a run reads and does not train.

    It is the first of `frozen_places` that exists. If none exists, return the path that the config
    names.
    """
    places = frozen_places(folder, config, name)
    found = next((one for one in places if one.exists()), places[0])
    if found != places[0]:
        logger.info("%s: its %s is read from %s, not %s", folder, name, found, places[0])
    return found


def frozen_places(folder: str | Path, config: Mapping, name: Frozen) -> list[Place]:
    """Return the paths to search for a run's VAE, text encoders or first weights, in order.

    1. The path that `config` names (the JSON of the run's TrainConfig). 2. The same path relative
    to the run, for a run that was moved together with it. 3. The folder of that name beside the
    run. 4. The folder of that name in the run.
    """
    run, named = Path(folder), place(config[name])
    places = [named, run.parent / named.name, run / named.name]
    if not isinstance(named, Remote):
        moved = os.path.normpath(run / os.path.relpath(named, config["run"]))
        places.insert(1, Path(moved))
    return list(dict.fromkeys(places))


def complete_steps(folder: Path) -> list[int]:
    """Return the steps whose checkpoints are complete, in ascending order."""
    return sorted(int(p.name) for p in Path(folder).glob("*") if p.name.isdigit())


def read_step_meta(path: Path) -> dict:
    """Return the meta of a step folder. Raises ValueError if it is missing or damaged.

    Raises OSError if the system is the reason why it does not read.
    """
    file = path / "meta" / "metadata"
    try:
        meta = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if is_of_the_system(error):
            raise
        raise ValueError(
            f"{path} is no checkpoint of easyanimate_jax: {file} is missing or is not JSON"
        ) from error
    if not isinstance(meta, dict) or ("digest" not in meta and "arrays" in meta):
        raise ValueError(f"{file} is damaged: its digest is missing; use another checkpoint")
    if "digest" in meta and sealed(meta) != meta:
        raise ValueError(f"{file} is damaged: its digest does not match; use another checkpoint")
    return meta


def sealed(meta: dict) -> dict:
    """Return `meta` with the digest of its other fields."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True).encode()
    return rest | {"digest": hashlib.blake2b(text, digest_size=16).hexdigest()}


def is_verified(path: Path) -> bool:
    """Return True if all processes of some run have read a step's files and found them intact."""
    done: dict[str, int] = {}
    for mark in path.glob("verified-*-of-*"):
        count = mark.name.rsplit("-", 1)[1]
        done[count] = done.get(count, 0) + 1
    return any(number == int(count) for count, number in done.items())


def open_transformer(
    folder: Path, weights: Literal["ema", "raw"], step: int | None
) -> tuple[dict, dict[str, Tensor]]:
    """Return (metadata, weights by our names) of a checkpoint.

    `weights` selects the averaged ("ema") or the trained ("raw") weights, which are also those of a
    run without an average; `step` None is the newest checkpoint. Every file is read once, a chunk
    at a time, to compare its fingerprint with the saved one. Raises ValueError if there is no such
    checkpoint, or if its files are damaged.
    """
    step, meta = read_meta(folder, step)
    averaged = weights == "ema" and "ema" in meta.get("arrays", {"ema": {}})
    item, prefix = ("ema", "") if averaged else ("state", "model.")
    place = folder / "checkpoints" / str(step) / item
    names = [name for name in orbax_item.names(place) if name.startswith(prefix)]
    wrong = [
        name
        for name, (saved, _, _) in meta.get("arrays", {}).get(item, {}).items()
        if name in names and not _as_saved(place, name, saved)
    ]
    if wrong:
        raise ValueError(
            f"{place} is damaged: {', '.join(wrong)} differ from what was saved; choose another "
            f"checkpoint with --step"
        )
    tensors = {
        name.removeprefix(prefix).removesuffix(LEAF): orbax_item.tensor(place, name)
        for name in names
    }
    return meta, tensors


def _as_saved(place: Path, name: str, saved: str) -> bool:
    try:
        return f"{orbax_item.fingerprint_on_disk(place, name):08x}" == saved
    except ValueError:  # tensorstore raises it for bytes that do not decode
        return False
