"""Predict memory and time of a config on a pod, without the pod."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from easyanimate_jax.commands import parse
from easyanimate_jax.training.safety.exits import DONE, FOUND

HELP = """Compile the train step of each stage as `train` would run it. Print what it needs on the
pod: memory, collectives and a predicted step time. No device of the pod is needed. The compiler for
GPUs needs a GPU, so for GPUs a model predicts memory and time instead.

If a stage does not fit, other ways to run it are compiled until three fit. Exit codes: 0, every
stage fits; 1, a stage does not fit; 2, wrong arguments. Every field of the config is an option,
`--field value`; `CONFIG --help` lists them. Example:

  python -m easyanimate_jax aot configs/v5_12b.py --topology v5p:4x4x8 --stage 13312_t2v"""


@dataclass(frozen=True)
class Options:
    """The arguments of `aot`."""

    config: Positional[str]
    """Python file that defines `config`, such as configs/demo.py."""
    topology: str
    """Chips: TPUs such as v5p:4x4x8 or v6e:16x16, GPUs such as h200:8 or h100:16x8."""
    slices: int = 1
    """Number of TPU slices of that topology."""
    stage: UseAppendAction[tuple[str, ...]] = ()
    """Compile only this stage; you may repeat the option."""
    json: Path | None = None
    """Write the figures to this JSON file."""
    html: Path | None = None
    """Write the report to this web page."""
    suggest: Path | None = None
    """Search the fastest way to run each stage, and write them to this file as a config."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `aot`; return the exit code."""
    return parse.run(partial(_predict, arguments))


def _predict(arguments: Sequence[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: no local device is used
    own, config = parse.options_and_config(Options, arguments, "aot", HELP, ("TrainConfig",))
    from easyanimate_jax.pods.report import page, table, to_json
    from easyanimate_jax.pods.stages import predict

    reports = []
    for reports in predict(
        config, own.config, own.topology, own.slices, stages=own.stage, suggest=own.suggest
    ):  # written after each report: you may stop the long search
        if own.json:
            own.json.write_text(to_json(own.topology, reports))
        if own.html:
            own.html.write_text(page(own.topology, reports), "utf-8")
    print(table(reports))
    return DONE if all(report.fits for report in reports) else FOUND
