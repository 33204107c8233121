"""`python -m easyanimate_jax aot CONFIG --topology v5p:4x4x8 [--stage NAME] [--html FILE] ...`.

Compiles the train step of each stage as `train.py` would run it, and prints what it needs; for
GPUs, whose compiler works only where they are, a model of memory and time says it instead. Further
arguments override the config's fields. For a stage that does not fit, other ways to run it are
compiled until three do. With `--suggest FILE` the fastest way that fits one stage is looked for,
and written as a config. Exit code 0 if every stage fits, 1 if one does not, 2 for arguments that
make no sense.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: what is here does not matter

from easyanimate_jax.pods import gpu
from easyanimate_jax.pods.chips import Chip, chip_of
from easyanimate_jax.pods.compile import StageReport, compile_step, stage_reports, topology_devices
from easyanimate_jax.pods.report import page, row, table, to_json
from easyanimate_jax.pods.suggest import changes_that_fit, fastest, variant
from easyanimate_jax.runs.config import TrainConfig, load
from easyanimate_jax.training.stages import Stage


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m easyanimate_jax aot")
    parser.add_argument("config", help="a file of configs/")
    parser.add_argument(
        "--topology", required=True, help="v5p:4x4x8, v6e:16x16; of GPUs h200:8, or h100:16x8"
    )
    parser.add_argument("--slices", type=int, default=1, help="slices of that TPU topology")
    parser.add_argument("--stage", action="append", help="compile only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--html", type=Path, help="write the report as a web page here")
    parser.add_argument("--suggest", type=Path, help="write the config of the fastest way here")
    given, overrides = parser.parse_known_args(arguments)
    try:
        config = load(given.config, overrides)
        if not isinstance(config, TrainConfig):
            raise ValueError(f"{given.config} trains a VAE; give a config with stages")
        stages = _chosen(config, given.stage)
        if given.suggest and len(stages) > 1:
            raise ValueError("--suggest looks for the best way to run one stage; give --stage NAME")
        chip, report_of = _means(given, ", ".join(stage.name for stage in stages))
        reports = []
        for report in stage_reports(config, stages, report_of):
            reports.append(report)
            _write(given, reports)  # the search takes long and may be stopped
            if not report.fits or given.suggest:
                reports[-1] = _search(config, given, report, chip, report_of)
                _write(given, reports)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(reports))
    return 0 if all(report.fits for report in reports) else 1


def _write(given: argparse.Namespace, reports: list[StageReport]) -> None:
    if given.json:
        given.json.write_text(to_json(given.topology, reports))
    if given.html:
        given.html.write_text(page(given.topology, reports), "utf-8")


def _means(
    given: argparse.Namespace, names: str
) -> tuple[Chip, Callable[[TrainConfig, Stage], StageReport]]:
    """The chip of a topology, and what makes the report of a stage: its compiler, or a model."""
    found = gpu.parse(given.topology)
    if found:
        if given.slices > 1:
            raise ValueError("--slices are of TPUs; write GPU hosts as in h200:16x8")
        return found[0], partial(gpu.model_step, topology=given.topology)
    devices = topology_devices(given.topology, given.slices)
    print(f"compiling {names} for {given.topology}: minutes a stage", file=sys.stderr, flush=True)

    def compiled(config: TrainConfig, stage: Stage) -> StageReport:
        return compile_step(config, stage, given.topology, num_slices=given.slices)[0]

    return chip_of(devices[0].device_kind), compiled


def _search(
    config: TrainConfig,
    given: argparse.Namespace,
    report: StageReport,
    chip: Chip,
    report_of: Callable[[TrainConfig, Stage], StageReport],
) -> StageReport:
    """Other ways to run a stage: the report of the fastest, written as a config, with `--suggest`;
    else the report with the changes that make it fit."""
    stage = next(s for s in config.stages if s.name == report.name)

    def report_choice(config: TrainConfig, stage: Stage) -> StageReport:
        tried = report_of(config, stage)
        print(f"tried {' '.join(row(tried))}", file=sys.stderr, flush=True)
        return tried

    if given.suggest:
        choice, report = fastest(config, stage, chip, report, report_choice)
        given.suggest.write_text(variant(given.config, stage, choice, report), "utf-8")
        return report
    changes = changes_that_fit(config, stage, chip, report, report_choice)
    return dataclasses.replace(report, changes=changes)


def _chosen(config: TrainConfig, names: list[str] | None) -> list:
    known = [stage.name for stage in config.stages]
    for name in names or ():
        if name not in known:
            raise ValueError(f"there is no stage {name!r}; the config has {', '.join(known)}")
    return [stage for stage in config.stages if not names or stage.name in names]
