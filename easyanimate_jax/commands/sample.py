"""Generate videos and pictures with a run, or with weights in a folder."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from easyanimate_jax.commands import parse
from easyanimate_jax.commands.jax_settings import set_up_jax
from easyanimate_jax.facts import MESH_AXES
from easyanimate_jax.generation.outputs import Origin, finished, identity
from easyanimate_jax.generation.request import (
    Asked,
    SampleRequest,
    check,
    check_range,
    check_tile,
    read_lines,
    without_effect,
)
from easyanimate_jax.storage.stores import Place, make_folder
from easyanimate_jax.training.safety.exits import BAD_INPUT, DONE
from easyanimate_jax.weights.pretrained import NAMES, model_place

NAME = "sample.py"
HELP = """Generate videos and pictures with a run, or with weights in a folder.

  text to video    sample.py runs/demo/train --prompt "a red circle moves to the left"
  image to video   sample.py MODEL --prompt "..." --image start.png --end-image end.png
  longer           sample.py MODEL --prompt "..." --frames 97 --segment 49
  video to video   sample.py MODEL --prompt "..." --video film.mp4 --strength 0.7
  inpainting       sample.py MODEL --prompt "..." --video film.mp4 --mask hole.png
  control          sample.py MODEL --prompt "..." --control film.mp4 --operator canny
  camera           sample.py MODEL --prompt "..." --camera poses.txt --reference look.png
  many             sample.py MODEL --prompts lines.jsonl

Each sample is NUMBER.mp4, or .png for one frame, and NUMBER.json with the command to repeat it."""


@dataclass(frozen=True)
class Options:
    """The arguments of `sample`."""

    model: Positional[Place]
    """Run, folder of weights, or emoji."""
    request: Annotated[SampleRequest, arg(name="")] = SampleRequest()
    """Options of each sample."""
    prompts: Path | None = None
    """JSON lines; keys: options with _."""
    batch: int = 1
    """Lines of --prompts generated at once."""
    output: Place = Path("samples")
    """Folder to write to."""
    gif: bool = False
    """Write a GIF beside each video."""
    memory: Literal["all", "low"] = "all"
    """low: the parts take turns."""
    tile: int | None = None
    """Decode tiles of N pixels a side."""
    weights: Literal["full", "int8"] = "full"
    """int8: transformer kernels in 8 bits."""
    step: int | None = None
    """A checkpoint, not the newest one."""
    weights_of: Literal["ema", "raw"] = "ema"
    """A run's averaged or last weights."""
    transformer: Place | None = None
    """Another one: file, folder or run."""
    vae: Place | None = None
    """Another one: file, folder or run."""
    text: Place | None = None
    """Folder of other text encoders."""
    lora: UseAppendAction[tuple[Place, ...]] = ()
    """LoRA: FILE or FILE:WEIGHT."""
    mesh: str | None = None
    """Devices, such as data=2,context=4."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `sample`; return the exit code."""
    set_up_jax()
    try:
        return parse.run(partial(_sample, arguments), prefix=NAME)
    except OSError as error:
        say(str(error))
    except (MemoryError, RuntimeError) as error:  # from NumPy, from XLA
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = str(error).partition("\n")[0]
        say(f"there is too little memory; use fewer frames, or a smaller size ({why})")
    return BAD_INPUT


