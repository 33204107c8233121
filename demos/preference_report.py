"""Score a model before and after it learned from ratings, and write the page.

Both make videos of the same held-out prompts from the same noise, in the few steps of the model
that the run began from. The verifier (`verifier.py`) is exact; the judge (`judge.py`) is the smooth
reward of `make demo-reward`. If the judge's reward rises and the verifier's rating does not, the
model cheats the judge. The ratio of edges tells whether videos became softer or noisier.
"""

import jax
import numpy as np

from demos import facts, judge, verifier, world
from demos.generate import ROWS, Videos, generate
from demos.score import edge_energy, motion, score
from demos.world_report import NAMES
from easyanimate_jax import Pipeline, Sampling, TextEncoder
from easyanimate_jax.evaluation import web
from easyanimate_jax.weights.defaults import Defaults

PROMPTS, SHOWN = 96, 6
CURVES = ("reward", "distance", "margin", "accuracy", "better_change", "worse_change")
BEFORE, AFTER = "before", "after"


def evaluate(encoder: TextEncoder, run: Pipeline, base: Pipeline) -> tuple[dict, dict]:
    """Return (figures, {language: (film of both videos, caption) pairs for the page}).

    Both are sampled as a distilled base is, else in the config's steps and guidance.
    """
    samples, weights = run.config.samples, judge.load()
    own = base.defaults if base.defaults.times else Defaults(samples.steps, samples.guidance)
    sampling = Sampling(**own.filled())
    prompts = world.prompts("heldout", PROMPTS, samples.seed)
    results, shown = {}, {}
    for language in ("en", "zh"):
        texts, found = [getattr(prompt, language) for prompt in prompts], {}
        for name, model in ((BEFORE, base), (AFTER, run)):
            videos = generate(model, encoder, texts, samples=samples, sampling=sampling)
            found[name] = videos, verifier.rate(videos, texts)
            row = score(videos, prompts) | _judged(weights, encoder, videos, texts)
            row |= {"rating": float(found[name][1].mean()), "edges": edge_energy(videos)}
            row["motion"] = float(np.mean([motion(video) for video in videos]))
            results.setdefault(language, {})[name] = row
            print(f"{language} {name}: {_brief(row)}", flush=True)
        results[language] |= compared(*found[BEFORE], *found[AFTER])
        shown[language] = _films(found, texts)
    return results, shown


def compared(before: Videos, old, after: Videos, new) -> dict[str, float]:
    """Return the win rate of ratings, the mean change and its standard error, and edges' ratio.

    `old` and `new` are the ratings (B,) of the videos `before` and `after`. A tie is half a win.
    """
    change = np.asarray(new) - np.asarray(old)
    return {
        "wins": float(np.mean((change > 0) + (change == 0) / 2)),
        "change": float(change.mean()),
        "error of the change": float(change.std(ddof=1) / len(change) ** 0.5),
        "edges after / before": edge_energy(after) / edge_energy(before),
    }


def _judged(weights, encoder: TextEncoder, videos: Videos, texts: list[str]) -> dict:
    """Return the judge's mean reward and its mean components."""
    program, found = jax.jit(judge.components), []
    for first in range(0, len(texts), ROWS):
        rows = slice(first, first + ROWS)
        states = tuple(encoder.encode(texts[rows]))
        found.append(program(weights, judge.as_frames(videos[rows]), states))
    means = {name: float(np.mean([part[name].mean() for part in found])) for name in judge.NAMES}
    total = sum(weight * means[name] for name, weight in judge.WEIGHTS.items())
    return {"reward": total, "components": means}


def _films(found: dict, texts: list[str]) -> list[tuple[np.ndarray, str]]:
    """Return films with the video before on the left and the video after on the right."""
    (before, old), (after, new) = found[BEFORE], found[AFTER]
    return [
        (np.concatenate([a, b], axis=2), f"{text}: {one:.2f}, {other:.2f}")
        for a, b, text, one, other in zip(before, after, texts, old, new, strict=True)
    ][:SHOWN]


def _brief(row: dict) -> str:
    parts = [f"{name} {row[name]:.2f}" for name in (*NAMES, "rating")]
    return "  ".join([*parts, f"judge's reward {row['reward']:.2f}"])


def summary(results: dict) -> str:
    """Return the figures as a table for a terminal."""
    lines = [f"{name:<16}{_brief(row)}" for name, row in _groups(results).items()]
    lines += [f"{name}: {value:.3g}" for name, value in _more(results).items()]
    return "\n".join(lines)


def _groups(results: dict) -> dict[str, dict]:
    return {
        f"{language}, {name}": results[language][name]
        for language in ("en", "zh")
        for name in (BEFORE, AFTER)
    }


def _more(results: dict) -> dict:
    return {
        f"{name}, {language}": value
        for language in ("en", "zh")
        for name, value in results[language].items()
        if name not in (BEFORE, AFTER)
    }


def page(config, results: dict, shown: dict, rows: list[dict]) -> str:
    """Return the report as one HTML page; both videos of a film start from the same noise."""
    groups, columns = _groups(results), (*NAMES, "rating", "motion")
    scores = web.table(
        ["", *columns], [[name, *(row[n] for n in columns)] for name, row in groups.items()]
    )
    judged = web.table(
        ["", "reward", *judge.NAMES],
        [[name, row["reward"], *row["components"].values()] for name, row in groups.items()],
    )
    films = "".join(
        f"<h3>{language}: before and after, with their ratings</h3>"
        + "".join(web.video(film, text) for film, text in pairs)
        for language, pairs in shown.items()
    )
    return web.page(
        f"easyanimate_jax: {config.run}",
        [
            ("Scores and the verifier's rating", scores),
            ("The judge's reward and its components", judged),
            ("The run", _curves(rows)),
            ("Loss", facts.loss_chart(config, rows)),
            ("Samples", films),
            ("Facts", facts.fact_table(results, _more(results))),
        ],
    )


def _curves(rows: list[dict]) -> str:
    """Return a chart over steps of each metric in `CURVES` that the run has."""
    charts = []
    for name in CURVES:
        if known := [row for row in rows if name in row]:
            values = web.smooth([row[name] for row in known], facts.SMOOTH)
            label = f"{name}, mean of {facts.SMOOTH} steps"
            series = {label: ([row["step"] for row in known], values)}
            charts.append(web.line_chart(series, x_label="step"))
    return "".join(charts)
