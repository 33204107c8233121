"""Compare the 12B transformer on a GPU with diffusers', and its attention with and without a mask.

bfloat16, random weights, one sample with 333 text tokens, at 13,312 and 53,248 video tokens. First
it compares our attention to that in float32, and measures the speed of products and attention. Then
come training steps and forward passes of a few blocks at full width: ours, ours with a mask, with
8-bit products, with adapters, and diffusers' model with its blocks under torch.compile, or eager.

A part starts only if its expected time is left, and is stopped at the end of `--minutes`. The parts
that matter most come first: 8 minutes should suffice for the first ten, and 15 for all. The result
names the parts that were left out. It is written row by row to benchmarks/results/gpu.md. Without a
GPU a small version runs on the CPU, only to check the script, and its result is only printed.

    python benchmarks/gpu.py [--minutes 8] [--repeats 2]
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from setting import setting
from transformer.compare import best, measure, num_tokens, ratio

from easyanimate_jax import MMDiTConfig
from easyanimate_jax.training.compile import model_flops

RESULT = Path(__file__).parent / "results" / "gpu.md"
THERE = shutil.which("nvidia-smi") is not None
TEXT = 333
SHORT, LONG = ((13, 32, 32), (13, 64, 64)) if THERE else ((2, 8, 8), (4, 8, 8))
SIZES = {"width": 3072, "dtype": "bfloat16"} if THERE else {"width": 128, "dtype": "float32"}


class Part(NamedTuple):
    """One process: a task of one side, at some grids of tokens."""

    task: str
    side: str
    blocks: int
    grids: tuple
    seconds: float  # expected on an H200, with imports and compilation


# Expected are 10 to 15 s for the start, 5 to 10 s for the weights, 15 to 40 s for compilation, and
# the calls at the rates of results/gpu.md. Only these rates were measured.
PARTS = (
    Part("same", "ours", 1, (SHORT,), 40),
    Part("limits", "ours", 1, (SHORT, LONG), 45),
    Part("limits", "masked", 1, (SHORT, LONG), 35),
    Part("step", "ours", 12, (SHORT,), 50),
    Part("step", "masked", 12, (SHORT,), 40),
    Part("step", "compiled", 12, (SHORT,), 60),
    Part("forward", "ours", 12, (SHORT, LONG), 45),
    Part("forward", "compiled", 12, (SHORT, LONG), 55),
    Part("step", "fp8", 12, (SHORT,), 50),
    Part("lora", "ours", 12, (SHORT,), 45),
    Part("step", "ours", 6, (LONG,), 45),
    Part("step", "masked", 6, (LONG,), 40),
    Part("forward", "masked", 12, (SHORT, LONG), 40),
    Part("step", "compiled", 6, (LONG,), 60),
    Part("forward", "diffusers", 12, (SHORT, LONG), 35),
    Part("step", "diffusers", 12, (SHORT,), 35),
    Part("step", "diffusers", 6, (LONG,), 35),
    Part("limits", "diffusers", 1, (SHORT, LONG), 35),
    Part("forward", "ours", 48, (SHORT, LONG), 75),
)
if not THERE:  # on the CPU, torch.compile needs a C++ compiler
    small = (part._replace(blocks=min(part.blocks, 2), seconds=0) for part in PARTS)
    PARTS = tuple(part for part in small if part.side != "compiled")
TABLES = {
    "same": "| tokens | attention | result | gradient of q | k | v |",
    "limits": "| tokens | side | product | its weights' gradient | attention "
    "| attention and its backward pass |",
    "step": "| task | blocks | tokens | side | seconds | TFLOP/s | peak GB | ours / this |",
}


def main() -> None:
    """Measure the parts for which there is time, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--minutes", type=float, default=8.0)
    p.add_argument("--repeats", type=int, default=2)
    a = p.parse_args()
    end = time.monotonic() + 60 * a.minutes
    # JAX reserves 75 % of GPU memory by default.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    say(
        "# The transformer on a GPU, beside diffusers",
        "",
        setting(),
        "",
        *([] if THERE else ["**There was no GPU: small, on the CPU, to see that it runs.**", ""]),
        f"Width {SIZES['width']}, {SIZES['dtype']}, one sample, {TEXT} text tokens. Best (median) "
        f"seconds of {a.repeats}; FLOPs are the model's, nothing recomputed. A step is loss, "
        "gradient and AdamW, its weights float32; `lora` trains adapters of rank 128 beside "
        f"{SIZES['dtype']} weights. `masked` is ours with a mask in cuDNN's attention instead of "
        "zero keys. Errors are relative norms beside float32; limits are TFLOP/s.",
    )
    ours, devices, left_out, table = {}, set(), [], None
    # Programs of one kind share the compiler's measurements of products.
    with tempfile.TemporaryDirectory() as os.environ["JAX_COMPILATION_CACHE_DIR"]:
        for part in PARTS:
            name = f"{part.task} of {part.side}, {part.blocks} blocks"
            began, left = time.monotonic(), end - time.monotonic()
            try:
                results = measured(part, a.repeats, left)
            except subprocess.TimeoutExpired:
                left_out.append(name)
                continue
            head = TABLES.get(part.task, TABLES["step"])
            if head != table:
                table = head
                say("", head, "|---" * (head.count("|") - 1) + "|")
            for grid, result in zip(part.grids, results, strict=True):
                key = part.task, part.blocks, grid
                if part.side == "ours":
                    ours[key] = result
                devices |= {result["device"]} if result else set()
                say(*rows(part, grid, result, ours.get(key)))
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    missing = "; ".join(left_out) or "nothing"
    say("", f"{'; '.join(sorted(devices))}. Left out, for want of time: {missing}.")


