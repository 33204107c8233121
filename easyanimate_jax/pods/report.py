"""Write the reports of stages as a terminal table, Markdown, a web page and JSON."""

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence

from easyanimate_jax.evaluation import web
from easyanimate_jax.training import speed
from easyanimate_jax.training.compile import TEMPORARIES, StageReport
from easyanimate_jax.training.fits import gb, memory_parts

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
    """Return the cells of one stage for COLUMNS; unknown figures are "-"."""
    state = sum(size for part, size in report.memory.items() if part != TEMPORARIES)
    start = (
        report.name,
        f"{report.tokens}+{report.text_tokens}",
        f"{report.batch_size} = {report.accumulate} x {report.microbatch}",
        "x".join(str(n) for n in report.mesh.values()),
        ("yes" if report.fits else "NO") + (", modelled" if report.modelled else ""),
        f"{gb(report.peak_bytes_per_chip)} of {gb(report.hbm_bytes)}",
        gb(state),
        gb(report.memory.get(TEMPORARIES)),
        gb(sum(report.collective_bytes.values()) or None),
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
    """Return a table for the terminal, followed by the details of each stage."""
    lines = [speed.table(COLUMNS, list(map(row, reports)))]
    for report in reports:
        lines += ["", *details(report)]
    return "\n".join(lines)


def markdown(reports: Sequence[StageReport]) -> str:
    """Return the same table in Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(row, reports)]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


def page(topology: str, reports: Sequence[StageReport]) -> str:
    """Return the table as a one-file web page, with each stage's memory and seconds as bars."""
    modelled = any(report.modelled for report in reports)
    legend = web.note(MODEL_LEGEND if modelled else LEGEND)
    sections = [("All stages", web.table(COLUMNS, list(map(row, reports))) + legend)]
    for report in reports:
        memory, seconds = _memory_parts(report), report.predicted_parts
        content = f"<pre>{html.escape(chr(10).join(details(report)))}</pre>"
        if report.peak_bytes_per_chip:
            gigabytes = {name: size / 1e9 for name, size in memory.items()}
            content += _bar(
                gigabytes, max(report.hbm_bytes, report.peak_bytes_per_chip) / 1e9, "GB"
            )
        if seconds:
            content += _bar(seconds, sum(seconds.values()), "s")
        sections.append((report.name, content))
    made = "by a model of" if modelled else "compiled for"
    return web.page(f"Train steps {made} {topology}", sections)


LEGEND = (
    "Fits, GB, kernels and bytes sent are the compiler's figures. PFLOP and attn (attention's "
    "share) are arithmetic, without recomputation. Seconds, MFU and days are predicted from the "
    "compiler's cycles, kernel schedules and link rates; they were not measured on a chip. They "
    "assume that no collective overlaps with computation. The range is from all collectives hidden "
    "and the rest 20 % faster, to everything 33 % slower."
)


MODEL_LEGEND = (
    "Nothing was compiled. The state's GB are exact; the rest follows from the activations that "
    "the config keeps. Seconds follow from FLOPs and bytes at rates measured on one H200. Two "
    "steps on that card were within 2 % in memory and 5 % in time; several GPUs were never "
    "measured. The range is from all collectives hidden and the rest 20 % faster, to everything "
    "33 % slower."
)


def _memory_parts(report: StageReport) -> dict[str, int]:
    """Return {part: bytes}; after a refusal the rest is the needed memory minus the state."""
    state = dict(report.memory)
    if report.peak_bytes_per_chip and TEMPORARIES not in state:
        state[TEMPORARIES] = report.peak_bytes_per_chip - sum(state.values())
    return state


def _bar(parts: Mapping[str, float], whole: float, unit: str, width: int = 900) -> str:
    """Return an SVG bar of the parts of `whole`, with their names and values below it."""
    x, drawn = 0.0, [f'<rect width="{width}" height="18" fill="#eef2f8"/>']
    for colour, value in zip(web.COLOURS, parts.values(), strict=False):
        length = max(0.0, value) / whole * width
        drawn.append(f'<rect x="{x:.1f}" width="{length:.1f}" height="18" fill="{colour}"/>')
        x += length
    names = ", ".join(
        f'<span style="color:{colour}">{html.escape(name)} {value:.1f} {unit}</span>'
        for colour, (name, value) in zip(web.COLOURS, parts.items(), strict=False)
    )
    drawing = f'<svg viewBox="0 0 {width} 18" width="{width}">{"".join(drawn)}</svg>'
    return f"<p>{drawing}<br>{names}, of {whole:.1f} {unit}</p>"


def details(report: StageReport) -> list[str]:
    """Return lines with a stage's memory, kernels, collectives and parts of predicted time."""
    lines = [f"{report.name} on {report.topology}"]
    lines += [f"  refused by the compiler: {report.message}"] if report.message else []
    lines += ["  not compiled: a model of memory and FLOPs"] if report.modelled else []
    lines += [
        f"  fits with {change.overrides}: {gb(change.peak_bytes_per_chip)} GB, predicted "
        f"{change.predicted_step_seconds:.1f} s a step"
        for change in report.changes
    ]
    kept = ", ".join(report.save) or "nothing"
    lines += [f"  keeps {kept} for the backward pass, of {report.microbatch} rows at once"]
    lines += [f"  memory: {memory_parts(report)}"]
    if report.predicted_parts and not report.modelled:
        for by in (report.collective_bytes, report.collective_bytes_per_axis):
            sent = ", ".join(f"{name} {gb(size)} GB" for name, size in by.items())
            lines.append(f"  sent by a device: {sent}")
        lines += [
            f"  sent while nothing is computed: {gb(report.waiting_collective_bytes)} GB",
            f"  largest all-reduce: {report.largest_all_reduce_bytes / 1e6:.1f} MB",
            *(f"  kernel: {kernel}" for kernel in report.kernels),
        ]
    if report.predicted_parts:
        parts = ", ".join(f"{k} {v:.2f}" for k, v in report.predicted_parts.items())
        lines.append(f"  seconds: {parts}")
    return lines


def to_json(topology: str, reports: Sequence[StageReport]) -> str:
    """Return JSON text `{"topology": ..., "stages": [...]}`; unknown figures are null."""
    stages = [dataclasses.asdict(report) for report in reports]
    return json.dumps({"topology": topology, "stages": stages}, indent=1)
