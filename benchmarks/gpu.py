"""The 12B transformer on a GPU, beside diffusers' and beside what the card itself can do.

bfloat16, random weights, one sample with 333 text tokens: a forward pass at 13,312 and 53,248 video
tokens, and a training step at full width with as many blocks as fit; diffusers' eager and under
torch.compile. Without a GPU the same runs small on the CPU, says so, and proves nothing but that
the script works. Writes benchmarks/results/gpu.md.

    python benchmarks/gpu.py [--rounds 2] [--repeats 3]
"""

import argparse
import shutil
from pathlib import Path

from setting import setting
from transformer.compare import alternate, best, measure, num_tokens, ratio

from easyanimate_jax.aot.predict import model_flops
from easyanimate_jax.models.mmdit import MMDiTConfig

RESULT = Path(__file__).parent / "results" / "gpu.md"
LARGE = {"width": 3072, "depth": 48}, ((13, 32, 32), (13, 64, 64)), "bfloat16"
SMALL = {"width": 128, "depth": 2}, ((2, 8, 8), (4, 8, 8)), "float32"
SIDES = ("ours", "diffusers", "compiled")
TEXT = 333


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    for name, value in (("rounds", 2), ("repeats", 3)):
        p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    there = shutil.which("nvidia-smi") is not None
    model, grids, dtype = LARGE if there else SMALL
    # torch.compile wants a C++ compiler on the CPU, and says nothing there.
    sides = SIDES if there else SIDES[:2]
    lines = [
        "# The transformer on a GPU, beside diffusers",
        "",
        setting(),
        "",
        "" if there else "**There was no GPU: small, on the CPU, to see that the script runs.**",
        "",
        f"Width {model['width']}, {dtype}, one sample. Best (median) seconds of {a.rounds} "
        f"alternating rounds of {a.repeats}.",
        "",
        "| task | blocks | tokens | side | seconds | TFLOP/s | peak GB | ours / this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    device = ""
    for task in ("forward", "step"):
        for grid in grids:
            sizes = model | dict(zip(("frames", "rows", "columns"), grid, strict=True))
            if task == "step":
                sizes["depth"] = deepest(sizes, dtype)
            found = alternate(sides, task, sizes, dtype=dtype, repeats=a.repeats, rounds=a.rounds)
            flops = work(sizes, task)
            for side, result in found.items():
                rate = peak = "-"
                if result:
                    device = result["device"]
                    rate = f"{flops / min(result['seconds']) / 1e12:.3g}"
                    peak = f"{result['peak'] / 1e9:.2f}"
                lines.append(
                    f"| {task} | {sizes['depth']} | {num_tokens(sizes)} | {side} | {best(result)} "
                    f"| {rate} | {peak} | {ratio(found['ours'], result, 'seconds')} |"
                )
                print(lines[-1], flush=True)
    sizes = model | dict(zip(("frames", "rows", "columns"), grids[0], strict=True))
    rates = measure("ours", "limits", sizes, dtype=dtype, repeats=10)["extra"]
    measured = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())
    lines += ["", f"Device: {device}. Alone, at {num_tokens(sizes)} tokens: {measured}.", ""]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines))


def work(sizes: dict, task: str) -> float:
    """Model FLOPs of a forward pass, or of a step: three times as many; nothing recomputed."""
    config = MMDiTConfig(
        depth=sizes["depth"],
        mmdit_depth=sizes["depth"],
        heads=sizes["width"] // 64,
        text_widths=(1024, 2048),
        text_norm=False,
        round_time=False,
    )
    flops, _ = model_flops(config, num_tokens(sizes), TEXT)
    return flops if task == "step" else flops / 3


def deepest(sizes: dict, dtype: str) -> int:
    """The most blocks, halving, of which both sides make a training step."""
    depth = sizes["depth"]
    while depth > 1:
        tried = [
            measure(side, "step", sizes | {"depth": depth}, dtype=dtype, repeats=1)
            for side in ("ours", "diffusers")
        ]
        if all(tried):
            return depth
        depth //= 2
    return depth


if __name__ == "__main__":
    main()
