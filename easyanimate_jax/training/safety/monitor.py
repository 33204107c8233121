"""Monitor of a run: seconds per section, a heartbeat, and a watchdog that ends a hanging process.

The loop calls `enter("step")` and so on. The monitor writes `goodput.jsonl` (the share of time in
new steps, and in what else) and a heartbeat file that the supervisor reads. If a section takes too
long, the watchdog prints the stacks of all threads and exits with code HANG. It runs in a thread,
so it works while the loop waits inside a collective.
"""

import contextlib
import faulthandler
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

from easyanimate_jax.training.safety.cloud_goodput import CloudGoodput
from easyanimate_jax.training.safety.exits import HANG

logger = logging.getLogger(__name__)

PATIENCE = 3600.0  # seconds that a section may take, except step, rework and data
STEP_FACTOR = 5  # a step longer than this times the slowest recent one is a hang
BEAT = 0.5  # seconds between heartbeats
WRITE = 10.0  # seconds between lines of goodput.jsonl

# "step" is productive; "rework" repeats an earlier step; "down" is the time between processes; in
# "reward" videos are sampled for an update, and rated; in "profile" a trace is begun or written.
SECTIONS = ["start", "restore", "compile", "step", "rework", "data", "save", "sample", "validate"]
SECTIONS += ["reward", "profile", "down"]


class Monitor:
    """The monitor of one process; process 0 writes goodput.jsonl, which continues earlier totals.

    A step or a wait for data may take `hang_seconds`, or five times the slowest recent step; 0 sets
    no limit. A `sink` gets the same sections.
    """

    def __init__(
        self,
        folder: Path,
        *,
        process: int,
        hang_seconds: float,
        sink: CloudGoodput | None = None,
    ):
        self.process, self.hang_seconds, self.sink = process, hang_seconds or math.inf, sink
        self.file = folder / "goodput.jsonl"
        self.heartbeat = Path(os.environ.get("EASYANIMATE_HEARTBEATS", folder / "heartbeats"))
        self.heartbeat.mkdir(parents=True, exist_ok=True)
        self.heartbeat /= f"{process}.json"
        self.total, self.furthest, ended = _last_line(self.file)
        self.total["down"] += max(0.0, time.time() - ended) if ended else 0.0
        self.before = dict(self.total)  # seconds of earlier processes
        self.section, self.since, self.step = "start", time.monotonic(), 0
        self.recent_steps = deque(maxlen=200)  # seconds
        self.windows = deque([(time.time(), dict(self.total))], maxlen=60)
        self.closed = threading.Event()
        # The supervisor requests stacks by this signal. In a notebook sys.stderr is not a file.
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def enter(self, section: str, step: int | None = None) -> None:
        """Start `section` at `step`; a step below the furthest one counts as rework."""
        now = time.monotonic()
        spent, self.since = now - self.since, now
        self.total[self.section] += spent
        if self.sink:
            self.sink.enter(section, step)
        if self.section in ("step", "rework"):
            self.recent_steps.append(spent)
        self.step = self.step if step is None else step
        if section == "step" and self.step < self.furthest:
            section = "rework"
        self.section = section
        self.furthest = max(self.furthest, self.step)
        if time.time() - self.windows[-1][0] > WRITE:
            self.write()

    def spent(self) -> dict[str, float]:
        """Return the seconds by section since the monitor was opened, without empty sections."""
        found = {name: value - self.before[name] for name, value in self.total.items()}
        found[self.section] += time.monotonic() - self.since
        return {name: value for name, value in found.items() if value}

    def write(self) -> None:
        """Write a line of goodput.jsonl: totals of the whole run, and recent shares."""
        self.windows.append((time.time(), dict(self.total)))
        (_, before), (clock, total) = self.windows[0], self.windows[-1]
        window = {name: total[name] - before[name] for name in SECTIONS}
        seconds = {name: round(value, 3) for name, value in total.items()}
        row = {
            "time": clock,
            "step": self.furthest,
            "goodput": _share(seconds),  # from the rounded numbers, so that a row is consistent
            "recent_goodput": _share(window),
            "seconds": seconds,
        }
        if self.process == 0:
            with contextlib.suppress(OSError), self.file.open("a") as file:  # the disk may be full
                file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Write the last line, close the sink and end the watchdog."""
        self.enter("start")
        self.write()
        if self.sink:
            self.sink.close()
        self.closed.set()
        self.thread.join()
        faulthandler.unregister(signal.SIGUSR1)

    def limit(self) -> float:
        """Return the seconds that the current section may take."""
        if self.section not in ("step", "rework", "data"):
            return max(PATIENCE, self.hang_seconds)
        return max(self.hang_seconds, STEP_FACTOR * max(self.recent_steps, default=0.0))

    def _watch(self) -> None:
        beaten = 0.0
        while not self.closed.wait(0.1):
            now = time.monotonic()
            if now - beaten > BEAT:
                with contextlib.suppress(OSError):  # the disk may be full
                    self._beat()
                beaten = now
            since, limit = self.since, self.limit()
            if now - since > limit:
                message = f"hang: {now - since:.1f} s in {self.section!r} at step {self.step}"
                try:
                    logger.critical(f"{message}; limit {limit:.1f} s")
                    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                finally:  # even if stderr is closed
                    os._exit(HANG)

    def _beat(self) -> None:
        beat = {"step": self.step, "section": self.section, "time": time.time()}
        new = self.heartbeat.with_suffix(".new")
        new.write_text(json.dumps(beat | {"pid": os.getpid()}))
        os.replace(new, self.heartbeat)


def _share(seconds: dict[str, float]) -> float:
    return round(seconds["step"] / max(1e-9, sum(seconds.values())), 4)


def _last_line(file: Path) -> tuple[dict[str, float], int, float]:
    """Return (seconds by section, furthest step, time) of the last complete line, or zeros."""
    zeros = dict.fromkeys(SECTIONS, 0.0)
    lines = file.read_text().splitlines() if file.is_file() else []
    for line in reversed(lines):
        try:
            row = json.loads(line)
            return zeros | row["seconds"], row["step"], row["time"]
        except (ValueError, KeyError):  # cut short by a kill
            continue
    return zeros, 0, 0.0
