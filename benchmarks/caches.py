"""Measure what each cache saves in sampling, and how far it moves the videos.

The cases are TeaCache, MagCache and TaylorSeer, guidance at every 2nd to 4th step, and fewer steps.
All start from the same noise as the reference, 50 guided steps, on held-out prompts of the world.
An evaluation is one branch of the guidance for one step. Wall and CPU times are the best of
alternating rounds in one process, as a share of the reference's; other work on the machine affects
CPU time less. PSNR compares decoded videos with the reference's.
The calibration for MagCache is measured first, on the prompts of the run's config. Writes
benchmarks/results/caches.md.

    python benchmarks/caches.py RUN [--prompts 32] [--rows 4] [--rounds 2]
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
from setting import setting

from demos import world
from demos.generate import ROWS, psnr
from demos.score import score
from easyanimate_jax import LatentDiffusion, Request, Sampling, load_pipeline
from easyanimate_jax.data.buckets import grid_of
from easyanimate_jax.generation.denoising import make_plan, states
from easyanimate_jax.generation.pipelines import given_of
from easyanimate_jax.generation.pixels import decode
from easyanimate_jax.models.mmdit import unpatchify
from easyanimate_jax.runs.calibration import measure

RESULT = Path(__file__).parent / "results" / "caches.md"
STEPS, REFERENCE = 50, "50 steps"
CASES = {
    REFERENCE: {},
    **{f"{steps} steps": {"steps": steps} for steps in (25, 17)},
    **{f"TeaCache {value}": {"teacache": value} for value in (0.02, 0.05, 0.1)},
    **{
        f"MagCache {value}, interval {n}": {"magcache": value, "cache_interval": n}
        for value, n in ((0.02, 3), (0.04, 3), (0.12, 5))
    },
    **{
        f"TaylorSeer order {order}, interval {n}": {"taylorseer": order, "cache_interval": n}
        for order in (1, 2)
        for n in (2, 3, 4)
    },
    **{f"guidance every {n} steps": {"guidance_every": n} for n in (2, 3, 4)},
}


def main() -> None:
    """Measure all cases, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", help="folder of a finished demo")
    for name, value in (("--prompts", 32), ("--rows", 4), ("--rounds", 2)):
        p.add_argument(name, type=int, default=value)
    a = p.parse_args()
    run = load_pipeline(a.run)
    samples = run.config.samples
    prompts = world.prompts("heldout", a.prompts, samples.seed)
    own = asked(run, samples.prompts, 1000)  # seeds that no prompt below has
    model = run.diffusion
    diffusion = LatentDiffusion(model.model, model.vae, model.process, measure(model, [own]))
    results, texts = {}, [prompt.en for prompt in prompts]
    for name, options in CASES.items():
        parts = [
            made(diffusion, asked(run, texts[first : first + ROWS], first, **options))
            for first in range(0, len(texts), ROWS)
        ]
        videos = np.concatenate([decode(run.vae, latents) for latents, _ in parts])
        results[name] = {"evaluations": np.mean([spent for _, spent in parts])}
        reference = videos if name == REFERENCE else reference
        results[name]["psnr"] = psnr(reference, videos)
        results[name] |= score(videos, prompts)
        print(name, results[name], flush=True)
    seconds = {name: [] for name in CASES}
    few = {name: asked(run, texts[: a.rows], 0, **options) for name, options in CASES.items()}
    for turn in range(a.rounds + 1):  # the first one compiles
        for name, request in few.items():
            began = np.array([time.perf_counter(), time.process_time()])
            made(diffusion, request)
            spent = np.array([time.perf_counter(), time.process_time()]) - began
            seconds[name] += [spent] * (turn > 0)
    RESULT.write_text(table(a, results, seconds))
    print(RESULT.read_text())


def asked(run, texts, first: int, **options) -> Request:
    """Return the request for one video of each text; the seeds follow the run's."""
    samples = run.config.samples
    return Request(
        run.encoder.encode(list(texts)),
        run.encoder.encode([""]),
        size=(samples.frames, samples.height, samples.width),
        seeds=[samples.seed + first + i for i in range(len(texts))],
        sampling=dataclasses.replace(Sampling(STEPS, samples.guidance), **options),
    )


def made(diffusion, request) -> tuple[np.ndarray, int]:
    """Return latents, (B, T, h, w, C), and the evaluations of the network that they took."""
    sampling, spent = request.sampling, 0
    plan = make_plan(diffusion.process, sampling, calibration=diffusion.calibration)
    given = given_of(diffusion, request)
    for number, carry in enumerate(states(diffusion.model, plan, given, sampling)):
        ran = plan.runs[number]
        if sampling.teacache:  # it sets its sum to 0 where the blocks run
            ran = float(carry.history.distance) == 0
        spent += int(ran) * (2 if plan.steps[number].both else 1)
    return unpatchify(np.asarray(carry.registers[0]), grid_of(*request.size)), spent


def table(a, results: dict, seconds: dict) -> str:
    """Return the result as Markdown."""
    best = {name: np.min(times, axis=0) for name, times in seconds.items()}  # (wall, CPU)
    lines = [
        "# Caches: quality against speed",
        "",
        setting(),
        "",
        f"Weights: {Path(a.run).parent.name}'s. {a.prompts} held-out prompts, guidance 4, one call "
        f"for {min(ROWS, a.prompts)} videos. Time: denoising {a.rows} videos, best of {a.rounds} "
        f"alternating rounds, {best[REFERENCE][0]:.1f} s for {REFERENCE}. PSNR: to the videos of "
        f"{REFERENCE} from the same noise. An evaluation is one branch of one step.",
        "",
        "| | evaluations | wall time | CPU time | PSNR (dB) | joint | shape |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        sound = "" if name == REFERENCE else f"{found['psnr']:.1f}"
        wall, cpu = best[name] / best[REFERENCE]
        lines.append(
            f"| {name} | {found['evaluations']:.0f} | {wall:.2f} | {cpu:.2f} | {sound} "
            f"| {found['joint']:.2f} | {found['shape']:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
