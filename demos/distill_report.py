"""Score a student of few steps beside its teacher of fifty guided steps, and write the page.

Both start from the same noise. Colour and direction cannot judge this: one unguided evaluation of
the teacher already shows them. So the report compares latents, pixels, edges and shapes, the spread
over seeds, and the time.
"""

import time
from typing import NamedTuple

import numpy as np

from demos import facts, world
from demos.generate import ROWS, psnr
from demos.score import edge_energy, score, segmented
from easyanimate_jax import (
    Pipeline,
    Request,
    Sampling,
    TextEncoder,
    boundaries,
    denoise_latents,
    load_pipeline,
)
from easyanimate_jax.evaluation import web
from easyanimate_jax.evaluation.measures import frechet
from easyanimate_jax.generation.pixels import decode

PROMPTS, SHOWN = 96, 4
SEEDS, OF_PROMPTS = 8, 12  # for the spread: so many seeds of so many prompts
COLUMNS = ("evaluations", "error", "psnr", "edges", "shape", "joint", "speed")


class Way(NamedTuple):
    """One way to make the videos."""

    name: str
    model: Pipeline
    sampling: Sampling

    @property
    def evaluations(self) -> int:
        """Return the evaluations of the network for one video."""
        return self.sampling.steps * (2 if self.sampling.guidance > 1 else 1)


def evaluate(encoder: TextEncoder, run: Pipeline, base: Pipeline) -> tuple[dict, dict]:
    """Return (figures, {kind of video: (video, caption) pairs for the page})."""
    teacher, *others = _ways(run, base)
    prompts = world.prompts("heldout", PROMPTS, base.config.samples.seed)
    results, shown = {"ways": {}}, {}
    for language in ("en", "zh"):
        texts = [getattr(prompt, language) for prompt in prompts]
        true = _made(teacher, encoder, texts)
        for way in (teacher, *others):
            latents, videos = true if way is teacher else _made(way, encoder, texts)
            found = _compared(latents, videos, *true) | score(videos, prompts)
            found["evaluations"] = way.evaluations
            results["ways"].setdefault(way.name, {})[language] = found
            shown[f"{way.name}, {language}"] = list(zip(videos, texts, strict=True))[:SHOWN]
            print(f"{language} {way.name}: {_brief(found)}", flush=True)
    student = others[-1]
    results["spread"] = _spread(encoder, teacher, student, prompts)
    results["seconds"] = {way.name: _seconds(way, encoder, prompts) for way in (teacher, student)}
    return results, shown


def _ways(run: Pipeline, base: Pipeline) -> list[Way]:
    """Return the teacher, the teacher in fewer steps, and the student of each stage."""
    ways, scale = [], run.config.samples.guidance  # as the students were taught
    for end in boundaries(run.config.stages):
        student = load_pipeline(run.config.run, step=end)
        own = student.defaults
        few = {"steps": own.steps, "times": own.times}
        ways += [
            Way(f"teacher, {own.steps} guided steps", base, Sampling(guidance=scale, **few)),
            Way(f"teacher, {own.steps} steps unguided", base, Sampling(guidance=1.0, **few)),
            Way(f"student, {own.steps} steps", student, Sampling(guidance=own.guidance, **few)),
        ]
    return [
        Way("teacher, 50 guided steps", base, Sampling(50, scale)),
        Way("teacher, 10 guided steps", base, Sampling(10, scale)),
        *ways,
    ]


def _made(way: Way, encoder: TextEncoder, texts: list[str], seeds=None) -> tuple:
    """Return (latents, videos), one for each text, from the noise of its seed."""
    samples, latents, videos = way.model.samples, [], []
    seeds = [samples.seed + i for i in range(len(texts))] if seeds is None else seeds
    for first in range(0, len(texts), ROWS):
        rows = slice(first, first + ROWS)
        request = Request(
            encoder.encode(texts[rows]),
            encoder.encode([""]),
            size=(samples.frames, samples.height, samples.width),
            seeds=seeds[rows],
            sampling=way.sampling,
        )
        latents.append(denoise_latents(way.model.diffusion, request))
        videos.append(decode(way.model.vae, latents[-1]))
    return np.concatenate(latents), np.concatenate(videos)


def _compared(latents, videos, true_latents, true_videos) -> dict:
    """Return the error of latents as a share of their variance, and figures of the pixels."""
    return {
        "error": float(np.mean((latents - true_latents) ** 2) / true_latents.var()),
        "psnr": psnr(true_videos, videos),
        "edges": edge_energy(videos) / edge_energy(true_videos),
    }


