"""Score a run on the captioned world, and write the report page.

`score.py` compares videos of seen and held-out prompts, in English and Chinese, with their prompts.
The scores of true clips and of their VAE reconstructions are upper limits; chance levels are shown
beside them.
"""

from pathlib import Path

import numpy as np

from demos import facts, world
from demos.generate import FOLLOWING, generate, psnr, reconstruct
from demos.score import CHANCE, first_frame_error, motion, score
from easyanimate_jax import Pipeline, TextEncoder, image_to_video
from easyanimate_jax.evaluation import web

COUNTS = {"seen": 32, "heldout": 96}  # prompts per language, whole groups of `ROWS`
SHOWN = 6  # sample videos of each kind on the page
NAMES = ("colour", "background", "direction", "speed", "shape", "joint")


def evaluate(encoder: TextEncoder, run: Pipeline) -> tuple[dict, dict]:
    """Return (scores, {kind of video: (video, caption) pairs for the page})."""
    samples = run.config.samples
    results, shown = {"scores": {}, "chance": CHANCE}, {}
    for split, group in (("seen", results["scores"]), ("heldout", {})):
        prompts = world.prompts(split, COUNTS[split], seed=samples.seed)
        for language in ("en", "zh"):
            texts = [getattr(p, language) for p in prompts]
            videos = generate(run, encoder, texts)
            group[language] = score(videos, prompts)
            shown[f"{split}, {language}"] = list(zip(videos, texts, strict=True))[:SHOWN]
            print(f"{split} {language}: {brief(group[language])}", flush=True)
        if split == "heldout":
            results["scores"]["heldout"] = group

    texts = [p.en for p in prompts]
    truth, _ = world.clips(prompts, samples.frames, samples.height, samples.width, samples.seed)
    results["ground_truth"] = score(truth, prompts)
    rebuilt = reconstruct(run.vae, truth)
    results["vae_ceiling"] = score(rebuilt, prompts) | {"psnr": psnr(truth, rebuilt)}
    shown["VAE reconstruction"] = list(zip(rebuilt, texts, strict=True))[:SHOWN]

    videos = generate(run, encoder, texts, image_to_video, {"start": truth[:, 0]}, FOLLOWING)
    errors = [first_frame_error(v, t[0]) for v, t in zip(videos, truth, strict=True)]
    results["i2v"] = score(videos, prompts) | {
        "first_frame_error": float(np.mean(errors)),
        "motion": float(np.mean([motion(v) for v in videos])),
        "motion_of_truth": float(np.mean([motion(v) for v in truth])),
    }
    shown["image to video"] = list(zip(videos, texts, strict=True))[:SHOWN]
    print(f"image to video: {brief(results['i2v'])}", flush=True)
    return results, shown


def brief(scores: dict) -> str:
    """Return the scores of all attributes in one line."""
    return "  ".join(f"{name} {scores[name]:.2f}" for name in NAMES)


def summary(results: dict) -> str:
    """Return the scores as a table for a terminal."""
    lines = [f"{name:<32}{brief(scores)}" for name, scores in _groups(results).items()]
    lines.append(f"first-frame error of image to video: {results['i2v']['first_frame_error']:.4f}")
    return "\n".join(lines)


def page(config, results: dict, shown: dict, rows: list[dict]) -> str:
    """Return the report as one HTML page."""
    table = web.table(
        ["", *NAMES],
        [[name, *(scores[n] for n in NAMES)] for name, scores in _groups(results).items()],
    )
    more = {
        "first-frame error of image to video": results["i2v"]["first_frame_error"],
        "its motion / that of real clips": results["i2v"]["motion"]
        / results["i2v"]["motion_of_truth"],
        "VAE PSNR on held-out clips, dB": results["vae_ceiling"]["psnr"],
    }
    videos = "".join(
        f"<h3>{name}</h3>" + "".join(web.video(clip, text) for clip, text in clips)
        for name, clips in shown.items()
    )
    curve, strips = _over_time(config)
    return web.page(
        f"easyanimate_jax: {config.run}",
        [
            ("Scores", table),
            ("Loss", facts.loss_chart(config, rows)),
            ("Stages", facts.stage_table(results)),
            ("Score of the run's own samples over steps", curve),
            ("The same prompts and noise over time", strips),
            ("Samples", videos),
            ("Facts", facts.fact_table(results, more)),
        ],
    )


def _groups(results: dict) -> dict[str, dict]:
    scores = results["scores"]
    return {
        "English": scores["en"],
        "Chinese": scores["zh"],
        "English, held-out combinations": scores["heldout"]["en"],
        "Chinese, held-out combinations": scores["heldout"]["zh"],
        "image to video": results["i2v"],
        "VAE reconstruction (ceiling)": results["vae_ceiling"],
        "ground truth (verifier)": results["ground_truth"],
        "chance": results["chance"],
    }


def _over_time(config) -> tuple[str, str]:
    """Return HTML of the score of the run's own samples over steps, and of their middle frames."""
    files = sorted((Path(config.run) / "samples").glob("*.npz"))
    files = [path for path in files if path.stem.isdigit()]  # of prompts, not of held-out clips
    if not files:
        return web.note("the run wrote no samples"), ""
    prompts = [world.by_text()[text] for text in config.samples.prompts]
    steps = [int(path.stem) for path in files]
    clips = [np.load(path)["videos"] for path in files]
    scores = [score(videos, prompts) for videos in clips]
    curve = web.line_chart(
        {name: (steps, [s[name] for s in scores]) for name in NAMES},
        x_label="step",
        y_range=(0.0, 1.0),
    )
    strips = [
        web.picture(np.concatenate([v[i][len(v[i]) // 2] for v in clips], axis=1), text, 0.75)
        for i, text in enumerate(config.samples.prompts)
    ]
    return curve, "<br>".join(strips)
