"""The calibration of a model: measure it, and keep it in a file beside the weights."""

import dataclasses
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.generation import calibration
from easyanimate_jax.generation.caches import magnitude_ratios
from easyanimate_jax.generation.calibration import CALIBRATE, Calibration
from easyanimate_jax.generation.denoising import make_plan, states
from easyanimate_jax.generation.pipelines import given_of
from easyanimate_jax.generation.protocols import Diffusion
from easyanimate_jax.generation.rows import Request
from easyanimate_jax.runs.config import to_json
from easyanimate_jax.storage.stores import Place, replace_text
from easyanimate_jax.weights.folder import Weights
from easyanimate_jax.weights.identity import weights_print
from easyanimate_jax.weights.run_folder import is_run

FILE = "calibration.json"
REPAIR = f"{CALIBRATE} with the same --step, --weights-of and --transformer"


class CalibrationFile(NamedTuple):
    """The file with the calibration of a transformer; it may not exist."""

    model: Place  # a run, a folder or a file of weights
    step: int | None  # checkpoint of a run
    weights: Weights
    process: DDPM | Flow

    @property
    def path(self) -> Place:
        """Return the place of the file: in the folder of the model, or beside its file."""
        if self.model.is_dir():
            return self.model / FILE
        return self.model.with_name(f"{self.model.name}.{FILE}")

    def read(self) -> Calibration:
        """Return the calibration. Raises ValueError if there is none of these weights."""
        path = self.path
        if not path.is_file():
            raise ValueError(f"magcache needs a calibration, and there is no {path}: {REPAIR}")
        try:
            found, fields = calibration.read(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {REPAIR}") from error
        for name, own in self._identity().items():
            if fields.get(name) != own:
                raise ValueError(
                    f"{path} is not the calibration of {self.model} as it is sampled: its {name} "
                    f"is {fields.get(name)}, and the model's is {own}; {REPAIR}"
                )
        return found

    def write(self, found: Calibration, measured: dict) -> None:
        """Write a calibration; `measured` says by which request it was measured."""
        fields = self._identity() | {"measured": measured}
        replace_text(self.path, calibration.written(found, fields))

    def _identity(self) -> dict:
        """Return what must be equal for a calibration to belong to these weights."""
        return {
            "weights": _print(self.model, self.step),
            "weights_of": self.weights,
            "process": json.loads(to_json(self.process)),
        }


def measure(diffusion: Diffusion, requests: Sequence[Request]) -> Calibration:
    """Return the calibration that requests of the same sampling give.

    The network runs at every step. A ratio is the mean over real tokens and rows of all requests.
    """
    found, plan = [], None
    for request in requests:
        # The network keeps two residuals and skips nothing.
        sampling = dataclasses.replace(request.sampling, taylorseer=1, cache_interval=1)
        plan = make_plan(diffusion.process, sampling)
        given = given_of(diffusion, request)
        steps = states(diffusion.model, plan, given, sampling)
        bar = tqdm(steps, desc="calibrating", unit="step", total=len(plan.steps))
        ratios = np.stack([magnitude_ratios(carry.history, given.real) for carry in bar])
        found.append(ratios[1:, :, : len(request.seeds)])  # without rows that pad the mesh
    mean = np.concatenate(found, axis=-1).mean(axis=-1)
    times = (float(step.time) for step in plan.steps)
    return Calibration(tuple(times), tuple(tuple(map(float, half)) for half in mean.T))


def _print(model: Place, step: int | None) -> str:
    """Return the `weights_print` of a model; bytes of a file or folder that is as before count."""
    if is_run(model):
        return weights_print(model, step)
    files = sorted(model.rglob("*")) if model.is_dir() else [model]
    stamps = tuple((path, (s := path.stat()).st_size, s.st_mtime_ns) for path in files)
    return _print_of_files(model, stamps)


@lru_cache(maxsize=16)  # a server asks for each request, and reading takes as long as loading
def _print_of_files(model: Path, stamps: tuple) -> str:
    return weights_print(model)
