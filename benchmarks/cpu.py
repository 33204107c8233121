"""Compare our transformer with diffusers' EasyAnimateTransformer3DModel on the CPU: time, memory.

Width 512, 6 blocks, float32, one sample with 333 text tokens. The tasks are a forward pass and a
training step (loss, gradient, AdamW). Each side has its own process on the same cores; rounds
alternate. Writes benchmarks/results/cpu.md.

    python benchmarks/cpu.py [--rounds 2] [--repeats 3] [--depth 6] [--width 512]
"""

import argparse
from pathlib import Path

from setting import setting
from transformer.compare import alternate, best, measure, num_tokens, ratio

RESULT = Path(__file__).parent / "results" / "cpu.md"
SIDES = ("ours", "diffusers")
GRIDS = ((4, 16, 16), (13, 16, 16))  # 1,024 and 3,328 tokens


def main() -> None:
    """Measure both sides, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    for name, value in (("rounds", 2), ("repeats", 3), ("depth", 6), ("width", 512)):
        p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    lines = [
        "# The transformer on the CPU, beside diffusers",
        "",
        setting(),
        "",
        f"Width {a.width}, {a.depth} blocks, float32, one sample. Best (median) seconds of "
        f"{a.rounds} alternating rounds of {a.repeats}. Memory is what the process grew by over "
        "what it held after its imports, at most, while it was timed; planned is what arguments, "
        "results and temporaries of our program take of it, the rest is the compiler's and the "
        "runtime's. A training step of ours keeps all named activations, as a run does that has "
        "the memory; it computes norms and GELUs again. diffusers' keeps all.",
        "",
        "| task | tokens | ours, s | diffusers, s | time ratio | ours, MB (planned) "
        "| diffusers, MB | memory ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in ("forward", "step"):
        for grid in GRIDS:
            sizes = {"depth": a.depth, "width": a.width}
            found = alternate(
                SIDES, task, [grid], **sizes, dtype="float32", repeats=a.repeats, rounds=a.rounds
            )
            pair = [found[side][0] for side in SIDES]
            peaks = ["-" if r is None else f"{r['peak'] / 1e6:.0f}" for r in pair]
            if pair[0]:
                peaks[0] += f" ({pair[0]['extra'] / 1e6:.0f})"
            lines.append(
                f"| {task} | {num_tokens(grid)} | {best(pair[0])} | {best(pair[1])} "
                f"| {ratio(*pair, 'seconds')} | {peaks[0]} | {peaks[1]} "
                f"| {ratio(*pair, 'peak')} |"
            )
            print(lines[-1], flush=True)
    lines += [
        "",
        "What the frameworks themselves reach, GFLOP/s at the shapes above: an up-projection, the "
        "gradient of its weights (both operands turned), and attention, forward alone and with "
        "its backward pass: JAX with this package's, and torch with the one that diffusers calls.",
        "",
        "| tokens | product: JAX | torch | gradient: JAX | torch | attention: JAX | torch "
        "| with backward: JAX | torch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for grid in GRIDS:
        sizes = {"depth": a.depth, "width": a.width, "dtype": "float32", "repeats": 5}
        rates = [measure(s, "limits", [grid], **sizes)[0]["extra"] for s in SIDES]
        cells = [f"{r[work] / 1e9:.0f}" for work in rates[0] for r in rates]
        lines.append(f"| {num_tokens(grid)} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
