"""How a model is sampled unless a request says otherwise: steps, guidance and times.

Released models and runs that predict noise take 50 guided steps (spec 10.1). A distilled model
takes few steps, without guidance, at times of its own. A run knows them by the objective of its
stage. A converted folder has them in `sampling.json`, a LoRA file in its metadata.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from easyanimate_jax.storage.stores import Place
from easyanimate_jax.weights.at_hand import at_hand
from easyanimate_jax.weights.files import metadata_of
from easyanimate_jax.weights.run_folder import is_run, read_meta

FILE = "sampling.json"  # at the root of a folder with the parts of a model
KEY = "easyanimate_jax"  # of the metadata of a LoRA file; its value is JSON
# Objectives whose students need no guidance.
UNGUIDED = ("GuidanceDistillation", "SegmentDistillation", "DistributionMatching")
UNGUIDED += ("NegativeAwareFinetuning",)
# Objectives whose students are sampled as their teacher, the `init` of the run.
AS_TEACHER = ("DirectPreference", "RewardBackpropagation")


Size = tuple[int, int, int]  # frames, height, width


class Defaults(NamedTuple):
    """The steps, guidance and times of a model; no times are those of the sampler."""

    steps: int = 50
    guidance: float = 6.0
    times: tuple[float, ...] = ()

    def filled(
        self,
        steps: int | None = None,
        times: Sequence[float] = (),
        guidance: float | None = None,
        shift: float | None = None,
    ) -> dict:
        """Return steps, times and guidance: those asked for, or the model's own.

        The model's times belong to its own number of steps, and are not shifted. Raises ValueError
        for a number of steps that is not that of the times.
        """
        if times and steps not in (None, len(times)):
            raise ValueError(f"{len(times)} times and {steps} steps: leave one of them out")
        guidance = self.guidance if guidance is None else guidance
        if times:
            steps = len(times)
        steps = self.steps if steps is None else steps
        if not times and steps == self.steps and shift is None:
            times = self.times
        return {"steps": steps, "times": tuple(times), "guidance": guidance}

    def text(self, size: Size | None = None) -> str:
        """Return the content of `FILE`; `size` is that of the model's samples."""
        fields = self._asdict() | ({"size": size} if size else {})
        return json.dumps(fields, indent=1) + "\n"


RELEASED = Defaults()


def of_source(source: str | Place, step: int | None = None) -> Defaults:
    """Return the defaults of a run, at a checkpoint, or of a folder; `RELEASED` for a file.

    Raises ValueError for a run without such a checkpoint, and for a damaged file.
    """
    source = at_hand(source, "transformer")
    if is_run(source):
        return of_run(read_meta(source, step)[1])
    return of_folder(source)


def of_run(meta: Mapping) -> Defaults:
    """Return the defaults of a run's checkpoint, from its metadata."""
    config = meta["config"]
    stages = {stage["name"]: stage for stage in config["stages"]}
    objective = stages.get(meta.get("stage"), {}).get("objective") or {}
    teacher = _read(meta["teacher"]) if meta.get("teacher") else RELEASED
    process = config["process"]["class"]
    return of_objective(objective.get("class"), objective.get("steps"), process, teacher=teacher)


def of_objective(
    name: str | None,
    steps: int | None,
    process: str,
    otherwise: Defaults = RELEASED,
    teacher: Defaults = RELEASED,
) -> Defaults:
    """Return the defaults of a model that was trained for an objective.

    `name` is the class of the objective, `steps` its number of steps if it has one, and `process`
    the class of the noise process. `otherwise` is that of a model that predicts noise. `teacher` is
    that of the run's `init`; if it is not a distilled model, it counts for nothing.
    """
    from easyanimate_jax.diffusion.ddpm import DDPM
    from easyanimate_jax.diffusion.flow import Flow

    if name in AS_TEACHER and teacher != RELEASED:
        return teacher
    if name not in UNGUIDED:
        return otherwise
    if steps is None:
        return otherwise._replace(guidance=1.0)
    grid = {"DDPM": DDPM, "Flow": Flow}[process]().grid(steps)
    return Defaults(steps, 1.0, tuple(map(float, grid)))


def of_folder(folder: Path) -> Defaults:
    """Return the defaults of a folder. Raises ValueError for a file that is not of this form."""
    path = folder / FILE
    if not path.is_file():
        return Defaults()
    try:
        return _read(json.loads(path.read_text("utf-8-sig")))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f'{path} is not of the form {{"steps": 4, "guidance": 1.0, "times": [1000, 891, 731, '
            f"475]}} ({error}); correct it, or remove it to sample in 50 guided steps"
        ) from error


def size_of_folder(folder: Place) -> Size | None:
    """Return the (frames, height, width) of a folder's samples; None if it has no size of its own.

    Raises ValueError for a size that is not three whole numbers.
    """
    path = folder / FILE
    try:
        size = json.loads(path.read_text("utf-8-sig")).get("size") if path.is_file() else None
    except (ValueError, AttributeError):
        return None  # `of_folder` refuses the file
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 3 and all(type(n) is int for n in size)):
        raise ValueError(f"{path}: size is {size}; give [frames, height, width] or remove it")
    return tuple(size)


def size_of_run(meta: Mapping) -> Size | None:
    """Return the (frames, height, width) of a run's samples; None if it makes none."""
    samples = meta["config"]["samples"]
    if not samples["every"] or not samples["prompts"]:
        return None
    return samples["frames"], samples["height"], samples["width"]


def of_metadata(metadata: Mapping[str, str]) -> Defaults | None:
    """Return the defaults that a LoRA file asks for; None if it asks for none."""
    try:
        return _read(json.loads(metadata[KEY])["sampling"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def of_lora(path: str | Place) -> Defaults | None:
    """Return the defaults of a LoRA file, from its header; None if it asks for none."""
    path = at_hand(path)
    is_file = path.suffix == ".safetensors" and path.is_file()
    return of_metadata(metadata_of(path)) if is_file else None


def _read(fields) -> Defaults:
    steps, guidance = int(fields["steps"]), float(fields["guidance"])
    times = tuple(float(time) for time in fields.get("times", ()))
    if not (1 <= steps <= 1000 and 0 <= guidance <= 100 and all(map(math.isfinite, times))):
        raise ValueError("steps are 1 to 1000, guidance is 0 to 100")
    if times and len(times) != steps:
        raise ValueError(f"{len(times)} times for {steps} steps")
    return Defaults(steps, guidance, times)
