"""The output of a run while it trains: `metrics.jsonl`, TensorBoard, and one progress line."""

import io
import json
import logging
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from easyanimate_jax.data.media import write_gif

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends one JSON line per step; a resumed run first drops the lines of steps it repeats."""

    def __init__(self, folder: Path, first_step: int):
        path = Path(folder) / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) < first_step]
            path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.board = _board(Path(folder) / "tensorboard", first_step)

    def write(self, row: dict) -> None:
        """Append a row, which holds "step" and plain numbers or strings."""
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk costs the row, not the run
            logger.warning(f"the metrics of step {row['step']} were not written: {error}")
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self.board.add_scalar(name, value, row["step"])

    def picture(self, name: str, step: int, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """Add a picture to TensorBoard."""
        self.board.add_image(name, picture, step, dataformats="HWC")

    def film(
        self, name: str, step: int, frames: UInt8[np.ndarray, "F H W 3"], fps: float | int
    ) -> None:
        """Add a film to TensorBoard, which shows it among the pictures."""
        from tensorboardX.proto.summary_pb2 import Summary

        _, height, width, _ = frames.shape
        gif = io.BytesIO()
        write_gif(gif, frames, fps)
        picture = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue()
        )
        summary = Summary(value=[Summary.Value(tag=name, image=picture)])
        self.board.file_writer.add_summary(summary, step)

    def close(self) -> None:
        """Close the file and TensorBoard."""
        self.file.close()
        self.board.close()


def _board(folder: Path, first_step: int):
    """Return a TensorBoard writer. Its package would import torch, so torch is hidden from it."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    from tensorboardX import SummaryWriter

    if hide:
        del sys.modules["torch"]
    return SummaryWriter(str(folder.absolute()), purge_step=first_step)


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
