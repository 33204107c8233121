"""Training figures of a finished run, as numbers and as parts of a page."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from easyanimate_jax import boundaries
from easyanimate_jax.evaluation import web

SMOOTH = 25  # steps


def read_metrics(config) -> list[dict]:
    """Return the run's metrics, one row per step."""
    lines = (Path(config.run) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def training_facts(config, rows: list[dict]) -> dict:
    """Return figures of the schedule: losses, programs, seconds, goodput, versions, machine."""
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
    vae, goodput = Path(config.vae) / "vae_report.json", Path(config.run) / "goodput.jsonl"
    return {
        "stages": stages,
        "token_efficiency": sum(r["real_tokens"] for r in rows) / sum(r["tokens"] for r in rows),
        "compiled_train_programs": facts["compiled_train_programs"],
        "bucket_task_pairs": len({(row["bucket"], row["task"]) for row in rows}),
        "training_seconds": round(facts["seconds"], 1),
        "goodput": json.loads(goodput.read_text().splitlines()[-1]) if goodput.is_file() else None,
        "vae": json.loads(vae.read_text()) if vae.is_file() else None,
        "seed": config.seed,
        "versions": {n: version(n) for n in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
    }


def loss_chart(config, rows: list[dict]) -> str:
    """Return an SVG chart of the loss over steps, with one band per stage."""
    ends = [0, *boundaries(config.stages)]
    bands = [(a, b, s.name) for a, b, s in zip(ends, ends[1:], config.stages, strict=False)]
    losses = web.smooth([row["loss"] for row in rows], SMOOTH)
    series = {f"loss, mean of {SMOOTH} steps": ([row["step"] for row in rows], losses)}
    return web.line_chart(series, x_label="step", bands=bands)


def stage_table(facts: dict) -> str:
    """Return an HTML table with one row per stage."""
    header = ["stage", "steps", "loss at start", "loss at end", "seconds"]
    return web.table(header, [[name, *row.values()] for name, row in facts["stages"].items()])


def fact_table(facts: dict, more: dict) -> str:
    """Return an HTML table of `more`, then the facts that every page shows."""
    names = ("token_efficiency", "compiled_train_programs", "bucket_task_pairs")
    names += ("training_seconds", "seconds", "seed", "machine")
    rows = more | {name.replace("_", " "): facts.get(name, "not measured") for name in names}
    goodput = facts.get("goodput") or {"goodput": "not measured"}
    rows |= {"share of the time spent in new steps": goodput["goodput"]}
    return web.table(["", ""], list((rows | facts["versions"]).items()))
