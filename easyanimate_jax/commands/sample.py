"""Generate videos and pictures from a run."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from easyanimate_jax.commands import parse
from easyanimate_jax.facts import MESH_AXES
from easyanimate_jax.generation.outputs import Origin, finished, identity
from easyanimate_jax.generation.request import (
    Asked,
    SampleRequest,
    check,
    check_range,
    read_lines,
    without_effect,
)
from easyanimate_jax.training.safety.exits import BAD_INPUT, DONE

NAME = "sample.py"
HELP = """Generate videos and pictures from a run.

  text to video    sample.py runs/demo/train --prompt "a red circle moves to the left"
  text to picture  sample.py RUN --prompt "..." --frames 1
  image to video   sample.py RUN --prompt "..." --image start.png --end-image end.png
  longer           sample.py RUN --prompt "..." --frames 97 --segment 49
  video to video   sample.py RUN --prompt "..." --video film.mp4 --strength 0.7
  inpainting       sample.py RUN --prompt "..." --video film.mp4 --mask hole.png
  control          sample.py RUN --prompt "..." --control film.mp4 --operator canny
  camera           sample.py RUN --prompt "..." --camera poses.txt --reference look.png
  many             sample.py RUN --prompts lines.jsonl

Each sample is NUMBER.mp4 (or .png), a contact sheet, and NUMBER.json, which holds the command that
reproduces it. A wrong request ends with one line and exit code 2 before a device starts."""


@dataclass(frozen=True)
class Options:
    """The arguments of `sample`."""

    checkpoint: Positional[Path]
    """Run folder, which holds the checkpoints."""
    request: Annotated[SampleRequest, arg(name="")] = SampleRequest()
    """Options of each sample."""
    prompts: Path | None = None
    """File of JSON lines; keys are options with _ for -."""
    batch: int = 1
    """Lines of --prompts generated at once."""
    output: Path = Path("samples")
    """Folder to write to."""
    gif: bool = False
    """Write a GIF beside each video."""
    memory: Literal["all", "low"] = "all"
    """low: text encoders, transformer, VAE take turns."""
    weights: Literal["full", "int8"] = "full"
    """int8: transformer kernels in 8 bits."""
    lora: UseAppendAction[tuple[Path, ...]] = ()
    """LoRA: FILE or FILE:WEIGHT."""
    mesh: str | None = None
    """Several devices, such as data=2,context=4."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `sample`; return the exit code."""
    # JAX reserves 75 % of GPU memory by default.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
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
    from easyanimate_jax.runs.sample import examine, make
    from easyanimate_jax.weights.adapters import named_weight, open_loras
    from easyanimate_jax.weights.identity import weights_print
    from easyanimate_jax.weights.run_folder import read_meta

    step, meta = read_meta(own.checkpoint)
    words = [str(word) for word in own.lora]
    loras = open_loras(map(named_weight, words))
    prints = {word: weights_print(named_weight(word)[0]) for word in words}
    origin = Origin(own.checkpoint, step, own.weights, meta, prints)
    todo = examine(todo, origin)
    own.output.mkdir(parents=True, exist_ok=True)
    for sentence in dict.fromkeys(s for one in todo for s in without_effect(one.request)):
        say(sentence)
    if own.batch > 1 and own.prompts is None:
        say(f"--batch {own.batch} has no effect without --prompts")
    done = finished(own.output)
    todo = [one for one in todo if one.line is None or identity(one, origin) not in done]
    with on_mesh(own.mesh):
        how = {"memory": own.memory, "batch": own.batch, "gif": own.gif, "loras": loras}
        for path in make(todo, origin, own.output, **how, say=say):
            print(path)
    return DONE


def requests(own: Options) -> list[Asked]:
    """Return the request of --prompt, or one per line of --prompts.

    Raises ValueError for options and requests that are wrong without a look at the checkpoint.
    """
    if (own.request.prompt is None) == (own.prompts is None):
        raise ValueError("give either --prompt or --prompts")
    todo = [Asked(own.request)] if own.prompts is None else read_lines(own.prompts, own.request)
    check_range("batch", own.batch, 1, 1024)
    if own.mesh is not None:
        read_mesh(own.mesh)
    for one in todo:
        with one.named():
            check(one.request)
    if not own.checkpoint.is_dir():
        raise ValueError(
            f"there is no checkpoint folder {own.checkpoint}; give the folder of a run"
        )
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


def on_mesh(text: str | None):
    """Return a context in which the mesh of `data=2,context=4` is current; None is one device."""
    import jax

    from easyanimate_jax.sharding import MeshConfig, make_mesh

    if text is None:
        return nullcontext()
    return jax.set_mesh(make_mesh(MeshConfig(**{"fsdp": 1} | read_mesh(text))))


def say(what: str) -> None:
    """Print one line for the user to stderr."""
    print(f"{NAME}: {what}", file=sys.stderr)
