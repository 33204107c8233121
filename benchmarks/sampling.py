"""Measure what the reuse of evaluations saves in sampling, and how it changes the result.

The cases are the plain sampler, TeaCache at three thresholds, the unconditional branch at every
2nd, 3rd and 4th step, and guidance only in the middle steps. Each is compiled first, then timed in
alternating rounds. The best wall and CPU seconds are kept; other work on the machine affects CPU
seconds less. The change is the root mean square distance from the plain sampler's latents, divided
by the root mean square of those. With a run of the demo the score of the prompts is shown too;
without one the weights are random. Writes benchmarks/results/sampling.md.

    python benchmarks/sampling.py [RUN] [--rows 4] [--steps 30] [--rounds 2]
"""

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from setting import setting

from demos import world
from demos.score import score
from easyanimate_jax import (
    Flow,
    LatentDiffusion,
    MMDiT,
    MMDiTConfig,
    Request,
    Sampling,
    denoise_latents,
    load_pipeline,
)
from easyanimate_jax.generation.pixels import decode

RESULT = Path(__file__).parent / "results" / "sampling.md"
THRESHOLDS = (0.05, 0.1, 0.2)
NAMES = ("colour", "background", "direction", "speed", "shape")
SIZE = 9, 128, 128


def main() -> None:
    """Time all cases, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", nargs="?", help="folder of a finished demo")
    for name, value in (("--rows", 4), ("--steps", 30), ("--rounds", 2)):
        p.add_argument(name, type=int, default=value)
    a = p.parse_args()
    ways = {"plain": {}}
    ways |= {f"TeaCache {t}": {"teacache": t} for t in THRESHOLDS}
    ways |= {f"both branches every {n} steps": {"guidance_every": n} for n in (2, 3, 4)}
    ways["guidance from 20 to 80 %"] = {"guided": (0.2, 0.8)}
    make, prompts = from_run(a) if a.run else from_noise(a)
    seconds, results = {name: [] for name in ways}, {}  # (wall seconds, CPU seconds)
    for name, options in ways.items():
        results[name] = make(**options)  # compiles
    for _ in range(a.rounds):
        for name, options in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            make(**options)
            seconds[name].append((time.perf_counter() - began, time.process_time() - cpu))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(table(a, seconds, results, prompts))
    print(RESULT.read_text())


def from_run(a):
    """Return (a function from sampling options to latents and videos, the prompts) of a run."""
    run = load_pipeline(a.run)
    samples, encoder = run.config.samples, run.encoder
    prompts = world.prompts("seen", a.rows, seed=samples.seed)
    texts, negative = encoder.encode([prompt.en for prompt in prompts]), encoder.encode([""])
    size = samples.frames, samples.height, samples.width
    request = Request(
        texts, negative, size, list(range(a.rows)), Sampling(a.steps, samples.guidance)
    )
    return latents_and_videos(run.diffusion, request), prompts


def from_noise(a):
    """Return the same for random weights of eight blocks, without prompts."""
    config = MMDiTConfig(
        depth=8,
        mmdit_depth=8,
        heads=4,
        text_widths=(64,),
        text_norm=False,
        round_time=False,
        dtype="float32",
    )
    model = jax.jit(lambda: MMDiT(config, rngs=nnx.Rngs(0)))()
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    text = jax.random.normal(jax.random.key(2), (a.rows + 1, 32, 64))
    diffusion = LatentDiffusion(jax.tree.unflatten(tree, drawn), None, Flow())
    request = Request((text[1:],), (text[:1],), SIZE, list(range(a.rows)), Sampling(a.steps))
    return latents_and_videos(diffusion, request), None


def latents_and_videos(diffusion, request):
    """Return the latents, and a function that decodes them, so that decoding is not timed."""

    def make(**options):
        sampling = dataclasses.replace(request.sampling, **options)
        latents = denoise_latents(diffusion, request._replace(sampling=sampling))
        return latents, (lambda: decode(diffusion.vae, latents))

    return make


def table(a, seconds, results, prompts) -> str:
    """Return the result as Markdown."""
    weights = f"the demo's, {a.run}" if a.run else "random, eight blocks of width 256"
    lines = [
        "# Sampling: what reuse between the steps saves",
        "",
        setting(),
        "",
        f"Weights: {weights}. {a.rows} videos at once, {a.steps} steps, best (worst) of {a.rounds} "
        "rounds, the VAE not counted.",
        "",
        "| | seconds | times faster | CPU seconds | times fewer | change | "
        + (" | ".join(NAMES) + " |" if prompts else ""),
        "|---|---|---|---|---|---|" + ("---|" * len(NAMES) if prompts else ""),
    ]
    plain = results["plain"][0]
    for name, times in seconds.items():
        latents, videos = results[name]
        change = np.sqrt(np.mean((latents - plain) ** 2) / np.mean(plain**2))
        row = f"| {name} | "
        for all_of, plain_of in zip(
            zip(*times, strict=True), zip(*seconds["plain"], strict=True), strict=True
        ):
            row += f"{min(all_of):.2f} ({max(all_of):.2f}) | {min(plain_of) / min(all_of):.2f} | "
        row += f"{change:.3f} |"
        if prompts:
            found = score(videos(), prompts)
            row += " ".join(f" {found[name]:.2f} |" for name in NAMES)
        lines.append(row)
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
