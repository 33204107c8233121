"""Measure a model on captioned clips."""

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
from easyanimate_jax.storage.local import local_path
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.safety.exits import DONE
from easyanimate_jax.weights.pretrained import model_place

HELP = """Measure a model on captioned clips that it was not trained on.

MODEL is a run, a converted folder or a released folder, CLIPS a source as in `prepare`. The folder
OUT gets the loss on the clips, PSNR and SSIM of their reconstructions, new films of their captions
beside the true ones, and a page. A call that was stopped goes on.

--features adds the Fréchet distance between real and made films. Give a function as
MODULE:FUNCTION, which turns uint8 videos (B, F, H, W, 3) into numbers (B, D), or a file .npz with
the arrays `real` and `made`, computed elsewhere on the films in OUT.

--vbench PROMPTS writes the films that VBench's own tools read: OUT/vbench/PROMPT-0.mp4 to -4.mp4.
PROMPTS is a text with a prompt a line, or VBench_full_info.json.

  python -m easyanimate_jax evaluate runs/demo/train my/clips --output measured"""


@dataclass(frozen=True)
class Options:
    """The arguments of `evaluate`."""

    model: Positional[Place]
    """Run, or folder with the parts of a model."""
    clips: Positional[Place]
    """Folder, table or list of captioned clips."""
    output: Path = Path("evaluation")
    """Folder of the results."""
    step: int | None = None
    """Checkpoint of a run; by default the newest."""
    weights_of: Literal["ema", "raw"] = "ema"
    """A run's averaged or last weights."""
    count: int = 64
    """Most clips to measure, chosen by a hash of their names."""
    videos: int = 64
    """Most clips to make again from their captions; 0 makes none."""
    batch: int = 1
    """Clips and videos at once."""
    steps: int | None = None
    """Denoising steps; by default the model's."""
    guidance: float | None = None
    """Scale of guidance; by default the model's."""
    seed: int = 44
    """Seed of noise, masks and captions."""
    features: str | None = None
    """MODULE:FUNCTION, or a file .npz with real and made."""
    vbench: Path | None = None
    """File of prompts for VBench."""
    mesh: Annotated[str | None, arg(metavar="AXES")] = None
    """Devices per axis, such as data=2,context=4; by default one device."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `evaluate`; return the exit code."""
    return parse.run(partial(_evaluate, arguments))


def _evaluate(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "evaluate", HELP)
    check(own)
    from easyanimate_jax.commands.sample import mesh_of
    from easyanimate_jax.storage.lock import FolderLock

    set_up_jax()
    import jax

    from easyanimate_jax.generation.denoising import Sampling
    from easyanimate_jax.runs.evaluate import Asked, Evaluation, prompt_videos, read_prompts
    from easyanimate_jax.runs.load import load_opened
    from easyanimate_jax.runs.parts import open_parts
    from easyanimate_jax.weights.defaults import Defaults

    features = features_of(own.features)
    prompts = read_prompts(own.vbench) if own.vbench else []
    opened = open_parts(own.model, step=own.step, weights=own.weights_of)
    if prompts and task_of(opened.config.in_channels).is_control:
        raise ValueError("--vbench has prompts alone, and this model wants a control")
    default = opened.defaults
    if default == Defaults():
        default = Defaults(opened.samples.steps, opened.samples.guidance)
    sampling = Sampling(**default.filled(own.steps, guidance=own.guidance))
    asked = Asked(own.count, own.videos, own.batch, sampling, own.seed, opened.fps)
    mesh = mesh_of(own.mesh)
    with FolderLock(own.output, option="--output") as lock, jax.set_mesh(mesh):
        run = load_opened(opened)
        evaluation = Evaluation(opened, run, own.clips, own.output, asked, mesh)
        lock.begun = True
        print("\n".join(evaluation.measure(features)))
        if prompts:
            prompt_videos(run, prompts, own.output / "vbench", asked)
    print(f"the page is {own.output / 'index.html'}")
    return DONE


def check(own: Options) -> None:
    """Raise ValueError for options that are wrong without a look at the model."""
    for name, low, high in (
        ("count", 1, 10**6),
        ("videos", 0, 10**6),
        ("batch", 1, 1024),
        ("steps", 1, 1000),
        ("guidance", 0, 100),
        ("seed", 0, MAX_SEED - 5),  # of VBench's five films of a prompt
    ):
        if getattr(own, name) is not None:
            check_range(name, getattr(own, name), low, high)
    for name, path in (("folder", model_place(own.model)), ("source", own.clips)):
        if not path.exists():
            raise ValueError(f"there is no {name} {path}")
    if own.features and own.videos < 2:
        raise ValueError(
            f"--features needs made films, and --videos is {own.videos}: use 2 or more"
        )
    parse.check_folder("--output", own.output)


def features_of(text: str | None):
    """Return the `Features` that --features names, or None. Raises ValueError."""
    from easyanimate_jax.runs.evaluate import Features, features_in
    from easyanimate_jax.storage.functions import named_function

    if text is None:
        return None
    if text.endswith(".npz"):
        return features_in(local_path(text))
    try:
        return Features(text, named_function(text))
    except ValueError as error:
        raise ValueError(f"--features {error}; give MODULE:FUNCTION, or a file .npz") from error