def _spread(encoder: TextEncoder, teacher: Way, student: Way, prompts) -> dict:
    """Return the deviation of place and motion over seeds, as a share of the teacher's.

    "distance" is the Fréchet distance of place, motion, size and colour to the teacher's videos
    from other seeds; "distance of the teacher" is that of the teacher's own to them.
    """
    texts = [prompt.en for prompt in prompts[:OF_PROMPTS] for _ in range(SEEDS)]
    seeds = list(range(len(texts)))
    features = {
        way.name: _features(_made(way, encoder, texts, seeds)[1]) for way in (teacher, student)
    }
    other = _features(_made(teacher, encoder, texts, [10_000 + seed for seed in seeds])[1])
    scale = other.std(axis=0)
    deviations = {
        name: values.reshape(OF_PROMPTS, SEEDS, -1).std(axis=1).mean(axis=0)
        for name, values in features.items()
    }
    ratio = deviations[student.name] / deviations[teacher.name]
    return {
        "place": float(ratio[:2].mean()),
        "motion": float(ratio[2:4].mean()),
        "distance": frechet(other / scale, features[student.name] / scale),
        "distance of the teacher": frechet(other / scale, features[teacher.name] / scale),
    }


def _features(videos) -> np.ndarray:
    """Return place, motion (short sides and short sides a frame), size and colour of objects."""
    found = []
    for video in videos:
        _, colour, frames, _ = segmented(video)
        mass = np.maximum(frames.sum((1, 2)), 1e-6)
        y = (frames.sum(2) * np.arange(video.shape[1])).sum(1) / mass
        x = (frames.sum(1) * np.arange(video.shape[2])).sum(1) / mass
        centres = np.stack([y, x], axis=1) / min(video.shape[1:3])
        motion = np.polyfit(np.arange(len(video)), centres, 1)[0]
        size = np.sqrt(mass.mean()) / min(video.shape[1:3])
        found.append([*centres.mean(0), *motion, size, *(colour / 255)])
    return np.array(found)


def _seconds(way: Way, encoder: TextEncoder, prompts) -> float:
    """Return the seconds of denoising a full batch, after its program was compiled."""
    texts = [prompt.en for prompt in prompts[:ROWS]]
    samples = way.model.samples
    request = Request(
        encoder.encode(texts),
        encoder.encode([""]),
        size=(samples.frames, samples.height, samples.width),
        seeds=list(range(ROWS)),
        sampling=way.sampling,
    )
    best = np.inf
    for _ in range(2):
        began = time.perf_counter()
        denoise_latents(way.model.diffusion, request)
        best = min(best, time.perf_counter() - began)
    return float(best)


def _brief(found: dict) -> str:
    return "  ".join(f"{name} {found[name]:.3g}" for name in COLUMNS)


def summary(results: dict) -> str:
    """Return the figures as a table for a terminal."""
    lines = [f"{name:<44}{_brief(found)}" for name, found in _groups(results).items()]
    lines += [f"spread: {name}: {value:.3g}" for name, value in results["spread"].items()]
    seconds = list(results["seconds"].values())
    lines.append(f"time of denoising: {seconds[1] / seconds[0]:.3g} of the teacher's")
    return "\n".join(lines)


def _groups(results: dict) -> dict[str, dict]:
    return {
        f"{name}, {language}": results["ways"][name][language]
        for language in ("en", "zh")
        for name in results["ways"]
    }


def page(config, results: dict, shown: dict, rows: list[dict]) -> str:
    """Return the report as one HTML page; films of one row start from the same noise."""
    groups = _groups(results)
    table = web.table(
        ["", *COLUMNS], [[name, *(found[n] for n in COLUMNS)] for name, found in groups.items()]
    )
    videos = "".join(
        f"<h3>{name}</h3>" + "".join(web.video(clip, text) for clip, text in clips)
        for name, clips in shown.items()
    )
    seconds = list(results["seconds"].values())
    more = {f"spread over seeds: {name}": value for name, value in results["spread"].items()}
    more["time of denoising / the teacher's"] = seconds[1] / seconds[0]
    return web.page(
        f"easyanimate_jax: {config.run}",
        [
            ("Student and teacher from the same noise", table),
            ("Loss", facts.loss_chart(config, rows)),
            ("Samples", videos),
            ("Facts", facts.fact_table(results, more)),
        ],
    )