def _sample(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "sample", HELP)
    todo = requests(own)
    # JAX is imported here, and no device is touched before `on_mesh`.
    from easyanimate_jax.runs import load
    from easyanimate_jax.runs.parts import Parts, open_parts, with_loras
    from easyanimate_jax.runs.sample import examine, make
    from easyanimate_jax.weights.adapters import named_weight, open_loras

    parts = Parts(own.transformer, own.vae, own.text)
    opened = open_parts(own.model, parts, step=own.step, weights=own.weights_of)
    loras = open_loras(named_weight(str(word)) for word in own.lora)
    origin = origin_of(own, opened)
    opened = with_loras(opened, loras)
    todo = examine(todo, opened)
    make_folder(own.output)
    for sentence in dict.fromkeys(s for one in todo for s in without_effect(one.request)):
        say(sentence)
    if own.batch > 1 and own.prompts is None:
        say(f"--batch {own.batch} has no effect without --prompts")
    if own.tile and all(own.tile >= max(one.request.height, one.request.width) for one in todo):
        say(f"--tile {own.tile} has no effect on videos that are not larger")
    done = finished(own.output)
    todo = [one for one in todo if one.line is None or identity(one, origin) not in done]
    with on_mesh(own.mesh):
        low, int8 = own.memory == "low", own.weights == "int8"
        run = load.load_opened(opened, low_memory=low, int8=int8, loras=loras)
        if not low:  # load now, so that a check of free memory counts them
            _ = run.diffusion.model, run.diffusion.vae
        how = {"batch": own.batch, "tile": own.tile, "gif": own.gif}
        for path in make(todo, run, origin, own.output, **how, say=say):
            print(path)
    return DONE


def origin_of(own: Options, opened) -> Origin:
    """Return the model of `runs.parts.open_parts` as it is written beside each sample."""
    from easyanimate_jax.weights.adapters import named_weight
    from easyanimate_jax.weights.identity import weights_print

    names = ("transformer", "vae", "text")
    options = {"weights": own.weights, "weights-of": own.weights_of}
    options |= {name: str(getattr(own, name)) for name in names if getattr(own, name)}
    options |= {"tile": own.tile} if own.tile else {}
    prints = {word: weights_print(named_weight(word)[0]) for word in map(str, own.lora)}
    if own.lora:
        options["lora"] = [str(word) for word in own.lora]
    if opened.step is not None:
        options["step"] = opened.step
    elif own.prompts:  # reads every byte, and only lines of a file are looked for later
        prints["transformer"] = weights_print(opened.model)
    if own.prompts:
        prints |= {name: weights_print(options[name]) for name in names[1:] if name in options}
    place = opened.calibration.path
    if own.request.magcache and place.is_file():  # else `examine` refuses the request
        prints["calibration"] = weights_print(place)
    return Origin(own.model, options, prints, opened.meta)


def requests(own: Options) -> list[Asked]:
    """Return the request of --prompt, or one per line of --prompts.

    Raises ValueError for options and requests that are wrong without a look at the checkpoint.
    """
    if (own.request.prompt is None) == (own.prompts is None):
        raise ValueError("give either --prompt or --prompts")
    todo = [Asked(own.request)] if own.prompts is None else read_lines(own.prompts, own.request)
    check_range("batch", own.batch, 1, 1024)
    check_tile(own.tile)
    if own.mesh is not None:
        read_mesh(own.mesh)
    for one in todo:
        with one.named():
            check(one.request)
    if not model_place(own.model).is_dir():
        raise ValueError(
            f"there is no folder {own.model}; give a run, a converted folder, a released one, or "
            f"{' or '.join(NAMES)}"
        )
    if isinstance(own.output, Path):
        parse.check_folder("--output", own.output)
    return todo


def read_mesh(text: str) -> dict[str, int]:
    """Return the devices per mesh axis of `data=2,context=4`. Raise ValueError for other texts."""
    pairs = [pair.split("=") for pair in text.split(",")]
    if not all(len(p) == 2 and p[0] in MESH_AXES and p[1].isdecimal() and int(p[1]) for p in pairs):
        raise ValueError(
            f"--mesh {text}: give a number of devices by axis ({', '.join(MESH_AXES)}), such as "
            f"data=2,context=4"
        )
    return {name: int(count) for name, count in pairs}


def mesh_of(text: str | None):
    """Return the mesh of `data=2,context=4`; None is one device."""
    import jax

    from easyanimate_jax.sharding import MeshConfig, make_mesh

    if text is None:
        return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    return make_mesh(MeshConfig(**{"fsdp": 1} | read_mesh(text)))


def on_mesh(text: str | None):
    """Return a context in which the mesh of `data=2,context=4` is current; None has no mesh."""
    import jax

    return nullcontext() if text is None else jax.set_mesh(mesh_of(text))


def say(what: str) -> None:
    """Print one line for the user to stderr."""
    print(f"{NAME}: {what}", file=sys.stderr)
