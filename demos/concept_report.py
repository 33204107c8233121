"""Score a LoRA that taught the demo's model a new colour, and write the report page.

The test prompts name the new colour in combinations that the LoRA's clips never showed. Other
prompts, with the colours of the world, show what the LoRA changed that it should not have. The
model without the LoRA makes all of them from the same noise.
"""

from pathlib import Path

import numpy as np

from demos import concept, facts, world
from demos.generate import Videos, generate
from demos.score import attributes, score
from easyanimate_jax import Pipeline, TextEncoder, load_pipeline, open_loras
from easyanimate_jax.evaluation import web

PALETTE = world.COLOURS | world.NEW_COLOURS | world.BACKGROUNDS  # the last: without colour
SHOWN = 6  # videos of each kind on the page
KEPT = ("colour", "direction", "background")
FILE = "pink.safetensors"  # beside the run's folder, written by `convert`


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
                found = score(videos, prompts, PALETTE)
                results.setdefault(kind, {}).setdefault(name, {})[language] = found
                shown[f"{kind} colours, {language}, {name}"] = list(
                    zip(videos, texts, strict=True)
                )[:SHOWN]
                print(f"{kind} {name} {language}: {_brief(found)}", flush=True)
    results["spoiled"] = _spoiled(made["after", "old", "en"])
    results["file"] = _file_facts(encoder, run, tests["new"], made)
    return results, shown


def _spoiled(videos: Videos) -> float:
    """Return the share of videos of old colours that show a new one."""
    return float(np.mean([attributes(v, PALETTE).colour in world.NEW_COLOURS for v in videos]))


def _file_facts(encoder: TextEncoder, run: Pipeline, prompts, made: dict) -> dict:
    """Return figures of the exported file: its size, and whether it makes the run's videos."""
    folder, texts = Path(run.config.run).parent, [prompt.en for prompt in prompts]
    videos = {}
    for weight in (0.0, 1.0):
        loras = open_loras([(folder / FILE, weight)])
        model = load_pipeline(run.config.init, step=run.config.init_step, loras=loras)
        videos[weight] = generate(model, encoder, texts, samples=run.config.samples)
    merged = generate(load_pipeline(folder / "merged"), encoder, texts, samples=run.config.samples)
    size = lambda path: sum(p.stat().st_size for p in path.rglob("*.safetensors"))  # noqa: E731
    levels = lambda one, other: int(np.abs(one.astype(int) - other).max())  # noqa: E731
    whole = size(folder / "merged" / "transformer")
    return {
        "bytes": (folder / FILE).stat().st_size,
        "share of the model": (folder / FILE).stat().st_size / whole,
        "levels from the base at weight 0": levels(videos[0.0], made["before", "new", "en"]),
        "levels from the run at weight 1": levels(videos[1.0], made["after", "new", "en"]),
        "levels of merged weights from weight 1": levels(merged, videos[1.0]),
    }


def _brief(scores: dict) -> str:
    return "  ".join(f"{name} {scores[name]:.2f}" for name in KEPT)


def summary(results: dict) -> str:
    """Return the scores as a table for a terminal."""
    lines = [f"{name:<44}{_brief(scores)}" for name, scores in _groups(results).items()]
    lines += [f"{name}: {value:.4g}" for name, value in results["file"].items()]
    return "\n".join(
        [*lines, f"old colours that turned into the new one: {results['spoiled']:.2f}"]
    )


def _groups(results: dict) -> dict[str, dict]:
    return {
        f"{what}, {language}, {when} the LoRA": results[kind][name][language]
        for kind, what in (("new", "the new colour"), ("old", "the other colours"))
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
    more = results["file"] | {"old colours that turned into the new one": results["spoiled"]}
    return web.page(
        f"easyanimate_jax: {config.run}",
        [
            ("Scores", table),
            ("Loss", facts.loss_chart(config, rows)),
            ("Samples", videos),
            ("Facts", facts.fact_table(results, more)),
        ],
    )
