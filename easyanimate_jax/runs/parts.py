"""Find the parts of a model on disk, and check that they belong together, before any is read.

A path is a run folder, or a folder with one subfolder for each part of the model. `convert` writes
such folders. Released folders of V5 and V5.1 have one too, in the original layout or diffusers'.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.facts import FPS
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.runs.calibration import CalibrationFile
from easyanimate_jax.runs.config import SampleConfig, TrainConfig, from_json
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.text.encode import state_widths
from easyanimate_jax.weights import files, run_folder
from easyanimate_jax.weights.adapters import Weighted
from easyanimate_jax.weights.at_hand import at_hand
from easyanimate_jax.weights.defaults import (
    Defaults,
    of_metadata,
    of_run,
    of_source,
    size_of_folder,
)
from easyanimate_jax.weights.folder import Weights, open_model, read_json
from easyanimate_jax.weights.identity import fingerprint
from easyanimate_jax.weights.module import CONFIG
from easyanimate_jax.weights.schedulers import (
    SCHEDULER,
    process_of,
    released_process,
    strange_parts,
)


class Parts(NamedTuple):
    """Paths of single parts that replace those of a model; None keeps the model's own."""

    transformer: str | Place | None = None  # a file, a folder of any layout, or a run
    vae: str | Place | None = None  # likewise
    text: str | Place | None = None  # a folder with the text encoders and their tokenizers


OWN = Parts()


class Opened(NamedTuple):
    """The paths and configs of a model, as its folder gives them before any weight is read."""

    path: Place  # of the whole model
    model: Place
    vae: Place
    text: Place
    config: MMDiTConfig
    process: DDPM | Flow
    samples: SampleConfig = SampleConfig()  # default: the released models'
    step: int | None = None
    weights: Weights = "ema"
    meta: Mapping | None = None  # a run's record of its training
    defaults: Defaults = Defaults()  # how it is sampled

    @property
    def training(self) -> TrainConfig | None:
        """Return the config of a run's training; None for a folder."""
        return None if self.meta is None else from_json(json.dumps(self.meta["config"]))

    @property
    def calibration(self) -> CalibrationFile:
        """Return the file of the transformer's calibration, which may not exist."""
        return CalibrationFile(self.model, self.step, self.weights, self.process)

    @property
    def fps(self) -> int:
        """Return the frames per second of the clips that the model was trained on last."""
        training = self.training
        stages = {} if training is None else {stage.name: stage for stage in training.stages}
        stage = stages.get(self.meta.get("stage")) if stages else None
        return FPS if stage is None else training.set(stage.data).fps


def open_parts(
    path: str | Place,
    parts: Parts = OWN,
    *,
    step: int | None = None,
    weights: Weights = "ema",
    process: DDPM | Flow | None = None,
) -> Opened:
    """Return the paths and configs of a model; no weight is read and no device is used.

    The arguments and errors are those of `load_pipeline`.
    """
    path = at_hand(path)
    parts = Parts(*(part and at_hand(part) for part in parts))
    for name, part in parts._asdict().items():
        if part and not part.exists():
            raise ValueError(f"{name}: there is no {part}; give a file or a folder")
    source = parts.transformer or path
    if not run_folder.is_run(source) and (step is not None or weights != "ema"):
        raise ValueError(f"{source} is no run: step and weights choose from a run's checkpoints")
    if not run_folder.is_run(path):
        opened = _open_folder(path, parts, process, step)
    elif process is not None:
        raise ValueError(f"{path} is a run and has its own noise process: leave out process")
    elif parts.transformer:
        opened = _open_run(path, parts, None)
        opened = opened._replace(
            model=source,
            step=step,
            config=_config_of(source, step),
            defaults=defaults_of(path, parts, step),
        )
    else:
        opened = _open_run(path, parts, step)
    widths = state_widths(opened.text)
    if widths != opened.config.text_widths:
        raise ValueError(
            f"the text encoders of {opened.text} give states of widths {widths}, and the "
            f"transformer reads {opened.config.text_widths}: put its own text encoders there"
        )
    return opened._replace(weights=weights)


def defaults_of(folder: Place, parts: Parts, step: int | None) -> Defaults:
    """Return how a model is sampled: as its transformer's run or folder says."""
    return of_source(parts.transformer or folder, step)


def with_loras(opened: Opened, loras: Sequence[Weighted]) -> Opened:
    """Return a model with the defaults of the first LoRA that has its own, such as a few steps."""
    own = (of_metadata(one.lora.metadata) for one in loras if one.weight)
    return opened._replace(defaults=next(filter(None, own), opened.defaults))


