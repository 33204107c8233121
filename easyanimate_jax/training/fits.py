"""The memory of a stage's train step in words, and the refusal of a run that does not fit."""

from easyanimate_jax.training.compile import StageReport


def memory_line(report: StageReport) -> str:
    """What a stage needs of a device, in a line."""
    return (
        f"stage {report.name!r} at {report.tokens} tokens needs {gb(report.peak_bytes_per_chip)} "
        f"GB of a device's {gb(report.hbm_bytes)} GB"
    )


def memory_parts(report: StageReport) -> str:
    """What a stage's memory goes to, in a line."""
    return ", ".join(f"{name} {gb(size)} GB" for name, size in report.memory.items())


def refusal(report: StageReport) -> str:
    """Why a run cannot start, where the memory goes, and what to do."""
    return (
        f"{memory_line(report)} ({memory_parts(report)}). Use more devices, a smaller microbatch, "
        f"or keep less in `model.save`; `python -m easyanimate_jax aot CONFIG --topology ... "
        f"--suggest FILE` finds what fits."
    )


def gb(size: float | int | None) -> str:
    """Bytes in gigabytes; "-" where they are not known."""
    return "-" if size is None else f"{size / 1e9:.1f}"
