"""Measure the cost of the safeguards as a share of the demo's step, alternating in one process.

    python benchmarks/reliability/overhead.py

* guarded: the demo's train step with the finite check, and with the loop's calls to the monitor,
  the divergence detector and the checkpoints; the monitor's thread watches, beats and writes
  goodput
* bare: the same program without the check and without these calls
* fingerprints: computed once in `save_every` steps of the demo
* save stall: the time that the loop waits for `save`, fingerprints included
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny import write_results

from easyanimate_jax import MMDiT
from easyanimate_jax.data.loader import Batch
from easyanimate_jax.runs.config import load
from easyanimate_jax.training import step as step_module
from easyanimate_jax.training.checkpoint import Checkpoints, describe, named_leaves
from easyanimate_jax.training.optimizer import make_optimizer
from easyanimate_jax.training.safety.divergence import Detector
from easyanimate_jax.training.safety.monitor import Monitor
from easyanimate_jax.training.step import init_state, train_step

ROUNDS, STEPS = 24, 5
ROWS, LENGTH = 16, 48  # the demo's longest stage


def make_batch(config) -> Batch:
    """Return a batch of random numbers."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal((1, ROWS, *shape)).astype(np.float32)  # noqa: E731
    return Batch(
        mean=draw(LENGTH, 64),
        logvar=draw(LENGTH, 64) - 4,
        grid=np.tile(np.array([3, 4, 4], np.int32), (1, ROWS, 1)),
        lengths=np.full((1, ROWS), LENGTH, np.int32),
        texts=tuple(draw(16, width) for width in config.model.text_widths),
        condition=None,
        weight=np.ones((1, ROWS), np.float32),
    )


class Guards:
    """The safeguards around a step: monitor, detector and checkpoints, called as by the trainer."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.detector, self.checkpoints = Detector(), Checkpoints(folder / "checkpoints", keep=2)

    def __enter__(self):
        self.monitor = Monitor(self.folder, process=0, hang_seconds=120)
        return self

    def __exit__(self, *_):
        self.monitor.close()

    def around(self, number: int, step: Callable) -> None:
        self.monitor.enter("data", number)
        self.monitor.enter("step", number)
        step()
        self.checkpoints.poll()
        self.detector.see(number, 1.0, 1.0)


def seconds(call: Callable) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def programs(config):
    """Return (checked step, step without the check, state); the steps take no arguments."""
    optimizer = make_optimizer(config.optimizer)
    model = lambda key: MMDiT(config.model, rngs=nnx.Rngs(params=key))  # noqa: E731
    state = jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    arguments = state, make_batch(config), jax.random.key(1), jnp.float32(1e-3)
    make = partial(
        train_step, optimizer=optimizer, process=config.process, ema_decay=config.ema_decay
    )
    checked = jax.jit(lambda *a: make(*a)).lower(*arguments).compile()
    with mock.patch.object(step_module.jnp, "isfinite", lambda x: jnp.ones_like(x, bool)):
        unchecked = jax.jit(lambda *a: make(*a)).lower(*arguments).compile()
    return *(partial(program, *arguments) for program in (checked, unchecked)), state


def alternate(guards: Guards, checked: Callable, unchecked: Callable):
    """Return (seconds of the bare rounds, ratios of the guarded to the bare rounds)."""

    def bare() -> None:
        for _ in range(STEPS):
            jax.block_until_ready(unchecked())

    def guarded() -> None:
        for number in range(STEPS):
            guards.around(number, lambda: jax.block_until_ready(checked()))

    times = {"bare": [], "guarded": []}
    for turn in range(ROUNDS):
        for name in sorted(times, reverse=turn % 2 == 1):
            if name == "bare":
                times[name].append(seconds(bare))
                continue
            with guards:
                times[name].append(seconds(guarded))
    return times["bare"], [a / b for a, b in zip(times["guarded"], times["bare"], strict=True)]


def calls_alone(guards: Guards, count: int = 2000) -> float:
    """Return the seconds per step of the loop's calls to the guards."""
    with guards:
        total = seconds(lambda: [guards.around(n, lambda: None) for n in range(count)] and ())
    return total / count


def save_stall(checkpoints: Checkpoints, state) -> float:
    """Return the seconds that the loop waits for a save."""
    stalls = []
    for number in range(1, 5):
        stalls.append(seconds(lambda n=number: checkpoints.save(n, state, {"step": n})))
        checkpoints.finish()
    return statistics.median(stalls[1:])


def main() -> None:
    """Measure all costs, and write the result."""
    config = load("configs/demo.py")
    checked, unchecked, state = programs(config)
    named = named_leaves(state)
    with tempfile.TemporaryDirectory() as folder:
        guards = Guards(Path(folder))
        bare, ratios = alternate(guards, checked, unchecked)
        host = calls_alone(guards)
        describe(named)  # compiles
        prints = statistics.median(seconds(lambda: describe(named) and ()) for _ in range(5))
        stall = save_stall(guards.checkpoints, state)
        guards.checkpoints.close()
    step, guard = statistics.median(bare) / STEPS, statistics.median(ratios) - 1
    low, high = (q - 1 for q in np.percentile(bootstrap(ratios), (5, 95)))
    every, size = config.save_every, sum(x.nbytes for x in named.values()) / 1e6
    total = guard + prints / (every * step)
    write_results(
        "overhead",
        "python benchmarks/reliability/overhead.py",
        [
            f"bare step: {step * 1e3:.1f} ms; load average {os.getloadavg()[0]:.1f}",
            f"finite check, monitor with watchdog, heartbeat and goodput, detector, poll: "
            f"{guard:+.2%} (median of {ROUNDS} paired ratios of {STEPS} steps; 90 % of resampled "
            f"medians lie from {low:+.2%} to {high:+.2%})",
            f"of it the loop's calls: {host * 1e6:.0f} us, {host / step:.3%}",
            f"fingerprints of {size:.0f} MB in {len(named)} arrays: {prints * 1e3:.0f} ms once in "
            f"{every} steps, {prints / (every * step):.3%}",
            f"**together {total:.2%} of the step time**",
            f"save stall, fingerprints included: {stall * 1e3:.0f} ms once in {every} steps, "
            f"{stall / (every * step):.2%}",
        ],
    )


def bootstrap(ratios: list[float]) -> np.ndarray:
    """Return the medians of resampled ratios."""
    rng = np.random.default_rng(0)
    return np.median(rng.choice(ratios, (1000, len(ratios))), axis=1)


if __name__ == "__main__":
    main()
