"""A run folder as files: its checkpoints, what they say of themselves, the transformer in them.

Metadata is JSON and weights are read slice by slice from orbax's files, so nothing here starts a
device or knows how a run is trained.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from easyanimate_jax.weights import orbax_item
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.module import WEIGHTS

logger = logging.getLogger(__name__)

VAE = "CausalVAE"  # "class" in the meta of a VAE's checkpoints; a transformer's have none
LEAF = ".value"  # orbax's names end in the variable's own


def is_run(path: Path) -> bool:
    """Return True for checkpoints without a finished model: a VAE's training ends with one."""
    return (path / "checkpoints").is_dir() and not (path / WEIGHTS).is_file()


def read_meta(folder: str | Path, step: int | None = None) -> tuple[int, dict]:
    """Return (step, meta) of a transformer run's newest or named checkpoint; no device is touched.

    Raises ValueError if there is none, if its meta is damaged, or if it is a VAE's.
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
            f"{folder} holds a VAE's training that has not ended: run its command again, which "
            f"goes on from there"
        )
    return step, meta


def check_format(folder: Path) -> None:
    """Raise ValueError where a folder holds a VAE's checkpoints of an earlier version."""
    if any((folder / "checkpoints").glob("*/default")):  # orbax's name where there is one item
        raise ValueError(
            f"{folder} holds checkpoints of a VAE's training by an earlier version, which has one "
            f"item named 'default' in them and cannot be resumed: train in a new folder, or remove "
            f"{folder / 'checkpoints'} to begin anew"
        )


def frozen_model(folder: str | Path, config: Mapping, name: Literal["vae", "text"]) -> Path:
    """Return where the VAE or the text encoders of a run lie: the first of `frozen_places`.

    Where there is none it is the place that the config names.
    """
    places = frozen_places(folder, config, name)
    found = next((place for place in places if place.exists()), places[0])
    if found != places[0]:
        logger.info("%s: its %s is read from %s, not %s", folder, name, found, places[0])
    return found


def frozen_places(folder: str | Path, config: Mapping, name: Literal["vae", "text"]) -> list[Path]:
    """Return where to look for the VAE or the text encoders of a run, in this order.

    The place that `config`, the JSON of its TrainConfig, names; that place relative to the run, for
    a run that was moved together with them; the folder of that name beside the run, and in it.
    """
    run, named = Path(folder), Path(config[name])
    moved = os.path.normpath(run / os.path.relpath(named, config["run"]))
    return list(dict.fromkeys([named, Path(moved), run.parent / named.name, run / named.name]))


def complete_steps(folder: Path) -> list[int]:
    """The steps that were written whole, in order."""
    return sorted(int(p.name) for p in Path(folder).glob("*") if p.name.isdigit())


def read_step_meta(path: Path) -> dict:
    """The meta of a step folder. Raises ValueError if it is missing or not what was written."""
    file = path / "meta" / "metadata"
    try:
        meta = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no checkpoint of ours: {file} is missing or no JSON"
        ) from error
    if not isinstance(meta, dict) or ("digest" not in meta and "arrays" in meta):
        raise ValueError(f"{file} is damaged: it has lost its digest")
    if "digest" in meta and sealed(meta) != meta:
        raise ValueError(f"{file} is damaged: its digest is another")
    return meta


def sealed(meta: dict) -> dict:
    """`meta` with the digest of everything else in it."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True).encode()
    return rest | {"digest": hashlib.blake2b(text, digest_size=16).hexdigest()}


def is_verified(path: Path) -> bool:
    """Whether the files of a step were read and found right, by all processes of some run."""
    done: dict[str, int] = {}
    for mark in path.glob("verified-*-of-*"):
        count = mark.name.rsplit("-", 1)[1]
        done[count] = done.get(count, 0) + 1
    return any(number == int(count) for count, number in done.items())


def open_transformer(
    folder: Path, weights: Literal["ema", "raw"], step: int | None
) -> tuple[dict, dict[str, Tensor]]:
    """(metadata, averaged or raw weights) of a checkpoint, the newest if no step is named.

    Raises ValueError where there is no such checkpoint, or its files have other bits than were
    saved: they are read once for this, a chunk at a time.
    """
    step, meta = read_meta(folder, step)
    item, prefix = ("ema", "") if weights == "ema" else ("state", "model.")
    place = folder / "checkpoints" / str(step) / item
    names = [name for name in orbax_item.names(place) if name.startswith(prefix)]
    wrong = [
        name
        for name, (saved, _, _) in meta.get("arrays", {}).get(item, {}).items()
        if name in names and not _as_saved(place, name, saved)
    ]
    if wrong:
        raise ValueError(f"{place} is damaged: {', '.join(wrong)} are other than saved; use --step")
    tensors = {
        name.removeprefix(prefix).removesuffix(LEAF): orbax_item.tensor(place, name)
        for name in names
    }
    return meta, tensors


def _as_saved(place: Path, name: str, saved: str) -> bool:
    try:
        return f"{orbax_item.fingerprint_on_disk(place, name):08x}" == saved
    except ValueError:  # of tensorstore, for bytes that do not decode
        return False
