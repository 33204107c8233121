"""Text about the memory of a stage's train step, and the error of a run that does not fit."""

from easyanimate_jax.training.compile import StageReport


def memory_line(report: StageReport) -> str:
    """Return one line with the memory that a stage needs per device."""
    return (
        f"stage {report.name!r} at {report.tokens} tokens, {report.microbatch} rows at once, "
        f"keeping {', '.join(report.save) or 'nothing'}, needs {gb(report.peak_bytes_per_chip)} "
        f"GB of a device's {gb(report.hbm_bytes)} GB"
    )


def memory_parts(report: StageReport) -> str:
    """Return one line with the parts of a stage's memory."""
    return ", ".join(f"{name} {gb(size)} GB" for name, size in report.memory.items())


def refusal(report: StageReport) -> str:
    """Return the error of a run that does not fit: the memory, its parts, and the repair."""
    rows = report.mesh["data"] * report.mesh["fsdp"]
    repairs = ["more devices"]
    repairs += ["a smaller microbatch"] if report.microbatch > rows else []
    repairs += ["less in `model.save`"] if report.save else []
    return (
        f"{memory_line(report)} ({memory_parts(report)}). Use {' or '.join(repairs)}; `python -m "
        f"easyanimate_jax aot CONFIG --topology ... --suggest FILE` finds what fits."
    )


def gb(size: float | int | None) -> str:
    """Return bytes as gigabytes, such as "12.3"; "-" for None."""
    return "-" if size is None else f"{size / 1e9:.1f}"
