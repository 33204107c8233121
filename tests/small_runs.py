"""Runs of a tiny model on random latents, in this process: two updates for each of two stages."""

import json
from dataclasses import replace
from pathlib import Path

from latents import random_latents

from easyanimate_jax import load_config
from easyanimate_jax.runs.config import SampleConfig, TrainConfig
from easyanimate_jax.sharding import MeshConfig

DEMO = load_config("configs/demo.py")


def small_run(folder: Path) -> TrainConfig:
    """The demo's first stages of text and of image to video, on eight devices with a row each."""
    random_latents(folder / "latents", {"small": (3, 4, 4), "medium": (3, 8, 8)}, (8, 12))
    model = replace(DEMO.model, depth=1, mmdit_depth=1, heads=2, head_width=16, text_widths=(8, 12))
    stages = {stage.name: stage for stage in DEMO.stages}
    return replace(
        DEMO,
        prepared=f"{folder}/latents",
        run=f"{folder}/run",
        vae=f"{folder}/vae",
        text=f"{folder}/text",
        model=model,
        stages=tuple(
            replace(stages[name], steps=2, batch_size=8, learning_rate=1e-2, warmup=0)
            for name in ("small_t2v", "medium_i2v")
        ),
        optimizer=replace(DEMO.optimizer, matrices="adam"),  # which compiles faster
        samples=SampleConfig(every=0),
        mesh=MeshConfig(data=8, fsdp=1),
    )


def rows(config: TrainConfig, name: str = "metrics") -> list[dict]:
    """The lines of a file of a run."""
    lines = (Path(config.run) / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(config: TrainConfig) -> list[float]:
    """The losses of a run's updates."""
    return [row["loss"] for row in rows(config)]
