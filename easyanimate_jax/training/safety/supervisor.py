"""Start the processes of a run, watch them, and restart them after a failure.

    python -m easyanimate_jax supervise --ranks 2 -- python train.py configs/demo.py

The supervisor imports only the exit codes from this package, so that its errors cannot stop it. If
one rank dies, or its heartbeat stops, it ends all ranks within seconds. (A heartbeat stops if the
rank is stopped or stuck in native code; a hang in Python ends the rank, see monitor.py.) It
restarts the ranks after a growing pause, as long as restarts make progress. If a restart cannot
help, it exits with the code of the ranks:

    0 done   2 bad input   3 diverged   4 hang   5 storage   6 another process is gone
    42 preempted: run again to resume

It forwards SIGTERM to the ranks, which save and exit, and SIGUSR2, after which they trace some
updates (training/profiler.py). On a cluster run one supervisor per host, or let the scheduler watch
the hosts: docs/reliability.md.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from easyanimate_jax.training.safety.exits import DONE, FINAL, HANG, PREEMPTED

POLL = 0.1  # seconds
STACKS = 1.0  # seconds in which running ranks print their stacks
MAX_PAUSE = 60.0  # seconds before a restart
WITHOUT_PROGRESS = 3  # restarts without progress before it gives up


class Supervisor:
    """Runs `ranks` processes of `command`; one without a heartbeat for `silence` s is dead."""

    def __init__(self, command: Sequence[str], ranks: int, silence: float):
        self.command, self.count, self.silence = list(command), ranks, silence
        self.beats = Path(os.environ.get("EASYANIMATE_HEARTBEATS") or tempfile.mkdtemp())
        self.beats.mkdir(exist_ok=True)
        self.ranks: list[subprocess.Popen] = []
        self.terminated = False
        signal.signal(signal.SIGTERM, self._terminate)
        signal.signal(signal.SIGUSR2, lambda how, _: self._signal(how))

    def run(self) -> int:
        """Run the ranks until they finish or a restart cannot help; return the exit code."""
        furthest, fruitless, pause = -1, 0, 1.0
        while True:
            self._start()
            code = self._watch()
            step = max((beat["step"] for beat in self._beats()), default=-1)
            if code in FINAL or self.terminated:
                return code
            fruitless = 0 if step > furthest else fruitless + 1
            pause = 1.0 if step > furthest else min(2 * pause, MAX_PAUSE)
            furthest = max(furthest, step)
            if fruitless == WITHOUT_PROGRESS:
                self._say(f"{fruitless} restarts have not come further than step {furthest}")
                return code
            self._say(f"exit code {code} at step {step}; starting again in {pause:.0f} s")
            time.sleep(pause)
            if self.terminated:
                return code

    def _start(self) -> None:
        for old in self.beats.glob("*.json"):
            old.unlink()
        with socket.socket() as probe:  # loopback: other hosts cannot reach the coordinator
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self.count)}
        self.ranks = []
        for rank in range(self.count):
            environment = os.environ | {"EASYANIMATE_HEARTBEATS": str(self.beats)}
            if self.count > 1:
                environment |= several | {"JAX_PROCESS_ID": str(rank)}
            self.ranks.append(
                subprocess.Popen(
                    self.command,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            )
        if self.terminated:
            self._signal(signal.SIGTERM)

    def _watch(self) -> int:
        """Wait for the ranks; return the code of one that failed, or the largest code.

        One that a signal ended counts first: others may have failed because it was gone.
        """
        while True:
            codes = [rank.poll() for rank in self.ranks]
            failures = [code for code in codes if code not in (None, DONE, PREEMPTED)]
            failed = min(failures, key=lambda code: code > 0, default=None)
            silent = self._silent()
            if failed is None and not silent:
                if None not in codes:
                    return max(codes)
                time.sleep(POLL)
                continue
            if silent:
                self._say(f"no heartbeat of rank {silent} for {self.silence:.0f} s")
            self._end()
            return HANG if failed is None else failed

    def _end(self) -> None:
        """End all ranks; those that still run print their stacks first."""
        for how in (signal.SIGCONT, signal.SIGUSR1):
            self._signal(how)
        deadline = time.monotonic() + STACKS
        while time.monotonic() < deadline and any(rank.poll() is None for rank in self.ranks):
            time.sleep(POLL)
        for rank in self.ranks:  # the process group, with the rank's workers
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()

    def _silent(self) -> list[int]:
        """Return the running ranks whose heartbeat stopped."""
        return [
            beat["rank"]
            for beat in self._beats()
            if time.time() - beat["time"] > self.silence and self.ranks[beat["rank"]].poll() is None
        ]

    def _beats(self) -> list[dict]:
        found = []
        for file in self.beats.glob("*.json"):
            with contextlib.suppress(ValueError, FileNotFoundError):
                found.append(json.loads(file.read_text()) | {"rank": int(file.stem)})
        return found

    def _terminate(self, *_) -> None:
        self.terminated = True
        self._signal(signal.SIGTERM)

    def _signal(self, how: signal.Signals) -> None:
        """Send a signal to all ranks that have a heartbeat; SIGTERM goes to every running rank.

        Before its first heartbeat a rank has no handlers for the other signals.
        """
        ready = {beat["rank"] for beat in self._beats()}
        for rank, process in enumerate(self.ranks):
            if process.poll() is None and (rank in ready or how == signal.SIGTERM):
                process.send_signal(how)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # stderr may be closed
            print(f"supervisor: {text}", file=sys.stderr, flush=True)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
