"""Predict memory and time of a config on a pod, without the pod."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from easyanimate_jax.commands import parse

HELP = """Compile the train step of each stage as `train` would run it, and print what it needs of
the pod: memory, collectives, a predicted step time. No device of the pod is needed. The compiler of
GPUs works only where they are, so for GPUs a model of memory and time takes its place.

For a stage that does not fit, other ways to run it are compiled until three fit. Exit code 0: every
stage fits; 1: one does not; 2: wrong arguments. Every field of the config is an option, `--field
value`; `CONFIG --help` lists them. Example:

  python -m easyanimate_jax aot configs/v5_12b.py --topology v5p:4x4x8 --stage 13312_t2v"""


@dataclass(frozen=True)
class Options:
    config: Positional[str]
    """Python file that defines `config`, as those of configs/."""
    topology: str
    """Chips: v5p:4x4x8 or v6e:16x16 of TPUs, h200:8 or h100:16x8 of GPUs."""
    slices: int = 1
    """Number of slices of that TPU topology."""
    stage: UseAppendAction[tuple[str, ...]] = ()
    """Compile only this stage; may be repeated."""
    json: Path | None = None
    """Write the figures to this JSON file."""
    html: Path | None = None
    """Write the report to this web page."""
    suggest: Path | None = None
    """Search the fastest way to run one stage, and write it as a config to this file."""


def main(arguments: Sequence[str]) -> int:
    return parse.run(partial(_predict, arguments))


def _predict(arguments: Sequence[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: the devices here do not matter
    own, config = parse.options_and_config(Options, arguments, "aot", HELP, ("TrainConfig",))
    from easyanimate_jax.pods.report import page, table, to_json
    from easyanimate_jax.pods.stages import predict

    reports = []
    for reports in predict(
        config, own.config, own.topology, own.slices, stages=own.stage, suggest=own.suggest
    ):  # written each time: the search takes long and may be stopped
        if own.json:
            own.json.write_text(to_json(own.topology, reports))
        if own.html:
            own.html.write_text(page(own.topology, reports), "utf-8")
    print(table(reports))
    return 0 if all(report.fits for report in reports) else 1
