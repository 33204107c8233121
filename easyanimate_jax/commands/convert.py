"""Convert weights between EasyAnimate's layouts: ours, diffusers' and the original's.

  released weights to ours   python -m easyanimate_jax convert EasyAnimateV5.1-12b-zh mine --to jax
  a trained run to PyTorch   python -m easyanimate_jax convert runs/mine mine --to diffusers

SOURCE is a pipeline folder, the folder or file of one model, a run folder, or a LoRA file. All that
is wrong with it is listed, with exit code 2, and nothing is written.
"""

import argparse
import sys

import jax
from tqdm import tqdm

from easyanimate_jax.diffusion.tasks import all_numbers
from easyanimate_jax.weights.conversion import PARTS, Options, convert


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message):
        self.exit(2, f"convert: {message}\n")


def parser() -> Parser:
    p = Parser(
        "python -m easyanimate_jax convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("source", help="what to convert")
    p.add_argument("target", help="a new folder; for a LoRA a new file")
    p.add_argument("--to", required=True, choices=("jax", "diffusers", "original"))
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as it is")
    p.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="of a run (default: ema)"
    )
    p.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    p.add_argument("--only", choices=PARTS, help="convert this part of a pipeline")
    p.add_argument(
        "--in-channels",
        type=int,
        help=f"adapt the transformer to a task: {all_numbers()}; new channels are zero",
    )
    p.add_argument("--allow-pickle", action="store_true", help="read .bin, .pt, .ckpt; needs torch")
    return p


def main(argv: list[str] | None = None) -> int:
    a = vars(parser().parse_args(argv))
    source, target = a.pop("source"), a.pop("target")
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to those who compute
    with tqdm(desc=target, unit="B", unit_scale=True, delay=0.5) as bar:

        def progress(size, total):
            bar.total = total
            bar.update(size)

        try:
            report = convert(source, target, Options(**a), progress)
        except (ValueError, OSError) as error:
            bar.close()
            print(f"convert: {error}", file=sys.stderr)
            return 2
    print(report)
    return 0
