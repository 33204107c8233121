"""The reports of stages as a table for the terminal, as Markdown, and as JSON."""

import dataclasses
import json
from collections.abc import Sequence

from easyanimate_jax.aot.compile import StageReport

COLUMNS = (
    "stage",
    "tokens",
    "batch",
    "mesh",
    "fits",
    "GB/chip",
    "state",
    "rest",
    "comm GB",
    "PFLOP",
    "attn",
    "s/step",
    "range",
    "MFU",
    "days",
)


def row(report: StageReport) -> tuple[str, ...]:
    """One stage under COLUMNS; what is not known is "-"."""
    state = sum(report.memory[part] for part in ("weights", "average", "optimizer", "batch"))
    start = (
        report.name,
        f"{report.tokens}+{report.text_tokens}",
        f"{report.batch_size} = {report.accumulate} x {report.microbatch}",
        "x".join(str(n) for n in report.mesh.values()),
        f"{'yes' if report.fits else 'NO'}",
        f"{_gb(report.peak_bytes_per_chip)} of {_gb(report.hbm_bytes)}",
        _gb(state),
        _gb(report.memory.get("activations and temporaries")),
        _gb(sum(report.collective_bytes.values()) or None),
        f"{report.model_flops / 1e15:.0f}",
        f"{report.attention_share:.0%}",
    )
    if report.predicted_step_seconds is None:
        return (*start, "-", "-", "-", "-")
    low, high = report.predicted_step_seconds_range
    return (
        *start,
        f"{report.predicted_step_seconds:.1f}",
        f"{low:.0f}-{high:.0f}",
        f"{report.predicted_mfu:.0%}",
        f"{report.predicted_days:.2f}",
    )


def table(reports: Sequence[StageReport]) -> str:
    """Columns aligned for the terminal, and under them each stage's parts."""
    rows = [COLUMNS, *map(row, reports)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    for report in reports:
        lines += ["", *details(report)]
    return "\n".join(lines)


def markdown(reports: Sequence[StageReport]) -> str:
    """The same table in Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(row, reports)]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


def details(report: StageReport) -> list[str]:
    """Memory, kernels, collectives and the parts of the predicted time."""
    lines = [f"{report.name} on {report.topology}"]
    lines += [f"  refused by the compiler: {report.message}"] if report.message else []
    lines += ["  memory: " + ", ".join(f"{k} {_gb(v)} GB" for k, v in report.memory.items())]
    if report.fits:
        wire = report.collective_bytes.items()
        lines += [
            "  sent by a device: " + ", ".join(f"{k} {_gb(v)} GB" for k, v in wire),
            f"  largest all-reduce: {report.largest_all_reduce_bytes / 1e6:.1f} MB",
            *(f"  kernel: {kernel}" for kernel in report.kernels),
            "  seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in report.predicted_parts.items()),
        ]
    return lines


def to_json(topology: str, reports: Sequence[StageReport]) -> str:
    """`{"topology": ..., "stages": [...]}`; figures that are not known are null."""

    stages = [dataclasses.asdict(report) for report in reports]
    return json.dumps({"topology": topology, "stages": stages}, indent=1)


def _gb(x: float | int | None) -> str:
    return "-" if x is None else f"{x / 1e9:.1f}"
