"""Text about the memory of a stage's train step, and the error of a run that does not fit."""

from easyanimate_jax.training.compile import StageReport


def memory_line(report: StageReport) -> str:
    """Return one line with the memory that a stage needs per device."""
    return (
        f"stage {report.name!r} at {report.tokens} tokens needs {gb(report.peak_bytes_per_chip)} "
        f"GB of a device's {gb(report.hbm_bytes)} GB"
    )


def memory_parts(report: StageReport) -> str:
    """Return one line with the parts of a stage's memory."""
    return ", ".join(f"{name} {gb(size)} GB" for name, size in report.memory.items())


def refusal(report: StageReport) -> str:
    """Return the error of a run that does not fit: the memory, its parts, and the repair."""
    return (
        f"{memory_line(report)} ({memory_parts(report)}). Use more devices, a smaller microbatch, "
        f"or keep less in `model.save`; `python -m easyanimate_jax aot CONFIG --topology ... "
        f"--suggest FILE` finds what fits."
    )


def gb(size: float | int | None) -> str:
    """Return bytes as gigabytes, such as "12.3"; "-" for None."""
    return "-" if size is None else f"{size / 1e9:.1f}"