def _config_of(path: Place, step: int | None) -> MMDiTConfig:
    """Return the config of a transformer. Raises ValueError, listing all faults of its files."""
    problems: list[str] = []
    model = open_model(path, "transformer", problems, step=step)
    files.raise_all(path, problems)
    return model.config


def _open_run(folder: Place, parts: Parts, step: int | None) -> Opened:
    """Return the model of a run's checkpoint.

    Raises ValueError if the run has no such checkpoint, or if its VAE or text encoders are missing
    or are not those that it was trained with. A part in `parts` takes the place of the run's.
    """
    step, meta = run_folder.read_meta(folder, step)
    training = from_json(json.dumps(meta["config"]))
    places = {}
    for name, what in (("vae", "VAE"), ("text", "text encoders")):
        places[name] = getattr(parts, name)
        if places[name]:
            continue
        found = places[name] = run_folder.frozen_model(folder, meta["config"], name)
        if not found.exists():
            tried = ", ".join(map(str, run_folder.frozen_places(folder, meta["config"], name)))
            raise ValueError(f"the {what} of {folder} are in none of {tried}: copy them there")
        recorded = meta.get("weights", {}).get(name)
        if recorded and fingerprint(found) != recorded:
            raise ValueError(
                f"{found} holds other {what} than {folder} was trained with: their fingerprint is "
                f"not {recorded}; put the right ones there"
            )
    config = dataclasses.replace(training.model, in_channels=meta["in_channels"])
    return Opened(
        folder,
        folder,
        places["vae"],
        places["text"],
        config,
        training.process,
        training.samples,
        step,
        meta=meta,
        defaults=of_run(meta),
    )


def _open_folder(
    folder: Path, parts: Parts, process: DDPM | Flow | None, step: int | None
) -> Opened:
    """Return the model of a folder with one subfolder for each part that is not in `parts`.

    `step` is a checkpoint of `parts.transformer` if that is a run. Raises ValueError if a part is
    missing or does not belong to the others.
    """
    wanted = ["transformer"] * (not parts.transformer) + ["vae"] * (not parts.vae)
    wanted += ["text_encoder", "tokenizer"] * (not parts.text)
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if process is None and not (folder / "scheduler" / SCHEDULER).is_file():
        missing.append(f"scheduler/{SCHEDULER}")
    if missing:
        raise ValueError(
            f"{folder} is no run, and no whole pipeline: it has no {', '.join(missing)}; give a "
            f"run folder, or one with {', '.join([*wanted, 'scheduler'])}"
        )
    problems: list[str] = []
    source = parts.transformer or folder
    model = open_model(source, "transformer", problems, step=step)
    vae = open_model(parts.vae or folder, "vae", problems)
    files.raise_all(folder, problems)
    for line in strange_parts(len(model.config.text_widths), vae=vae.config):
        warnings.warn(f"{folder}: {line}", stacklevel=4)
    if process is None:
        process = _process_of(folder, model.config, problems)
    files.raise_all(folder, problems)
    return Opened(
        folder,
        source,
        parts.vae or folder,
        parts.text or folder,
        model.config,
        process,
        _samples_of(folder),
        step,
        defaults=defaults_of(folder, parts, step),
    )


def _samples_of(folder: Path) -> SampleConfig:
    """Return the size of a folder's samples: its own, or the released models'."""
    size = size_of_folder(folder)
    return SampleConfig(**dict(zip(("frames", "height", "width"), size or (), strict=False)))


def _process_of(folder: Path, config: MMDiTConfig, problems: list[str]) -> DDPM | Flow | None:
    """Return the noise process of a folder's scheduler, or None after adding to `problems`.

    In PyTorch's layouts it must be the process of the released model with these text encoders. In
    our layout `convert` wrote the process of the run, which may be another.
    """
    file = folder / "scheduler" / SCHEDULER
    fields = read_json(file, problems)
    own = "class" in read_json(folder / "transformer" / CONFIG, [])
    if problems:
        return None
    try:
        process = process_of(fields)
    except ValueError as error:
        problems.append(f"{file}: {error}")
        return None
    released = released_process(len(config.text_widths))
    if not own and type(process).__name__ != released:
        version = {"DDPM": "V5, two text encoders", "Flow": "V5.1, one text encoder"}[released]
        problems.append(
            f"{file} is a {fields['_class_name']}, and the transformer is of {version}, which was "
            f"released with the process {released}: put its own scheduler there, or give process= "
            f"if the weights were trained otherwise"
        )
    return process
