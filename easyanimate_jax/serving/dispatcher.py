"""The thread that gives the queued jobs to the engine, and writes into the queue how they end."""

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from easyanimate_jax.serving.engine import Settings
from easyanimate_jax.serving.fields import told
from easyanimate_jax.serving.store import Job, Store

LOG = logging.getLogger(__name__)
ENGINE = (sys.executable, "-m", "easyanimate_jax.serving.engine")
IDLE = 1.0  # seconds after which the queue is looked at without a call of `wake`
OFTEN = 0.1  # seconds between two updates of the progress
SIGNALS = {signal.SIGKILL: " (SIGKILL: perhaps too little memory)"}


class Dispatcher(threading.Thread):
    """Runs the engine as a child process and feeds it batches of at most `batch` like jobs.

    An engine that ends, or that works longer than `limit` seconds on one batch, is started again:
    its jobs are then tried alone, and a job that ended two engines fails. `ready` is set once the
    first model is loaded, and `broken` while it cannot be.
    """

    def __init__(self, store: Store, settings: Settings, *, batch: int = 4, limit: float = 3600.0):
        super().__init__(name="dispatcher", daemon=True)
        self.store, self.settings = store, settings
        self.batch, self.limit = batch, limit
        self.ready, self.broken = threading.Event(), threading.Event()
        self._more, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()  # of the pipe to the engine
        self._engine: subprocess.Popen | None = None
        self._current: frozenset[str] = frozenset()  # ids of the batch that is made
        self._lost: Sequence[str] = ()  # ids of a batch whose end could not be written
        self._failed = ""  # the error of the last round, which is told once

    def run(self) -> None:
        """Feed the engine until `close`."""
        while not self._ended.is_set():
            try:
                if self._lost:
                    self.store.requeue(self._lost, died=False)
                    self._lost = ()
                if self._engine is None:
                    self._start()
                jobs = self.store.claim(self.batch) if self._engine else []
                if jobs:
                    self._make(jobs)
                else:
                    self._more.wait(IDLE)
                    self._more.clear()
                self._failed = ""
            except Exception as error:  # such as a full disk: the next round tries again
                if self._failed != repr(error):
                    LOG.exception("the dispatcher failed, and tries again every %g s", IDLE)
                self._failed = repr(error)
                self._kill()
                self._ended.wait(IDLE)

    def wake(self) -> None:
        """Say that there is a new job."""
        self._more.set()

    def cancel(self, id: str) -> Job | None:
        """Cancel a job; if it is being made, at its next step. Return it, or None."""
        job = self.store.cancel(id)
        if job and job.status == "in_progress":
            with self._lock:
                if id in self._current:
                    self._send({"cancel": id})
        return job

    def close(self) -> None:
        """End the engine; the jobs that it made are queued again when the next server starts."""
        self._ended.set()
        self.wake()
        self._kill()
        if self.is_alive():
            self.join(10)

    def _start(self) -> None:
        """Start the engine, and load the first model."""
        settings = json.dumps(self.settings._asdict() | {"loras": dict(self.settings.loras)})
        self._engine = subprocess.Popen(
            [*ENGINE, str(self.store.folder), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        first = next(iter(self.settings.models))
        self.broken.clear()
        self._send({"load": first})
        died = self._events(())
        if died is not None and not self._ended.is_set():
            self.broken.set()
            LOG.error("the engine ended (%s) while it loaded %s; it is started again", died, first)
            self._kill()
            self._ended.wait(5 * IDLE)
        elif not self.broken.is_set():
            self.ready.set()

    def _make(self, jobs: Sequence[Job]) -> None:
        """Have a batch made, and queue again what the engine did not end."""
        ids = [job.id for job in jobs]
        LOG.info("%s: %d job(s) of %s", ", ".join(ids), len(ids), jobs[0].model)
        orders = [{"id": job.id, "request": job.request} for job in jobs]
        self._lost = ids  # until each has ended
        with self._lock:
            self._current = frozenset(ids)
            self._send({"model": jobs[0].model, "jobs": orders})
        try:
            # One that was cancelled after it was claimed and before the engine had it.
            for id in ids:
                if (job := self.store.get(id)) and job.cancelled:
                    self.cancel(id)
            died = self._events(ids)
        finally:
            with self._lock:
                self._current = frozenset()
        if died is not None:
            self._kill()
            stopped = self._ended.is_set()
            if not stopped:
                LOG.error("the engine ended (%s) while it made %s", died, ", ".join(ids))
            self.store.requeue(ids, died=not stopped)
        self._lost = ()

    def _events(self, ids: Sequence[str]) -> str | None:
        """Follow the engine until it is idle: return None, or how it ended instead."""
        overtime = threading.Timer(self.limit, self._overtime, [ids])
        overtime.daemon = True
        overtime.start()
        last = 0.0
        try:
            for line in self._engine.stdout:
                event = json.loads(line)
                kind = event["event"]
                if kind == "idle":
                    return None
                if kind == "progress" and time.monotonic() - last > OFTEN:
                    last = time.monotonic()
                    self.store.advance(ids, min(99, 1 + 98 * event["done"] // event["of"]))
                elif kind == "unusable":
                    self.broken.set()
                    LOG.error("%s cannot be loaded: %s", event["model"], event["message"])
                elif kind == "made":
                    for note in event["notes"]:
                        LOG.warning("%s: %s", event["id"], note)
                    self.store.complete(event["id"], event["file"], event["seconds"])
                elif kind == "failed":
                    message = told(event["message"], self.store, event["id"], self.settings)
                    self.store.fail(event["id"], event["code"], message)
        finally:
            overtime.cancel()
        code = self._engine.wait()
        return f"exit code {code}{SIGNALS.get(-code, '')}"

    def _overtime(self, ids: Sequence[str]) -> None:
        for id in ids:
            self.store.fail(id, "timeout", f"not finished within {self.limit:g} s")
        self._kill()

    def _send(self, order: dict) -> None:
        """Write one line to the engine; one that has ended is noticed by its closed output."""
        with contextlib.suppress(OSError):
            self._engine.stdin.write(json.dumps(order) + "\n")
            self._engine.stdin.flush()

    def _kill(self) -> None:
        engine = self._engine
        if engine is None:
            return
        engine.kill()
        engine.wait()
        with contextlib.suppress(OSError):
            engine.stdin.close()
        if threading.current_thread() is self:
            engine.stdout.close()
            self._engine = None
