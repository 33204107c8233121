"""Convert weights between EasyAnimate's layouts: ours, diffusers' and the original's."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from tyro.conf import Positional

from easyanimate_jax.commands import parse

HELP = """Convert weights between EasyAnimate's layouts: ours, diffusers' and the original's.

  released weights to ours   python -m easyanimate_jax convert EasyAnimateV5.1-12b-zh mine --to jax
  a trained run to PyTorch   python -m easyanimate_jax convert runs/mine mine --to diffusers

All that is wrong with the source is listed, with exit code 2, and nothing is written."""
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
    source: Positional[str]
    """Folder of a pipeline, folder or file of one model, run folder, or LoRA file."""
    target: Positional[str]
    """New folder to write; for a LoRA a new file."""
    to: Literal["jax", "diffusers", "original"]
    """Layout to write."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Cast all weights to this type; left out, each tensor keeps its own."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or last weights of a run."""
    step: int | None = None
    """Checkpoint of a run; left out, the newest."""
    only: Part | None = None
    """Convert this part of a pipeline."""
    in_channels: int | None = None
    """Adapt the transformer to the task with so many input channels; new channels are zero."""
    allow_pickle: bool = False
    """Read .bin, .pt and .ckpt files too; needs torch."""


def main(arguments: Sequence[str]) -> int:
    return parse.run(partial(_convert, arguments), prefix="convert")


def _convert(arguments: Sequence[str]) -> int:
    own = asdict(parse.options(Options, arguments, "convert", HELP))
    import jax
    from tqdm import tqdm

    from easyanimate_jax.weights import conversion

    source, target = own.pop("source"), own.pop("target")
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to those who compute
    with tqdm(desc=target, unit="B", unit_scale=True, delay=0.5) as bar:

        def progress(size, total):
            bar.total = total
            bar.update(size)

        try:
            report = conversion.convert(source, target, conversion.Options(**own), progress)
        except OSError as error:
            raise ValueError(str(error)) from error
    print(report)
    return 0
