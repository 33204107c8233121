"""Write the emoji model as it comes with the package, score it, and write its card and its page.

    python -m demos.emoji_report configs/emoji.py easyanimate_jax/pretrained/emoji

converts the run of the config to bfloat16 and scores the result, without a learned judge.

Retrieval: of all emoji in the training data, is the one that a prompt names the nearest to the
video? It is asked in the autoencoder's latents and in pixels, for trained captions and for held-out
wordings, in English and Chinese. By chance it is one of 2,109.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import Float
from PIL import Image

from demos import facts
from demos.emoji import FRAMES
from demos.generate import FOLLOWING, ROWS, psnr
from demos.score import motion
from easyanimate_jax import Pipeline, Request, Sampling, denoise_latents, load_config, load_pipeline
from easyanimate_jax.commands.jax_settings import set_up_jax
from easyanimate_jax.data.media import read_clip
from easyanimate_jax.data.records import Records
from easyanimate_jax.evaluation import web
from easyanimate_jax.generation.pipelines import image_to_video
from easyanimate_jax.generation.pixels import decode
from easyanimate_jax.models.mmdit import patchify
from easyanimate_jax.weights.conversion import Options, convert
from easyanimate_jax.weights.defaults import FILE, Defaults
from easyanimate_jax.weights.identity import fingerprint

DECODER = "runs/emoji/decoder"  # of configs/emoji_decoder_vae.py
CARD = Path(__file__).parent / "emoji_card.md"
ASKED = 128  # emoji, each in every wording and language
STARTED = 48  # emoji whose first frame is given
SHOWN = 64  # unchosen videos on the page
WORDINGS, LANGUAGES = ("trained", "held_out"), ("en", "zh")
COARSE = 2  # pixels a side that count as one for the distance in pixels
TOP = (1, 5)
SEED = 43


class Emoji:
    """All films of the training data: names, latents and pixels."""

    def __init__(self, prepared: Path, data: Path):
        records = Records(prepared)
        self.rows = json.loads((data / "wordings.json").read_text("utf-8"))
        number = {name: i for i, name in enumerate(records.index["clip"])}
        self.records = [number[row["file_path"]] for row in self.rows]
        self.latents = np.stack([_mean_of(records, record) for record in self.records])
        self.folder = data / "large"

    def film(self, row: int) -> np.ndarray:
        """Return a film, uint8 (F, H, W, 3)."""
        return read_clip(self.folder / self.rows[row]["file_path"], 0, FRAMES)

    def pixels(self) -> Float[np.ndarray, "N D"]:
        """Return all films in coarse pixels, one row each."""
        return np.stack([_coarse(self.film(row)) for row in range(len(self.rows))])


def _mean_of(records: Records, record: int) -> Float[np.ndarray, "D"]:
    return records.cells(record)("latents")["mean"].astype(np.float32).ravel()


def _coarse(film: np.ndarray) -> Float[np.ndarray, "D"]:
    frames, height, width, channels = film.shape
    blocks = film.reshape(frames, height // COARSE, COARSE, width // COARSE, COARSE, channels)
    return np.float32(blocks.mean(axis=(2, 4), dtype=np.float32)).ravel() / 255


def ranks(
    made: Float[np.ndarray, "B D"], known: Float[np.ndarray, "N D"], asked: list[int]
) -> np.ndarray:
    """Return for each made row how many known rows are nearer to it than the one asked for."""
    distances = (known**2).sum(1) - 2 * made @ known.T
    own = distances[np.arange(len(asked)), asked]
    return (distances < own[:, None]).sum(1)


def evaluate(model: Pipeline, emoji: Emoji) -> tuple[dict, dict]:
    """Return (figures, {heading: (video, caption) pairs for the page})."""
    asked = np.random.default_rng(SEED).permutation(len(emoji.rows))[:ASKED].tolist()
    pixels = emoji.pixels()
    results, shown = {"retrieval": {}, "of": len(emoji.rows), "asked": len(asked)}, {}
    for wording in WORDINGS:
        for language in LANGUAGES:
            texts = [emoji.rows[row][wording][language] for row in asked]
            latents, videos = make(model, texts)
            found = {
                "latents": _share(ranks(latents, emoji.latents, asked)),
                "pixels": _share(ranks(np.stack([*map(_coarse, videos)]), pixels, asked)),
            }
            moved = [motion(v) / motion(emoji.film(r)) for v, r in zip(videos, asked, strict=True)]
            found["motion"] = float(np.mean([0.5 <= ratio <= 2 for ratio in moved]))
            results["retrieval"][f"{wording} {language}"] = found
            shown[f"{wording} {language}"] = list(zip(videos, texts, strict=True))[: SHOWN // 4]
            print(f"{wording} {language}: {found}", flush=True)
    results["first_frame_psnr"], shown["image to video"] = _started(model, emoji, asked)
    return results, shown


def make(model: Pipeline, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (latents as rows, videos), one for each text, with consecutive seeds."""
    latents, videos = [], []
    for first in range(0, len(texts), ROWS):
        request = _request(model, texts[first : first + ROWS], SEED + first)
        made = denoise_latents(model.diffusion, request)
        latents.append(np.asarray(patchify(made)).reshape(len(made), -1))
        videos.append(decode(model.vae, made))
    return np.concatenate(latents), np.concatenate(videos)


