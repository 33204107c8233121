"""Score the emoji model without a learned judge, and write its page.

Retrieval: of all emoji in the training data, is the one that a prompt names the nearest to the
video? It is asked in the autoencoder's latents and in pixels, for trained captions and for held-out
wordings, in English and Chinese. By chance it is one of 2,109.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from demos import facts
from demos.generate import FOLLOWING, ROWS, psnr
from demos.score import motion
from easyanimate_jax import Pipeline, Request, Sampling, TextEncoder, denoise_latents
from easyanimate_jax.data.media import read_clip
from easyanimate_jax.data.records import Records
from easyanimate_jax.evaluation import web
from easyanimate_jax.generation.pipelines import image_to_video
from easyanimate_jax.generation.pixels import decode

DATA = Path("runs/emoji/data")
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
        frames = self.latents.shape[1] * 4 - 3
        return read_clip(self.folder / self.rows[row]["file_path"], 0, frames)

    def pixels(self) -> Float[np.ndarray, "N D"]:
        """Return all films in coarse pixels, one row each."""
        return np.stack([_coarse(self.film(row)) for row in range(len(self.rows))])


def _mean_of(records: Records, record: int) -> Float[np.ndarray, "T h w C"]:
    return records.cells(record)("latents")["latents"].astype(np.float32)


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


def evaluate(encoder: TextEncoder, run: Pipeline) -> tuple[dict, dict]:
    """Return (figures, {heading: (video, caption) pairs for the page})."""
    emoji = Emoji(Path("runs/emoji/latents/large"), DATA)
    asked = np.random.default_rng(SEED).permutation(len(emoji.rows))[:ASKED].tolist()
    flat, pixels = emoji.latents.reshape(len(emoji.rows), -1), emoji.pixels()
    results, shown = {"retrieval": {}, "of": len(emoji.rows), "asked": len(asked)}, {}
    for wording in WORDINGS:
        for language in LANGUAGES:
            texts = [emoji.rows[row][wording][language] for row in asked]
            latents, videos = make(run, encoder, texts)
            found = {
                "latents": _share(ranks(latents.reshape(len(asked), -1), flat, asked)),
                "pixels": _share(ranks(np.stack([*map(_coarse, videos)]), pixels, asked)),
            }
            moved = [motion(v) / motion(emoji.film(r)) for v, r in zip(videos, asked, strict=True)]
            found["motion"] = float(np.mean([0.5 <= ratio <= 2 for ratio in moved]))
            results["retrieval"][f"{wording} {language}"] = found
            shown[f"{wording} {language}"] = list(zip(videos, texts, strict=True))[: SHOWN // 4]
            print(f"{wording} {language}: {found}", flush=True)
    results["first_frame_psnr"], shown["image to video"] = _started(run, encoder, emoji, asked)
    return results, shown


def make(run: Pipeline, encoder: TextEncoder, texts: list[str], **given) -> tuple:
    """Return (latents, videos), one for each text, with consecutive seeds."""
    samples, sampling = run.samples, _sampling(run)
    latents, videos = [], []
    for first in range(0, len(texts), ROWS):
        rows = range(first, min(first + ROWS, len(texts)))
        request = Request(
            encoder.encode(texts[first : rows.stop]),
            encoder.encode([""]),
            size=(samples.frames, samples.height, samples.width),
            seeds=[SEED + row for row in rows],
            sampling=sampling,
        )
        latents.append(np.asarray(denoise_latents(run.diffusion, request)))
        videos.append(decode(run.vae, latents[-1]))
    return np.concatenate(latents), np.concatenate(videos)


def _sampling(run: Pipeline) -> Sampling:
    """Return how the model is sampled: a run as its own samples, a folder as it says itself."""
    own = run.samples if run.config else run.defaults
    return Sampling(own.steps, own.guidance, times=getattr(own, "times", ()))


def _share(found: np.ndarray) -> dict[str, float]:
    return {f"top-{top}": float((found < top).mean()) for top in TOP}


def _started(run: Pipeline, encoder: TextEncoder, emoji: Emoji, asked: list[int]) -> tuple:
    """Return (the first frames' PSNR to the pictures that were given, shown videos)."""
    rows, errors, shown = asked[:STARTED], [], []
    samples = run.samples
    for first in range(0, len(rows), ROWS):
        some = rows[first : first + ROWS]
        texts = [emoji.rows[row]["trained"]["en"] for row in some]
        start = np.stack([emoji.film(row)[0] for row in some])
        request = Request(
            encoder.encode(texts),
            encoder.encode([""]),
            size=(samples.frames, samples.height, samples.width),
            seeds=[SEED + row for row in range(len(some))],
            sampling=replace(_sampling(run), guidance=FOLLOWING),
        )
        videos = image_to_video(run.diffusion, request, start=start)
        errors += [psnr([video[0]], [given]) for video, given in zip(videos, start, strict=True)]
        shown += list(zip(videos, texts, strict=True))
    return float(np.mean(errors)), shown[:16]


def summary(results: dict) -> str:
    """Return the figures as lines of text."""
    lines = [
        f"{name}: latents {found['latents']['top-1']:.2f} / {found['latents']['top-5']:.2f}, "
        f"pixels {found['pixels']['top-1']:.2f} / {found['pixels']['top-5']:.2f}, "
        f"motion {found['motion']:.2f}"
        for name, found in results["retrieval"].items()
    ]
    return "\n".join([*lines, f"first frame {results['first_frame_psnr']:.1f} dB"])


def page(config, results: dict, shown: dict, rows: list[dict]) -> str:
    """Return the page of the report."""
    header = ["captions", "latents top-1", "top-5", "pixels top-1", "top-5", "motion"]
    table = [
        [
            name,
            *(
                f"{found[where][f'top-{top}']:.2f}"
                for where in ("latents", "pixels")
                for top in TOP
            ),
            f"{found['motion']:.2f}",
        ]
        for name, found in results["retrieval"].items()
    ]
    chance = web.note(
        f"The nearest of {results['of']} emoji is the one that the caption names; of "
        f"{results['asked']} captions a row. By chance 0.0005. Motion: share of videos with 0.5 to "
        f"2 times the real film's. First frame of image to video: "
        f"{results['first_frame_psnr']:.1f} dB."
    )
    sections = [("Retrieval", chance + web.table(header, table))]
    sections += [
        (name, "".join(web.video(video, text) for video, text in pairs))
        for name, pairs in shown.items()
    ]
    sections.append(("Training", facts.loss_chart(config, rows) + facts.stage_table(results)))
    return web.page("The emoji model", sections)
