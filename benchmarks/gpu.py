"""Compare the 12B transformer on a GPU with diffusers' and with the limits of the card.

bfloat16, random weights, one sample with 333 text tokens. The tasks are a forward pass at 13,312
and 53,248 video tokens, and a training step at full width with as many blocks as diffusers can
hold. diffusers' model runs eagerly, and with its blocks under torch.compile. Without a GPU a small
version runs on the CPU, only to check the script. Writes benchmarks/results/gpu.md, row by row.

    python benchmarks/gpu.py [--repeats 3]
"""

import argparse
import os
import shutil
from pathlib import Path

from setting import setting
from transformer.compare import best, measure, num_tokens, ratio

from easyanimate_jax import MMDiTConfig
from easyanimate_jax.training.compile import model_flops

RESULT = Path(__file__).parent / "results" / "gpu.md"
# Width and dtype; grids of tokens, each with the number of blocks that a step tries first.
LARGE = {"width": 3072, "dtype": "bfloat16"}, 48, {(13, 32, 32): 12, (13, 64, 64): 6}
SMALL = {"width": 128, "dtype": "float32"}, 2, {(2, 8, 8): 2, (4, 8, 8): 2}
SIDES = ("diffusers", "compiled", "ours")
TEXT = 333
KINDS = ("product", "its weights' gradient", "attention", "attention and its backward pass")


def main() -> None:
    """Measure all tasks, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--repeats", type=int, default=3)
    a = p.parse_args()
    there = shutil.which("nvidia-smi") is not None
    model, depth, grids = LARGE if there else SMALL
    # JAX reserves 75 % of GPU memory by default. On the CPU, torch.compile needs a C++ compiler.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    sides = SIDES if there else ("diffusers", "ours")
    sizes = model | {"repeats": a.repeats}
    say(
        "# The transformer on a GPU, beside diffusers",
        "",
        setting(),
        "",
        *([] if there else ["**There was no GPU: small, on the CPU, to see that it runs.**", ""]),
        "What JAX, attention with this package's function, and torch reach at the shapes of one "
        "block, TFLOP/s:",
        "",
        f"| tokens | {' | '.join(f'{kind}: JAX | torch' for kind in KINDS)} |",
        "|---" * 9 + "|",
    )
    limits = [
        measure(side, "limits", grids, depth=1, **model, repeats=3)
        for side in ("ours", "diffusers")
    ]
    for grid, ours, theirs in zip(grids, *limits, strict=True):
        rates = [f"{x['extra'][k] / 1e12:.0f}" for k in ours["extra"] for x in (ours, theirs)]
        say(f"| {num_tokens(grid)} | {' | '.join(rates)} |")
    say(
        "",
        f"{limits[0][0]['device']}; {limits[1][0]['device']}. Width {model['width']}, "
        f"{model['dtype']}, one sample, {TEXT} text tokens. Best (median) seconds of {a.repeats}; "
        "FLOPs are the model's, nothing recomputed. A step is loss, gradient and AdamW, its "
        "weights float32.",
        "",
        "| task | blocks | tokens | side | seconds | TFLOP/s | peak GB | ours / this |",
        "|---|---|---|---|---|---|---|---|",
    )
    found = {side: measure(side, "forward", grids, depth=depth, **sizes) for side in sides}
    for n, grid in enumerate(grids):
        rows("forward", depth, grid, {side: results[n] for side, results in found.items()}, model)
    for grid, deepest in grids.items():
        for depth in (n for n in (deepest, deepest // 2, deepest // 4) if n):
            results = {"diffusers": measure("diffusers", "step", [grid], depth=depth, **sizes)[0]}
            if results["diffusers"]:
                break
        for side in sides[1:]:
            results[side] = measure(side, "step", [grid], depth=depth, **sizes)[0]
        rows("step", depth, grid, results, model)


def say(*lines: str) -> None:
    """Print lines and append them to the result; the first call starts the file."""
    RESULT.parent.mkdir(exist_ok=True)
    with RESULT.open("w" if lines[0].startswith("#") else "a", encoding="utf-8") as file:
        for line in lines:
            print(line, file=file)
            print(line, flush=True)


def rows(task: str, depth: int, grid: tuple[int, int, int], results: dict, model: dict) -> None:
    """Write one result row for each side of a task."""
    flops = work(model["width"], depth, grid, task)
    for side, result in results.items():
        rate = peak = "-"
        if result:
            rate = f"{flops / min(result['seconds']) / 1e12:.3g}"
            peak = f"{result['peak'] / 1e9:.2f}"
        say(
            f"| {task} | {depth} | {num_tokens(grid)} | {side} | {best(result)} | {rate} | {peak} "
            f"| {ratio(results['ours'], result, 'seconds')} |"
        )


def work(width: int, depth: int, grid: tuple[int, int, int], task: str) -> float:
    """Return the model FLOPs of a forward pass, or of a step, which needs three times as many."""
    config = MMDiTConfig(
        depth=depth,
        mmdit_depth=depth,
        heads=width // 64,
        text_widths=(1024, 2048),
        text_norm=False,
        round_time=False,
    )
    flops, _ = model_flops(config, num_tokens(grid), TEXT)
    return flops if task == "step" else flops / 3


if __name__ == "__main__":
    main()
