"""Score a LoRA that taught the demo's model a new direction, and write the report page.

The test prompts name the new direction in combinations that the LoRA's clips never showed. Other
prompts, with the directions of the world, show what the LoRA changed that it should not have. The
model without the LoRA makes all of them from the same noise. A new direction counts if it is the
nearest of eight and the motion is even and straight; a known one if it is the nearest of five, the
four of the world and the new one.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from demos import concept, facts, world
from demos.generate import generate
from demos.score import attributes, moves_whole, score, strict_attributes
from easyanimate_jax import Pipeline, TextEncoder, load_pipeline, open_loras
from easyanimate_jax.evaluation import web

SHOWN = 6  # videos of each kind on the page
KEPT = ("direction", "colour", "background", "joint", "whole")
READ = {
    "new": strict_attributes,
    "old": partial(attributes, directions=world.DIRECTIONS | world.NEW_DIRECTIONS),
}
FILE = "northeast.safetensors"  # beside the run's folder, written by `convert`
GRID = (3, 8, 8)  # latent frames, token rows and columns of the compared predictions
TIME = 700.0  # diffusion time of the compared predictions


def evaluate(encoder: TextEncoder, run: Pipeline, base: Pipeline) -> tuple[dict, dict]:
    """Return (figures, {kind of video: (video, caption) pairs for the page})."""
    seed = run.config.samples.seed
    tests = {"new": concept.prompts()[1], "old": world.prompts("seen", concept.PROMPTS, seed)}
    results, shown, made = {}, {}, {}
    for name, model in (("before", base), ("after", run)):
        for kind, prompts in tests.items():
            for language in ("en", "zh"):
                texts = [getattr(prompt, language) for prompt in prompts]
                videos = generate(model, encoder, texts, samples=run.config.samples)
                made[name, kind, language] = videos
                whole = float(np.mean([moves_whole(video) for video in videos]))
                found = score(videos, prompts, READ[kind]) | {"whole": whole}
                results.setdefault(kind, {}).setdefault(name, {})[language] = found
                shown[f"{kind} directions, {language}, {name}"] = list(
                    zip(videos, texts, strict=True)
                )[:SHOWN]
                print(f"{kind} {name} {language}: {_brief(found)}", flush=True)
    old = np.concatenate([made["after", "old", language] for language in ("en", "zh")])
    turned = [READ["old"](video).direction in world.NEW_DIRECTIONS for video in old]
    results["spoiled"] = float(np.mean(turned))
    results["file"] = _file_facts(encoder, run, tests["new"], made)
    return results, shown


def _file_facts(encoder: TextEncoder, run: Pipeline, prompts, made: dict) -> dict:
    """Return figures of the exported file: its size, and whether it makes the run's videos."""
    folder, texts = Path(run.config.run).parent, [prompt.en for prompt in prompts]
    models = {
        weight: load_pipeline(
            run.config.init,
            step=run.config.init_step,
            loras=open_loras([(folder / FILE, weight)]),
        )
        for weight in (0.0, 1.0)
    }
    models["merged"] = load_pipeline(folder / "merged")
    videos, predictions = {}, {}
    for name, model in models.items():
        videos[name] = generate(model, encoder, texts, samples=run.config.samples)
        predictions[name] = _prediction(model, encoder, texts)
    size = lambda path: sum(p.stat().st_size for p in path.rglob("*.safetensors"))  # noqa: E731
    levels = lambda one, other: int(np.abs(one.astype(int) - other).max())  # noqa: E731
    whole = size(folder / "merged" / "transformer")
    apart = np.abs(predictions["merged"] - predictions[1.0]).max()
    return {
        "bytes": (folder / FILE).stat().st_size,
        "share of the model": (folder / FILE).stat().st_size / whole,
        "levels from the base at weight 0": levels(videos[0.0], made["before", "new", "en"]),
        "levels from the run at weight 1": levels(videos[1.0], made["after", "new", "en"]),
        "levels of merged weights from weight 1": levels(videos["merged"], videos[1.0]),
        "prediction of merged weights from weight 1": float(apart),
        "largest prediction": float(np.abs(predictions[1.0]).max()),
    }


def _prediction(model: Pipeline, encoder: TextEncoder, texts: list[str]) -> Float[Array, "B N P"]:
    """Return what the transformer predicts for the texts and for noise of a fixed seed."""
    mmdit, rows, count = model.diffusion.model, len(texts), int(np.prod(GRID))
    shape = rows, count, 4 * mmdit.config.in_channels
    inputs = (
        np.random.default_rng(0).standard_normal(shape, np.float32),
        np.tile(GRID, (rows, 1)),
        np.full(rows, count),
        np.full(rows, TIME, np.float32),
        encoder.encode(texts),
    )
    return jax.jit(lambda model, *x: model(*x))(mmdit, *inputs)


def _brief(scores: dict) -> str:
    return "  ".join(f"{name} {scores[name]:.2f}" for name in KEPT)


def summary(results: dict) -> str:
    """Return the scores as a table for a terminal."""
    lines = [f"{name:<44}{_brief(scores)}" for name, scores in _groups(results).items()]
    lines += [f"{name}: {value:.4g}" for name, value in _more(results).items()]
    return "\n".join(lines)


def _more(results: dict) -> dict:
    return results["file"] | {"old directions that turned into the new one": results["spoiled"]}


def _groups(results: dict) -> dict[str, dict]:
    return {
        f"{what}, {language}, {when} the LoRA": results[kind][name][language]
        for kind, what in (("new", "the new direction"), ("old", "the other directions"))
        for language in ("en", "zh")
        for name, when in (("before", "without"), ("after", "with"))
    }


def page(config, results: dict, shown: dict, rows: list[dict]) -> str:
    """Return the report as one HTML page."""
    table = web.table(
        ["", *KEPT],
        [[name, *(scores[n] for n in KEPT)] for name, scores in _groups(results).items()],
    )
    videos = "".join(
        f"<h3>{name}</h3>" + "".join(web.video(clip, text) for clip, text in clips)
        for name, clips in shown.items()
    )
    return web.page(
        f"easyanimate_jax: {config.run}",
        [
            ("Scores", table),
            ("Loss", facts.loss_chart(config, rows)),
            ("Samples", videos),
            ("Facts", facts.fact_table(results, _more(results))),
        ],
    )