def measured(part: Part, repeats: int, left: float) -> list[dict | None]:
    """Return the results of a part at its grids.

    Raises TimeoutExpired if the `left` seconds do not suffice.
    """
    if left < max(part.seconds, 1):
        raise subprocess.TimeoutExpired(part.task, left)
    repeats = {"same": 1, "limits": 3}.get(part.task, repeats)
    sizes = SIZES | {"depth": part.blocks, "repeats": repeats, "limit": left}
    return measure(part.side, part.task, part.grids, **sizes)


def say(*lines: str) -> None:
    """Print lines and append them to the result; the first call starts the file."""
    for line in lines:
        print(line, flush=True)
    if THERE:
        with RESULT.open("w" if lines[0].startswith("#") else "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def rows(part: Part, grid: tuple, result: dict | None, ours: dict | None) -> list[str]:
    """Return the rows of a table that tell a result at one grid."""
    tokens = num_tokens(grid)
    if part.task == "same":
        found = result["extra"] if result else {}
        cells = {name: " | ".join(f"{x:.1e}" for x in errors) for name, errors in found.items()}
        return [f"| {tokens} | {name} | {errors} |" for name, errors in cells.items()]
    if part.task == "limits":
        kinds = ("matmul", "gradient", "attention", "both")
        rates = result["extra"] if result else {}
        cells = (f"{rates[kind] / 1e12:.3g}" if kind in rates else "-" for kind in kinds)
        return [f"| {tokens} | {part.side} | {' | '.join(cells)} |"]
    rate = peak = "-"
    if result:
        rate = f"{work(part, grid) / min(result['seconds']) / 1e12:.3g}"
        peak = f"{result['peak'] / 1e9:.2f}"
    return [
        f"| {part.task} | {part.blocks} | {tokens} | {part.side} | {best(result)} | {rate} "
        f"| {peak} | {ratio(ours, result, 'seconds')} |"
    ]


def work(part: Part, grid: tuple[int, int, int]) -> float:
    """Return the model FLOPs of a forward pass, or of a step and its backward pass."""
    config = MMDiTConfig(
        depth=part.blocks,
        mmdit_depth=part.blocks,
        heads=SIZES["width"] // 64,
        text_widths=(1024, 2048),
        text_norm=False,
        round_time=False,
    )
    flops, _ = model_flops(config, num_tokens(grid), TEXT, trained=float(part.task != "lora"))
    return flops / 3 if part.task == "forward" else flops


if __name__ == "__main__":
    main()
