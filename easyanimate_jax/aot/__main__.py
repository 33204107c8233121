"""`python -m easyanimate_jax.aot CONFIG --topology v5p:4x4x8 [--stage NAME] [--html FILE] ...`.

Compiles the train step of each stage as `train.py` would run it, and prints what it needs. Further
arguments override the config's fields. For a stage that does not fit, other ways to run it are
compiled until three do. With `--suggest FILE` the fastest way that fits one stage is looked for,
and written as a config. Exit code 0 if every stage fits, 1 if one does not, 2 for arguments that
make no sense.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

# libtpu must neither look for a TPU nor tell that there is none.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

from easyanimate_jax.aot.chips import chip_of
from easyanimate_jax.aot.compile import (
    StageReport,
    compile_stages,
    compile_step,
    topology_devices,
)
from easyanimate_jax.aot.report import page, row, table, to_json
from easyanimate_jax.aot.suggest import changes_that_fit, fastest, variant
from easyanimate_jax.config import TrainConfig, load
from easyanimate_jax.training.stages import Stage


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m easyanimate_jax.aot")
    parser.add_argument("config", help="a file of configs/")
    parser.add_argument("--topology", required=True, help="such as v5p:4x4x8 or v6e:16x16")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology")
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
        topology_devices(given.topology, given.slices)
        names = ", ".join(stage.name for stage in stages)
        print(
            f"compiling {names} for {given.topology}: minutes a stage", file=sys.stderr, flush=True
        )
        reports = []
        for report in compile_stages(config, stages, given.topology, num_slices=given.slices):
            reports.append(report)
            _write(given, reports)  # the search takes long and may be stopped
            if not report.fits or given.suggest:
                reports[-1] = _search(config, given, report)
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


def _search(config: TrainConfig, given: argparse.Namespace, report: StageReport) -> StageReport:
    """Other ways to run a stage: the report of the fastest, written as a config, with `--suggest`;
    else the report with the changes that make it fit."""
    stage = next(s for s in config.stages if s.name == report.name)
    chip = chip_of(topology_devices(given.topology, given.slices)[0].device_kind)

    def compile_choice(config: TrainConfig, stage: Stage) -> StageReport:
        tried, _ = compile_step(config, stage, given.topology, num_slices=given.slices)
        print(f"tried {' '.join(row(tried))}", file=sys.stderr, flush=True)
        return tried

    if given.suggest:
        choice, report = fastest(config, stage, chip, report, compile_choice)
        given.suggest.write_text(variant(given.config, stage, choice, report), "utf-8")
        return report
    changes = changes_that_fit(config, stage, chip, report, compile_choice)
    return dataclasses.replace(report, changes=changes)


def _chosen(config: TrainConfig, names: list[str] | None) -> list:
    known = [stage.name for stage in config.stages]
    for name in names or ():
        if name not in known:
            raise ValueError(f"there is no stage {name!r}; the config has {', '.join(known)}")
    return [stage for stage in config.stages if not names or stage.name in names]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
