"""Score a run on the captioned world and write its report:

    python -m easyanimate_jax.evaluation CONFIG [--field value ...]

Videos are generated for seen and held-out prompts in English and Chinese and compared with their
prompts in closed form (`score.py`); the same score on ground truth and on VAE reconstructions says
what the score itself and the VAE allow. Writes `report.json` and `report.html` beside the run.
"""

import json
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from easyanimate_jax.config import TrainConfig, load
from easyanimate_jax.evaluation import report, world
from easyanimate_jax.evaluation.score import CHANCE, first_frame_error, motion, score
from easyanimate_jax.pipelines import image_to_video, text_to_video
from easyanimate_jax.runs import Run, load_run
from easyanimate_jax.text.encode import TextEncoder
from easyanimate_jax.training.stages import boundaries

COUNT = 96  # prompts per language and split
SHOWN = 6  # sample videos of each kind on the page
ROWS = 32  # videos generated at once


def main(args: list[str]) -> int:
    if not args or args[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    config = load(args[0], args[1:])
    run = load_run(config.run)
    encoder = TextEncoder.load(config.text)
    began = time.time()
    results, shown = evaluate(run, encoder, Path(config.source) / "heldout")
    folder = Path(config.run)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results |= training_facts(config, rows) | {"evaluation_seconds": round(time.time() - began, 1)}
    root = folder.parent
    started = root / "started"
    if started.is_file():
        results["seconds"] = round(time.time() - float(started.read_text()))
    (root / "report.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (root / "report.html").write_text(html(config, results, shown, rows), encoding="utf-8")
    print(summary(results))
    print(f"{root / 'report.html'}")
    return 0


def evaluate(run: Run, encoder: TextEncoder, heldout: Path) -> tuple[dict, dict]:
    """(the scores, the videos that the page shows)."""
    samples = run.config.samples
    size = {"frames": samples.frames, "height": samples.height, "width": samples.width}
    results = {"scores": {}, "chance": CHANCE}
    shown = {}
    for split, group in (("seen", results["scores"]), ("heldout", {})):
        prompts = world.prompts(split, COUNT, seed=samples.seed)
        for language in ("en", "zh"):
            texts = [getattr(p, language) for p in prompts]
            videos = generate(run, encoder, texts)
            group[language] = score(videos, prompts)
            shown[f"{split}, {language}"] = [*zip(videos[:SHOWN], texts[:SHOWN], strict=True)]
            print(f"{split} {language}: {brief(group[language])}", flush=True)
        if split == "heldout":
            results["scores"]["heldout"] = group

    truth = [world_clip(prompt, size, seed) for seed, prompt in enumerate(prompts)]
    results["ground_truth"] = score(truth, prompts)
    rebuilt = reconstruct(run, truth)
    results["vae_ceiling"] = score(rebuilt, prompts) | {"psnr": psnr(truth, rebuilt)}
    shown["VAE reconstruction"] = [(v, p.en) for v, p in zip(rebuilt, prompts, strict=True)][:SHOWN]

    firsts = np.stack([clip[0] for clip in truth])
    videos = generate(run, encoder, [p.en for p in prompts], start=firsts)
    errors = [first_frame_error(v, image) for v, image in zip(videos, firsts, strict=True)]
    results["i2v"] = score(videos, prompts) | {
        "first_frame_error": float(np.mean(errors)),
        "motion": float(np.mean([motion(v) for v in videos])),
        "motion_of_truth": float(np.mean([motion(v) for v in truth])),
    }
    shown["image to video"] = [(v, p.en) for v, p in zip(videos, prompts, strict=True)][:SHOWN]
    return results, shown


def generate(run: Run, encoder: TextEncoder, texts: list[str], start=None) -> np.ndarray:
    """One video per text at the config's sample size, with consecutive seeds."""
    samples, videos = run.config.samples, []
    empty = encoder.encode([""])
    options = {
        "frames": samples.frames,
        "height": samples.height,
        "width": samples.width,
        "steps": samples.steps,
        "guidance": samples.guidance,
    }
    for first in range(0, len(texts), ROWS):
        rows = slice(first, first + ROWS)
        seeds = [samples.seed + i for i in range(len(texts))[rows]]
        states = encoder.encode(texts[rows])
        if start is None:
            pipeline, pictures = text_to_video, {}
        else:
            pipeline, pictures = image_to_video, {"start": start[rows]}
        videos.append(
            pipeline(
                run.model,
                run.vae,
                run.config.process,
                states,
                empty,
                seeds=seeds,
                **pictures,
                **options,
            )
        )
    return np.concatenate(videos)


def world_clip(prompt: world.Prompt, size: dict, seed: int) -> np.ndarray:
    """Ground truth for a prompt at the sample size."""
    rng = np.random.default_rng((seed, 5))
    return world.render(prompt.attributes, size["frames"], size["height"], size["width"], rng)


def reconstruct(run: Run, videos: list[np.ndarray]) -> list[np.ndarray]:
    """Videos through the VAE and back."""
    program = jax.jit(lambda vae, x: vae.decode(vae.encode(x)[0]))
    out = []
    for first in range(0, len(videos), ROWS):
        pixels = np.stack(videos[first : first + ROWS]).astype(np.float32) / 127.5 - 1
        pixels = np.asarray(program(run.vae, pixels))
        out += list(((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8))
    return out


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio in dB over all frames."""
    error = np.mean(
        [np.mean((np.float32(x) - np.float32(y)) ** 2) for x, y in zip(a, b, strict=True)]
    )
    return float(20 * math.log10(255) - 10 * math.log10(max(error, 1e-9)))


def training_facts(config: TrainConfig, rows: list[dict]) -> dict:
    """What the metrics file says of the schedule."""
    facts = json.loads((Path(config.run) / "summary.json").read_text())
    stages = {}
    for stage in config.stages:
        losses = [row["loss"] for row in rows if row["stage"] == stage.name]
        tenth = max(1, len(losses) // 10)
        stages[stage.name] = {
            "steps": len(losses),
            "loss_start": float(np.mean(losses[:tenth])),
            "loss_end": float(np.mean(losses[-tenth:])),
            "seconds": round(sum(row["seconds"] for row in rows if row["stage"] == stage.name), 1),
        }
    vae = Path(config.vae) / "vae_report.json"
    return {
        "stages": stages,
        "token_efficiency": sum(r["real_tokens"] for r in rows) / sum(r["tokens"] for r in rows),
        "compiled_train_programs": facts["compiled_train_programs"],
        "bucket_task_pairs": len({(row["bucket"], row["task"]) for row in rows}),
        "training_seconds": round(facts["seconds"], 1),
        "vae": json.loads(vae.read_text()) if vae.is_file() else None,
        "seed": config.seed,
        "versions": {n: version(n) for n in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
    }


def brief(scores: dict) -> str:
    names = ("colour", "background", "direction", "speed", "shape", "joint")
    return "  ".join(f"{name} {scores[name]:.2f}" for name in names)


def summary(results: dict) -> str:
    """The scores as a table for a terminal."""
    groups = {
        "English": results["scores"]["en"],
        "Chinese": results["scores"]["zh"],
        "English, held out": results["scores"]["heldout"]["en"],
        "Chinese, held out": results["scores"]["heldout"]["zh"],
        "image to video": results["i2v"],
        "VAE reconstruction": results["vae_ceiling"],
        "ground truth": results["ground_truth"],
        "chance": results["chance"],
    }
    lines = [f"{name:<20}{brief(scores)}" for name, scores in groups.items()]
    lines.append(f"first-frame error of image to video {results['i2v']['first_frame_error']:.4f}")
    return "\n".join(lines)


def html(config: TrainConfig, results: dict, shown: dict, rows: list[dict]) -> str:
    """The report as one page."""
    ends = [0, *boundaries(config.stages)]
    bands = [(a, b, s.name) for a, b, s in zip(ends, ends[1:], config.stages, strict=True)]
    steps = [row["step"] for row in rows]
    loss = {"loss (mean of 25 steps)": (steps, report.smooth([row["loss"] for row in rows], 25))}
    names = ("colour", "background", "direction", "speed", "shape", "joint")

    def row(name, scores):
        return [name, *(scores[n] for n in names)]

    scores = results["scores"]
    table = report.table(
        ["", *names],
        [
            row("English", scores["en"]),
            row("Chinese", scores["zh"]),
            row("English, held-out combinations", scores["heldout"]["en"]),
            row("Chinese, held-out combinations", scores["heldout"]["zh"]),
            row("image to video", results["i2v"]),
            row("VAE reconstruction (the ceiling)", results["vae_ceiling"]),
            row("ground truth (the verifier)", results["ground_truth"]),
            row("chance", results["chance"]),
        ],
    )
    stages = report.table(
        ["stage", "steps", "loss at start", "loss at end", "seconds"],
        [[name, *facts.values()] for name, facts in results["stages"].items()],
    )
    curve, strips = over_time(config)
    facts = {
        "token efficiency": results["token_efficiency"],
        "compiled train programs": results["compiled_train_programs"],
        "distinct (bucket, task) pairs": results["bucket_task_pairs"],
        "first-frame error of image to video": results["i2v"]["first_frame_error"],
        "motion of image to video / of real clips": results["i2v"]["motion"]
        / results["i2v"]["motion_of_truth"],
        "VAE PSNR on held-out clips, dB": results["vae_ceiling"]["psnr"],
        "training seconds": results["training_seconds"],
        "seconds in all": results.get("seconds", "not measured"),
        **results["versions"],
        "machine": results["machine"],
    }
    videos = "".join(
        f"<h3>{name}</h3>" + "".join(report.video(clip, text) for clip, text in clips)
        for name, clips in shown.items()
    )
    return report.page(
        f"easyanimate_jax: {config.run}",
        [
            ("Scores", table),
            ("Loss", report.line_chart(loss, x_label="step", bands=bands)),
            ("Stages", stages),
            ("Score over steps", curve),
            ("The same prompts and noise over time", strips),
            ("Samples", videos),
            ("Facts", report.table(["", ""], list(facts.items()))),
        ],
    )


def over_time(config: TrainConfig) -> tuple[str, str]:
    """(score of the run's own samples over steps, their middle frames as strips)."""
    files = sorted((Path(config.run) / "samples").glob("*.npz"))
    if not files:
        return report.note("the run wrote no samples"), ""
    known = {text: p for p in world.every_prompt() for text in (p.en, p.zh)}
    prompts = [known[text] for text in config.samples.prompts]
    steps = [int(path.stem) for path in files]
    clips = [np.load(path)["videos"] for path in files]
    scores = [score(list(videos), prompts) for videos in clips]
    names = ("colour", "background", "direction", "joint")
    curve = report.line_chart(
        {name: (steps, [s[name] for s in scores]) for name in names},
        x_label="step",
        y_range=(0.0, 1.0),
    )
    strips = [
        report.picture(np.concatenate([v[i][len(v[i]) // 2] for v in clips], axis=1), text, 0.75)
        for i, text in enumerate(config.samples.prompts[:SHOWN])
    ]
    return curve, "<br>".join(strips)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
