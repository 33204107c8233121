"""Convert weights between EasyAnimate's layouts: ours, diffusers' and the original repository's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, UseAppendAction

from easyanimate_jax.commands import parse
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.safety.exits import DONE

HELP = """Convert weights between EasyAnimate's layouts: ours, diffusers' and the original code's.

  released weights to ours   python -m easyanimate_jax convert EasyAnimateV5.1-12b-zh mine --to jax
  a trained run to PyTorch   python -m easyanimate_jax convert runs/mine mine --to diffusers
  a run's LoRA to a file     python -m easyanimate_jax convert runs/mine l.safetensors --to comfyui

If the source has faults, all of them are listed, nothing is written, and the exit code is 2."""
Part = Literal[
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
]


@dataclass(frozen=True)
class Options:
    """The arguments of `convert`."""

    source: Positional[Place]
    """Pipeline folder, folder or file of one model, run folder, or LoRA file or folder."""
    target: Positional[Path]
    """New folder to write; for a LoRA, or the adapters of a run, a new .safetensors file."""
    to: Literal["jax", "diffusers", "original", "comfyui"]
    """Layout to write; comfyui is for LoRA files."""
    lora: UseAppendAction[tuple[Path, ...]] = ()
    """LoRA file to add to the transformer's weights, as FILE or FILE:WEIGHT; may be repeated."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Cast all weights to this dtype; by default each tensor keeps its own."""
    weights: Literal["ema", "raw"] = "ema"
    """ema: averaged weights of a run; raw: its last weights."""
    step: int | None = None
    """Step of a run's checkpoint; by default the newest."""
    only: Part | None = None
    """Convert only this part of a pipeline."""
    in_channels: int | None = None
    """Adapt the transformer to the task with so many input channels; new weights are zero."""
    allow_pickle: bool = False
    """Read .bin, .pt and .ckpt files too; needs torch."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `convert`; return the exit code."""
    return parse.run(partial(_convert, arguments), prefix="convert")


def _convert(arguments: Sequence[str]) -> int:
    own = dict(vars(parse.options(Options, arguments, "convert", HELP)))
    import jax
    from tqdm import tqdm

    from easyanimate_jax.weights import conversion
    from easyanimate_jax.weights.adapters import named_weight

    source, target = own.pop("source"), own.pop("target")
    loras = tuple(named_weight(str(one)) for one in own.pop("lora"))
    jax.config.update("jax_platforms", "cpu")  # keep accelerators free for other processes
    with tqdm(desc=str(target), unit="B", unit_scale=True, delay=0.5) as bar:

        def progress(size, total):
            bar.total = total
            bar.update(size)

        try:
            report = conversion.convert(
                source, target, conversion.Options(**own, loras=loras), progress
            )
        except OSError as error:
            if error.errno in parse.NO_ROOM:
                raise
            raise ValueError(str(error)) from error
    print(report)
    return DONE
