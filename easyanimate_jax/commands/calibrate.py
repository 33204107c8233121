"""Calibrate a model for MagCache."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from easyanimate_jax.commands import parse
from easyanimate_jax.facts import MAX_SEED
from easyanimate_jax.generation.request import check_range
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.safety.exits import DONE
from easyanimate_jax.weights.pretrained import model_place

HELP = """Measure how the residual of a model's blocks changes from step to step, for --magcache.

MODEL is a run, a converted folder or a released folder. The network runs at every step for a few
prompts. The mean ratios are written to calibration.json beside the transformer's weights, where
`sample`, `serve` and `load_pipeline` find them. They serve any number of steps, sampler and shift.
Calibrate with the guidance and the size that you sample with.

  python -m easyanimate_jax calibrate runs/demo/train
  python sample.py runs/demo/train --prompt "..." --magcache 0.1"""


@dataclass(frozen=True)
class Options:
    """The arguments of `calibrate`."""

    model: Positional[Place]
    """Run, or folder with the parts of a model."""
    prompts: Path | None = None
    """Text file with a prompt a line; by default the prompts of a run's config."""
    steps: int | None = None
    """Denoising steps; by default the model's."""
    guidance: float | None = None
    """Scale of guidance; by default the model's."""
    frames: int | None = None
    """Frames of a video, 4n+1; by default the model's."""
    height: int | None = None
    """Height in pixels; by default the model's."""
    width: int | None = None
    """Width in pixels; by default the model's."""
    batch: int = 1
    """Videos that are sampled at once."""
    seed: int = 43
    """Seed of the first video."""
    step: int | None = None
    """Checkpoint of a run; by default the newest."""
    weights_of: Literal["ema", "raw"] = "ema"
    """A run's averaged or last weights."""
    transformer: Path | None = None
    """Another transformer: file, folder or run."""
    mesh: Annotated[str | None, arg(metavar="AXES")] = None
    """Devices per axis, such as data=2,context=4; by default one device."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `calibrate`; return the exit code."""
    return parse.run(partial(_calibrate, arguments))


def _calibrate(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "calibrate", HELP)
    check(own)
    from easyanimate_jax.commands.sample import mesh_of, set_up_jax

    set_up_jax()
    import jax

    from easyanimate_jax.data.buckets import check_size
    from easyanimate_jax.generation.denoising import Sampling
    from easyanimate_jax.generation.rows import Request
    from easyanimate_jax.runs.calibration import measure
    from easyanimate_jax.runs.load import load_opened
    from easyanimate_jax.runs.pairs import read_prompts
    from easyanimate_jax.runs.parts import Parts, open_parts

    parts = Parts(transformer=own.transformer)
    opened = open_parts(own.model, parts, step=own.step, weights=own.weights_of)
    prompts = read_prompts(own.prompts) if own.prompts else list(opened.samples.prompts)
    if not prompts:
        raise ValueError(f"{own.model} has no prompts of its own: give a text file with --prompts")
    sides = ("frames", "height", "width")
    size = tuple(getattr(own, side) or getattr(opened.samples, side) for side in sides)
    check_size(*size)
    sampling = Sampling(**opened.defaults.filled(own.steps, guidance=own.guidance))
    file = opened.calibration
    parse.check_folder("the folder of the weights,", file.path.parent)
    with jax.set_mesh(mesh_of(own.mesh)):
        run = load_opened(opened)
        requests = [
            Request(
                run.encoder.encode(prompts[first : first + own.batch]),
                run.encoder.encode([""]),
                size=size,
                seeds=[own.seed + i for i in range(len(prompts))[first : first + own.batch]],
                sampling=sampling,
            )
            for first in range(0, len(prompts), own.batch)
        ]
        found = measure(run.diffusion, requests)
    measured = {"prompts": len(prompts), "size": size, "seed": own.seed, "steps": sampling.steps}
    file.write(found, measured | {"guidance": sampling.guidance})
    print(f"the calibration is {file.path}")
    return DONE


def check(own: Options) -> None:
    """Raise ValueError for options that are wrong without a look at the model."""
    for name, low, high in (
        ("steps", 2, 1000),
        ("guidance", 0, 100),
        ("frames", 1, 10**4),
        ("batch", 1, 1024),
        ("seed", 0, MAX_SEED - 10**6),  # of later prompts
    ):
        if getattr(own, name) is not None:
            check_range(name, getattr(own, name), low, high)
    for name, path in (("folder", model_place(own.model)), ("file", own.prompts)):
        if path is not None and not path.exists():
            raise ValueError(f"there is no {name} {path}")
