"""Report on real footage that a run did not train on: originals, reconstructions, generations."""

from pathlib import Path

import numpy as np

from demos import facts
from demos.generate import FOLLOWING, generate, psnr, reconstruct
from demos.score import motion
from easyanimate_jax import Pipeline, TextEncoder, image_to_video
from easyanimate_jax.data import media
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.evaluation import web

SCALE = 1.5  # of the videos on the page


def evaluate(encoder: TextEncoder, run: Pipeline) -> tuple[dict, dict]:
    """Return (figures, {caption of a held-out clip: its (video, label) pairs for the page})."""
    samples = run.config.samples
    clips, _ = read_clips(Path(run.config.source) / "heldout")
    truth = np.stack(
        [
            media.resize_crop(
                media.read_clip(clip.path, 0, samples.frames), samples.height, samples.width
            )
            for clip in clips
        ]
    )
    rebuilt = reconstruct(run.vae, truth)
    captions = [clip.captions[i % len(clip.captions)] for i, clip in enumerate(clips)]
    start = {"start": truth[:, 0]}
    continued = generate(run, encoder, captions, image_to_video, start, FOLLOWING)
    imagined = generate(run, encoder, captions)
    results = {
        "clips": len(clips),
        "vae_psnr": psnr(truth, rebuilt),
        "i2v_first_frame_psnr": psnr(truth[:, 0], continued[:, 0]),
        "motion_of_truth": float(np.mean([motion(v) for v in truth])),
        "motion_of_i2v": float(np.mean([motion(v) for v in continued])),
        "motion_of_t2v": float(np.mean([motion(v) for v in imagined])),
    }
    shown = {
        caption: list(
            zip(
                videos,
                ("original", "VAE reconstruction", "from its first frame", "from its caption"),
                strict=True,
            )
        )
        for caption, *videos in zip(captions, truth, rebuilt, continued, imagined, strict=True)
    }
    return results, shown


def summary(results: dict) -> str:
    """Return the figures as lines for a terminal."""
    lines = [f"{name}: {value}" for name, value in results.items() if name != "versions"]
    return "\n".join(lines)


def page(config, results: dict, shown: dict, rows: list[dict]) -> str:
    """Return the report as one HTML page."""
    videos = "".join(
        f"<h3>{caption}</h3>" + "".join(web.video(clip, name, SCALE) for clip, name in clips)
        for caption, clips in shown.items()
    )
    more = {
        "held-out clips": results["clips"],
        "VAE PSNR, dB": results["vae_psnr"],
        "first-frame PSNR of image to video, dB": results["i2v_first_frame_psnr"],
        "motion of real clips": results["motion_of_truth"],
        "motion of image to video": results["motion_of_i2v"],
        "motion of text to video": results["motion_of_t2v"],
    }
    return web.page(
        f"easyanimate_jax: {config.run}",
        [
            ("Clips not trained on", videos),
            ("Figures", facts.fact_table(results, more)),
            ("Loss", facts.loss_chart(config, rows)),
            ("Stages", facts.stage_table(results)),
        ],
    )
