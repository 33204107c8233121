"""Make pairs of videos for a stage that trains a preference."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from easyanimate_jax.commands import parse
from easyanimate_jax.commands.jax_settings import set_up_jax
from easyanimate_jax.diffusion.tasks import task_of
from easyanimate_jax.facts import MAX_SEED
from easyanimate_jax.generation.request import check_range
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.safety.exits import DONE, PREEMPTED
from easyanimate_jax.weights.pretrained import model_place

HELP = """Sample several videos of each prompt, rate them, and pair the best with the worst.

MODEL is a run, a converted folder or a released folder. The folder OUT gets the videos, their
rewards, metadata.json, which `prepare` reads for a set with pairs=True, and a page. A call that was
stopped goes on. A stage with the objective DirectPreference then trains on the pairs.

REWARD is MODULE:FUNCTION, which takes uint8 videos (B, F, H, W, 3) and B prompts and returns B
numbers, or the address of a server, http://... (docs/posttraining.md). Larger is better.

  python -m easyanimate_jax pairs runs/demo/train --prompts prompts.txt --reward mine:rate"""


@dataclass(frozen=True)
class Options:
    """The arguments of `pairs`."""

    model: Positional[Place]
    """Run, or folder with the parts of a model."""
    prompts: Path
    """Text file with a prompt a line."""
    reward: str
    """MODULE:FUNCTION, or http:// address."""
    output: Path = Path("pairs")
    """Folder of the results."""
    count: int = 8
    """Videos of each prompt, with consecutive seeds."""
    step: int | None = None
    """Checkpoint of a run; by default the newest."""
    weights_of: Literal["ema", "raw"] = "ema"
    """A run's averaged or last weights."""
    frames: int | None = None
    """Frames of a video, 4n+1; by default the model's."""
    height: int | None = None
    """Height in pixels; by default the model's."""
    width: int | None = None
    """Width in pixels; by default the model's."""
    batch: int = 1
    """Videos that are sampled at once."""
    steps: int | None = None
    """Denoising steps; by default the model's."""
    guidance: float | None = None
    """Scale of guidance; by default the model's."""
    seed: int = 44
    """Seed of the first video of each prompt."""
    reward_batch: int = 8
    """Videos of one request to a server."""
    reward_seconds: float = 120.0
    """Seconds that a server may take for an answer."""
    reward_tries: int = 5
    """Most requests to a server for the same videos."""
    reward_format: Literal["mp4", "npz"] = "mp4"
    """Form in which a server gets videos; npz is exact."""
    mesh: Annotated[str | None, arg(metavar="AXES")] = None
    """Devices per axis, such as data=2,context=4; by default one device."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `pairs`; return the exit code."""
    return parse.run(partial(_pairs, arguments))


def _pairs(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "pairs", HELP)
    check(own)
    from easyanimate_jax.commands.sample import mesh_of
    from easyanimate_jax.storage.lock import FolderLock

    set_up_jax()
    import jax

    from easyanimate_jax.data.buckets import check_size
    from easyanimate_jax.evaluation.rewards import RewardError, open_reward
    from easyanimate_jax.generation.denoising import Sampling
    from easyanimate_jax.runs.evaluate import Asked
    from easyanimate_jax.runs.load import load_opened
    from easyanimate_jax.runs.pairs import PairMaker, read_prompts
    from easyanimate_jax.runs.parts import open_parts
    from easyanimate_jax.weights.defaults import Defaults

    prompts = read_prompts(own.prompts)
    opened = open_parts(own.model, step=own.step, weights=own.weights_of)
    if task_of(opened.config.in_channels).is_control:
        raise ValueError("pairs are made of prompts alone, and this model wants a control")
    sides = ("frames", "height", "width")
    size = tuple(getattr(own, side) or getattr(opened.samples, side) for side in sides)
    check_size(*size)
    settings = {"batch": own.reward_batch, "seconds": own.reward_seconds, "fps": opened.fps}
    settings |= {"tries": own.reward_tries, "format": own.reward_format}
    reward = open_reward(own.reward, **settings)
    default = opened.defaults
    if default == Defaults():
        default = Defaults(opened.samples.steps, opened.samples.guidance)
    sampling = Sampling(**default.filled(own.steps, guidance=own.guidance))
    asked = Asked(batch=own.batch, sampling=sampling, seed=own.seed, fps=opened.fps)
    try:
        with FolderLock(own.output, option="--output") as lock, jax.set_mesh(mesh_of(own.mesh)):
            run = load_opened(opened)
            options = {"count": own.count, "size": size, "asked": asked}
            maker = PairMaker(opened, run, prompts, reward, own.output, **options)
            lock.begun = True
            print("\n".join(maker.make()))
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return PREEMPTED
    print(f"the pairs are {own.output / 'metadata.json'}, the page is {own.output / 'index.html'}")
    return DONE


def check(own: Options) -> None:
    """Raise ValueError for options that are wrong without a look at the model."""
    for name, low, high in (
        ("count", 2, 10**4),
        ("frames", 5, 10**4),
        ("batch", 1, 1024),
        ("steps", 1, 1000),
        ("guidance", 0, 100),
        ("seed", 0, MAX_SEED - own.count),
    ):
        if getattr(own, name) is not None:
            check_range(name, getattr(own, name), low, high)
    for name, path in (("folder", model_place(own.model)), ("file", own.prompts)):
        if not path.exists():
            raise ValueError(f"there is no {name} {path}")
    parse.check_folder("--output", own.output)