def _request(
    model: Pipeline, texts: list[str], seed: int, guidance: float | None = None
) -> Request:
    samples, own = model.samples, model.defaults
    guidance = own.guidance if guidance is None else guidance
    return Request(
        model.encoder.encode(texts),
        model.encoder.encode([""]),
        size=(samples.frames, samples.height, samples.width),
        seeds=[seed + row for row in range(len(texts))],
        sampling=Sampling(own.steps, guidance, times=own.times),
    )


def _share(found: np.ndarray) -> dict[str, float]:
    return {f"top-{top}": float((found < top).mean()) for top in TOP}


def _started(model: Pipeline, emoji: Emoji, asked: list[int]) -> tuple:
    """Return (the first frames' PSNR to the pictures that were given, shown videos)."""
    errors, shown = [], []
    for first in range(0, STARTED, ROWS):
        rows = asked[first : min(first + ROWS, STARTED)]
        texts = [emoji.rows[row]["trained"]["en"] for row in rows]
        start = np.stack([emoji.film(row)[0] for row in rows])
        request = _request(model, texts, SEED, FOLLOWING)
        videos = image_to_video(model.diffusion, request, start=start)
        errors += [psnr([video[0]], [given]) for video, given in zip(videos, start, strict=True)]
        shown += list(zip(videos, texts, strict=True))
    return float(np.mean(errors)), shown[: SHOWN // 4]


def page(config, results: dict, shown: dict, rows: list[dict]) -> str:
    """Return the page of the report."""
    about = web.note(
        f"The nearest of {results['of']} emoji is the one that the caption names; "
        f"{results['asked']} captions a row, by chance 0.0005. Motion: share of videos with 0.5 to "
        f"2 times the real film's. First frame of image to video: "
        f"{results['first_frame_psnr']:.1f} dB."
    )
    sections = [("Retrieval", about + web.table(*_table(results)))]
    sections += [
        (name, "".join(web.video(video, text) for video, text in pairs))
        for name, pairs in shown.items()
    ]
    sections.append(("Training", facts.loss_chart(config, rows) + facts.stage_table(results)))
    return web.page("The emoji model", sections)


def _table(results: dict) -> tuple[list[str], list[list[str]]]:
    header = ["captions", "latents: first", "in 5", "pixels: first", "in 5", "motion"]
    rows = []
    for name, found in results["retrieval"].items():
        shares = [found[where][f"top-{top}"] for where in ("latents", "pixels") for top in TOP]
        shares.append(found["motion"])
        rows.append([name.replace("_", "-"), *(f"{share:.2f}" for share in shares)])
    return header, rows


def card(config, results: dict, prints: dict[str, str], size: int) -> str:
    """Return the model card, Markdown."""
    header, rows = _table(results)
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    stages = "\n".join(
        f"| {stage.name} | {stage.steps:,} | {stage.batch_size} | {stage.task} |"
        for stage in config.stages
    )
    fields = {
        "table": table,
        "stages": stages,
        "asked": results["asked"],
        "megabytes": f"{size / 1e6:.1f}",
        "first": f"{results['first_frame_psnr']:.1f}",
        "vae": f"{json.loads((Path(DECODER) / 'vae_report.json').read_text())['psnr']:.1f}",
        "minutes": round(sum(s["seconds"] for s in results["stages"].values()) / 60),
        "prints": "\n".join(f"| {name} | `{value}` |" for name, value in prints.items()),
        "versions": ", ".join(f"{name} {value}" for name, value in results["versions"].items()),
        "steps": config.samples.steps,
        "guidance": config.samples.guidance,
        "size": f"{config.samples.frames} frames of {config.samples.height} x "
        f"{config.samples.width} pixels",
    }
    return CARD.read_text("utf-8").format(**fields)


def write_model(config, target: Path) -> None:
    """Convert the run of `config` to bfloat16 in `target`, with its own way of sampling.

    The autoencoder is the one whose decoder was trained further.
    """
    samples, options = config.samples, Options("jax", dtype="bfloat16")
    convert(Path(config.run), target, options)
    shutil.rmtree(target / "vae")
    convert(Path(DECODER), target / "vae", options)
    own = Defaults(samples.steps, samples.guidance)
    size = samples.frames, samples.height, samples.width
    (target / FILE).write_text(own.text(size), "utf-8")


def grid(shown: dict) -> np.ndarray:
    """Return the middle frames of all shown videos of words, 16 in a row."""
    videos = [video for name, pairs in shown.items() for video, _ in pairs if "image" not in name]
    frames = np.stack([video[len(video) // 2] for video in videos])
    count = len(frames) // 16 * 16
    return rearrange(frames[:count], "(rows columns) h w c -> (rows h) (columns w) c", columns=16)


def main(args: list[str]) -> int:
    """Write the model, its scores, its card and its page; return the exit code."""
    if len(args) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    config, target = load_config(args[0]), Path(args[1])
    set_up_jax()
    write_model(config, target)
    emoji = Emoji(Path(config.prepared) / config.stages[-1].data, Path(config.source).parent)
    results, shown = evaluate(load_pipeline(target), emoji)
    metrics = facts.read_metrics(config)
    results |= facts.training_facts(config, metrics)
    root = Path(config.run).parent
    (root / "report.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (root / "report.html").write_text(page(config, results, shown, metrics), "utf-8")
    Image.fromarray(grid(shown)).save(target / "samples.webp", quality=80)
    parts = sorted(path.name for path in target.iterdir() if path.is_dir())
    prints = {name: fingerprint(target / name) for name in parts if (target / name).is_dir()}
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    (target / "README.md").write_text(card(config, results, prints, size), "utf-8")
    print(f"{root / 'report.html'}\n{target / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
