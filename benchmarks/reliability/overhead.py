"""What the safeguards cost, as a share of the demo's step, measured in alternation in one process.

    python benchmarks/reliability/overhead.py

* guarded: the demo's train step with the finite check, under a monitor whose thread watches, beats
  and writes goodput, with the loop's calls to it, to the divergence detector and to the checkpoints
* bare: the same program with the check folded away, and nothing around it
* fingerprints: once in `save_every` steps of the demo
* save stall: what `save` keeps the loop waiting, fingerprints included
"""

import os
import statistics
import sys
import tempfile
import time
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

from easyanimate_jax.config import load
from easyanimate_jax.data.loader import Batch
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.training import step as step_module
from easyanimate_jax.training.checkpoint import Checkpoints, describe, named_leaves
from easyanimate_jax.training.divergence import Detector
from easyanimate_jax.training.monitor import Monitor
from easyanimate_jax.training.optimizer import make_optimizer
from easyanimate_jax.training.step import init_state, train_step

ROUNDS, STEPS = 24, 5
ROWS, LENGTH = 16, 48  # the demo's longest stage


def make_batch(config) -> Batch:
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


def main() -> None:
    config = load("configs/demo.py")
    optimizer = make_optimizer(config.optimizer)
    state = jax.jit(
        lambda key: init_state(
            lambda k: MMDiT(config.model, rngs=nnx.Rngs(params=k)), optimizer, key
        )
    )(jax.random.key(0))
    batch, key, rate = make_batch(config), jax.random.key(1), jnp.float32(1e-3)
    make = partial(
        train_step, optimizer=optimizer, process=config.process, ema_decay=config.ema_decay
    )
    arguments = (state, batch, key, rate)
    checked = jax.jit(lambda *a: make(*a)).lower(*arguments).compile()
    with mock.patch.object(step_module.jnp, "isfinite", lambda x: jnp.ones_like(x, bool)):
        unchecked = jax.jit(lambda *a: make(*a)).lower(*arguments).compile()

    def seconds(call) -> float:
        began = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - began

    def bare() -> None:
        for _ in range(STEPS):
            jax.block_until_ready(unchecked(*arguments))

    def guarded() -> None:
        for number in range(STEPS):
            monitor.enter("data", number)
            monitor.enter("step", number)
            jax.block_until_ready(checked(*arguments))
            checkpoints.poll()
            detector.see(number, 1.0, 1.0)

    with tempfile.TemporaryDirectory() as folder:
        detector, checkpoints = Detector(), Checkpoints(Path(folder) / "checkpoints", keep=2)
        times = {"bare": [], "guarded": []}
        for turn in range(ROUNDS):
            for name in sorted(times, reverse=turn % 2 == 1):
                if name == "bare":
                    times[name].append(seconds(bare))
                    continue
                monitor = Monitor(Path(folder), process=0, hang_seconds=120)
                times[name].append(seconds(guarded))
                monitor.close()
        step = statistics.median(times["bare"]) / STEPS
        ratios = [a / b for a, b in zip(times["guarded"], times["bare"], strict=True)]
        guard = statistics.median(ratios) - 1
        low, high = (q - 1 for q in np.percentile(bootstrap(ratios), (5, 95)))
        monitor = Monitor(Path(folder), process=0, hang_seconds=120)
        began, count = time.perf_counter(), 2000
        for number in range(count):
            monitor.enter("data", number)
            monitor.enter("step", number)
            checkpoints.poll()
            detector.see(number, 1.0, 1.0)
        host = (time.perf_counter() - began) / count
        named = named_leaves(state)
        describe(named)  # compiles
        prints = statistics.median(seconds(lambda: describe(named) and ()) for _ in range(5))
        stalls = []
        for number in range(1, 5):
            stalls.append(seconds(lambda n=number: checkpoints.save(n, state, {"step": n})))
            checkpoints.finish()
        checkpoints.close()
        monitor.close()
    stall = statistics.median(stalls[1:])
    every = config.save_every
    total = guard + prints / (every * step)
    size = sum(x.nbytes for x in named.values()) / 1e6
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
    """Medians of resampled ratios."""
    rng = np.random.default_rng(0)
    return np.median(rng.choice(ratios, (1000, len(ratios))), axis=1)


if __name__ == "__main__":
    main()
