"""Traces of updates for xprof, written into RUN/profiles: a range, or on request by SIGUSR2.

A trace does not change what an update computes. Show it by `xprof RUN/profiles` or TensorBoard.
"""

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import jax

from easyanimate_jax.training.safety.monitor import Monitor

logger = logging.getLogger(__name__)

MOST = 20  # updates in a trace: while a large one is written, the other processes wait
BY_SIGNAL = 5  # updates that a signal requests


class Profiler:
    """Traces the updates `span`, and the next `BY_SIGNAL` ones after each SIGUSR2.

    Updates are counted from 1 over the whole run. All hosts run the same program, so only process 0
    traces the span; a signal makes any process trace.
    """

    def __init__(self, run: Path, span: range = range(0)):
        self.folder, self.process = run / "profiles", jax.process_index()
        self.span = range(0) if self.process else span
        self.asked = False
        self.open = range(0)  # the updates of the open trace
        signal.signal(signal.SIGUSR2, self._signalled)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def begin(self, updates: int) -> None:
        """Log a line if a run of so many updates is behind a part of the span."""
        if self.span and updates >= self.span[0]:
            left = range(updates + 1, self.span.stop)
            logger.warning(
                "--profile %d:%d: the run has made %d updates; %s",
                *(self.span[0], self.span[-1], updates),
                f"the trace begins at {left[0]}" if left else "there is nothing left to trace",
            )

    @contextlib.contextmanager
    def update(self, number: int, monitor: Monitor) -> Iterator[None]:
        """Trace the update `number`, which is dispatched inside, if a trace is due."""
        if self.open and number not in self.open:  # the run went back to a checkpoint
            self._stop()
        if not self.open and (self.asked or number in self.span):
            monitor.enter("profile")
            stop = number + BY_SIGNAL if self.asked else self.span.stop
            self._start(range(number, stop))
        with jax.profiler.StepTraceAnnotation("update", step_num=number):
            yield

    def ended(self, number: int, result, monitor: Monitor) -> None:
        """End the trace if `number` is its last update; wait for its `result` first."""
        if self.open and number == self.open[-1]:
            jax.block_until_ready(result)
            monitor.enter("profile")
            self._stop()

    def _start(self, due: range) -> None:
        self.asked, self.span = False, self.span if self.asked else range(0)
        options = jax.profiler.ProfileOptions()
        options.session_id = f"{due[0]}-{due[-1]}_process_{self.process}"
        options.raise_error_on_start_failure = True
        try:
            jax.profiler.start_trace(self.folder, profiler_options=options)
        except (OSError, RuntimeError) as error:
            logger.warning("updates %d to %d are not traced: %s", due[0], due[-1], error)
            return
        self.open = due
        logger.info("tracing updates %d to %d", due[0], due[-1])

    def _stop(self) -> None:
        if not self.open:
            return
        self.open = range(0)
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # a full disk costs the trace, not the run
            logger.warning("the trace was not written: %s", error)
            return
        logger.info("the trace is written; show it by: xprof %s", self.folder)

    def _signalled(self, *_) -> None:
        self.asked = True


def span_of(text: str | None, updates: int) -> range:
    """Return the updates of --profile FROM:TO, for a schedule of so many; None is none.

    Raises ValueError unless 1 <= FROM <= TO <= `updates` and the range has at most `MOST` updates.
    """
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise ValueError(f"--profile {text}: write the first and the last update, such as 101:105")
    span = range(int(first), int(last) + 1)
    if not span or span[0] < 1 or span[-1] > updates:
        raise ValueError(
            f"--profile {text}: the run makes updates 1 to {updates}; name two of them in order"
        )
    if len(span) > MOST:
        raise ValueError(
            f"--profile {text} has {len(span)} updates, and a trace holds {MOST}; a few are enough"
        )
    return span
