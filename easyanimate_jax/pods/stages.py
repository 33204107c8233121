"""Report the stages of a config on a pod, and search changes for those that do not fit."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from easyanimate_jax.pods import gpu
from easyanimate_jax.pods.compile import StageReport, compile_step, stage_reports, topology_devices
from easyanimate_jax.pods.report import row
from easyanimate_jax.pods.suggest import changes_that_fit, fastest, variant
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.training.chips import Chip, chip_of
from easyanimate_jax.training.speed import Speed
from easyanimate_jax.training.stages import Stage

logger = logging.getLogger(__name__)

ReportOf = Callable[..., StageReport]  # of (config, stage), and `tokens` if not the longest


def predict(
    config: TrainConfig,
    path: str,
    topology: str,
    slices: int,
    *,
    stages: Sequence[str] = (),
    suggest: Path | None = None,
) -> Iterator[list[StageReport]]:
    """Yield the list of reports so far, after each stage and after each search.

    `path` is the config's file. `stages` are the names of the stages to report; none means all.
    `suggest` is a file for the fastest way to run each of them, written as a config that imports
    `path` and changes it. It has the stages so far after each search. Raises ValueError for an
    unknown topology or stage, and for a stage that no way fits.
    """
    chosen = _chosen(config, stages)
    chip, report_of = _means(topology, slices, ", ".join(stage.name for stage in chosen))
    reports, found = [], []
    for report in stage_reports(config, chosen, report_of):
        reports.append(report)
        yield reports
        stage = _stage(config, report)
        if suggest:
            choice, reports[-1] = fastest(config, stage, chip, report, _spoken(report_of))
            found.append((stage, choice, reports[-1]))
            suggest.write_text(variant(path, found), "utf-8")
            yield reports
        elif not report.fits:
            changes = changes_that_fit(config, stage, chip, report, _spoken(report_of))
            reports[-1] = dataclasses.replace(report, changes=changes)
            yield reports


BESIDE = ("predicted s/step", "range", "predicted MFU", "measured/predicted")


def beside(
    config: TrainConfig, topology: str, slices: int, found: Sequence[Speed]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return (columns, their cells for each measured speed): what is predicted for its step.

    Raises ValueError for an unknown topology.
    """
    names = ", ".join(dict.fromkeys(speed.stage for speed in found))
    _, report_of = _means(topology, slices, names)
    rows = []
    for speed in found:
        stage = next(stage for stage in config.stages if stage.name == speed.stage)
        report = report_of(config, stage, tokens=speed.tokens)
        if report.predicted_step_seconds is None:
            rows.append(("-",) * len(BESIDE))
            continue
        low, high = report.predicted_step_seconds_range
        rows.append(
            (
                f"{report.predicted_step_seconds:.3g}",
                f"{low:.3g}-{high:.3g}",
                f"{report.predicted_mfu:.1%}",
                f"{speed.seconds / report.predicted_step_seconds:.2f}",
            )
        )
    return BESIDE, rows


def _means(topology: str, slices: int, names: str) -> tuple[Chip, ReportOf]:
    """Return (chip of a topology, function that reports on a stage by a compiler or a model)."""
    found = gpu.parse(topology)
    if found:
        if slices > 1:
            raise ValueError("--slices is for TPUs; write GPU hosts as in h200:16x8")
        return found[0], partial(gpu.model_step, topology=topology)
    devices = topology_devices(topology, slices)
    logger.info("compiling %s for %s: minutes per stage", names, topology)

    def compiled(config: TrainConfig, stage: Stage, tokens: int | None = None) -> StageReport:
        return compile_step(config, stage, topology, num_slices=slices, tokens=tokens)[0]

    return chip_of(devices[0].device_kind), compiled


def _spoken(report_of: ReportOf) -> ReportOf:
    """Return a function like `report_of` that also logs each result."""

    def spoken(config: TrainConfig, stage: Stage) -> StageReport:
        tried = report_of(config, stage)
        logger.info("tried %s", " ".join(row(tried)))
        return tried

    return spoken


def _stage(config: TrainConfig, report: StageReport) -> Stage:
    return next(stage for stage in config.stages if stage.name == report.name)


def _chosen(config: TrainConfig, names: Sequence[str]) -> list[Stage]:
    known = [stage.name for stage in config.stages]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no stage {name!r}; the config has {', '.join(known)}")
    return [stage for stage in config.stages if not names or stage.name in names]
