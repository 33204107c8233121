"""The output of a run while it trains: `metrics.jsonl`, trackers, and one progress line."""

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.trackers import Tracker

logger = logging.getLogger(__name__)

# Numbers of a row that are comparable only at one token length (training/speed.py).
OF_LENGTH = ("step_seconds", "tokens_per_second", "tflops", "mfu")


class MetricsWriter:
    """Appends one JSON line per step; a resumed run first drops the lines of steps it repeats."""

    def __init__(self, folder: Path, first_step: int, trackers: Sequence[Tracker] = ()):
        path = Path(folder) / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) < first_step]
            path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.trackers = trackers

    def write(self, row: dict) -> None:
        """Append a row, which holds "step" and plain numbers or strings."""
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk costs the row, not the run
            logger.warning(f"the metrics of step {row['step']} were not written: {error}")
        numbers = {n: v for n, v in row.items() if n != "step" and isinstance(v, int | float)}
        # Speeds of different token lengths are different curves, such as "mfu/13312".
        names = {n: f"{n}/{row['bucket']}" if n in OF_LENGTH else n for n in numbers}
        self.numbers(row["step"], {names[n]: v for n, v in numbers.items()})

    def numbers(self, step: int, values: Mapping[str, float | int]) -> None:
        """Add numbers to the trackers alone."""
        for tracker in self.trackers:
            tracker.numbers(step, values)

    def picture(self, name: str, step: int, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """Add a picture to the trackers."""
        for tracker in self.trackers:
            tracker.picture(name, step, picture)

    def film(self, name: str, step: int, frames: UInt8[np.ndarray, "F H W 3"], fps: int) -> None:
        """Add a film of `fps` frames a second to the trackers."""
        for tracker in self.trackers:
            tracker.film(name, step, frames, fps)

    def close(self) -> None:
        """Close the file and the trackers."""
        self.file.close()
        for tracker in self.trackers:
            tracker.close()


def read_rows(folder: Place) -> list[dict]:
    """Return the rows of a run's `metrics.jsonl`, without lines that a kill cut short."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if _step(line) < sys.maxsize]


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line cut short by a kill
        return sys.maxsize


class Progress:
    """The progress line: position and speed of a run, and when stage and schedule will end.

    The remaining time is the remaining tokens divided by the token rate of the last 50 steps.
    """

    def __init__(self):
        self.window = deque(maxlen=50)  # (seconds, tokens, seconds spent waiting for data)

    def add(self, seconds: float, tokens: int, waited: float) -> None:
        """Add a step that took `seconds`, of which it `waited` for data."""
        self.window.append((seconds, tokens, waited))

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens per second of the last 50 steps."""
        return sum(t for _, t, _ in self.window) / max(1e-9, sum(s for s, _, _ in self.window))

    @property
    def data_wait(self) -> float:
        """Return the share of the time of the last 50 steps that was spent waiting for data."""
        return sum(w for *_, w in self.window) / max(1e-9, sum(s for s, _, _ in self.window))

    def show(self, text: str, stage_tokens: int, all_tokens: int) -> None:
        """Print `text` with rates and remaining times, by `show_progress`."""
        rate = max(1e-9, self.tokens_per_second)
        line = (
            f"{text}  {rate:,.0f} tok/s  data wait {self.data_wait:.0%}"
            f"  eta stage {clock(stage_tokens / rate)}, all {clock(all_tokens / rate)}"
        )
        show_progress(line)


def show_progress(line: str) -> None:
    """Print a progress line; on a terminal it replaces the previous line."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="", flush=True)
    else:
        print(line, flush=True)


def clock(seconds: float) -> str:
    """Return seconds as text: 75.2 gives "1:15", 90000 gives "1d 1:00:00"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{seconds:02}" if hours or days else f"{minutes}:{seconds:02}"
    return f"{days}d {text}" if days else text


def now() -> float:
    """Return the seconds of a clock that never jumps."""
    return time.perf_counter()
