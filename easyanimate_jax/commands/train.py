"""Train a transformer by the stages of a config; run the same command to resume."""

import ast
import gc
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import Positional

from easyanimate_jax import processes
from easyanimate_jax.commands import STARTED, parse
from easyanimate_jax.commands.jax_settings import set_up_jax
from easyanimate_jax.storage.errors import is_of_jax
from easyanimate_jax.storage.stores import place
from easyanimate_jax.training.safety.exits import DONE, FOUND, PEERS_LOST, PREEMPTED
from easyanimate_jax.training.safety.faults import Faults

CONFIGS = Path(__file__).parents[2] / "configs"
HELP = """Train a transformer by the stages of a config, or a video autoencoder by a VAE's config.

Run the same command to resume: the result is bit-identical to an uninterrupted run. SIGTERM saves a
checkpoint and ends the run with exit code 42. SIGUSR2 has a process trace its next five updates for
xprof, as --profile does.

Every field of the config is an option, `--field value`. A dot selects a field of a field, and a
number an item of a list. `CONFIG --help` lists all fields with their values. Examples:

  python train.py configs/demo.py --stages.0.steps 10
  python train.py configs/v5_12b.py --mesh.fsdp 8 --optimizer.matrices muon --run runs/mine"""


@dataclass(frozen=True)
class Options:
    """The arguments of `train`."""

    config: Positional[str]
    """Python file that defines `config`, such as configs/demo.py."""
    replay: int | None = None
    """Instead of training, run the step after this checkpoint twice and compare the bits."""
    profile: str | None = None
    """Trace the updates FROM:TO, such as 101:105, into RUN/profiles; show them by xprof."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `train`; return the exit code."""
    return ending(partial(_train, arguments))


def ending(work: Callable[[], int]) -> int:
    """Return the exit code of a training.

    If one of several processes fails, it ends here at once, so that the others do not wait for it.
    """
    set_up_jax()
    # JAX creates many objects at a start: with the default thresholds the garbage collector takes
    # 10 % of the time.
    gc.set_threshold(100_000, 50, 50)
    # A request for a trace would end the process if it came before the loop listens for it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    several = processes.several_processes(os.environ)
    try:
        code = parse.run(work)
    except Exception as error:
        if not several:
            raise
        traceback.print_exc()
        code = PEERS_LOST if is_of_jax(error) else FOUND
    if code not in (DONE, PREEMPTED) and several:
        sys.stdout.flush()
        os._exit(code)  # a normal exit would wait for the others, which wait for this process
    return code


def _train(arguments: Sequence[str]) -> int:
    kinds = ("TrainConfig", "VAETrainConfig")
    own, config = parse.options_and_config(Options, arguments, "train", help_text(), kinds)
    return run_config(config, own.replay, own.profile)


def run_config(config, replay: int | None = None, profile: str | None = None) -> int:
    """Train by a TrainConfig or a VAETrainConfig with the other processes; return the exit code.

    `replay` is a step whose successor runs twice instead. Raises ValueError for it with a VAE.
    `profile` are updates to trace, "FROM:TO".
    """
    is_vae = type(config).__name__ == "VAETrainConfig"
    name, folder = ("--output", config.output) if is_vae else ("--run", config.run)
    parse.check_folder(name, place(folder) / "checkpoints")
    from easyanimate_jax.training.profiler import span_of  # a config was read, so JAX is there

    span = span_of(profile, sum(stage.steps for stage in config.stages))
    if span and replay is not None:
        raise ValueError("--profile traces a training, and --replay makes none; leave one out")
    processes.join()
    processes.start_logging()
    faults = Faults.from_environment(os.environ)
    if is_vae:
        from easyanimate_jax.training.vae.loop import train

        if replay is not None:
            raise ValueError("--replay is for transformers; leave it out to train this VAE")
        return train(config, faults, profile=span)
    from easyanimate_jax.runs import loop

    if replay is not None:
        return loop.replay(config, replay)
    return loop.train(config, faults, profile=span, began=STARTED)


def help_text() -> str:
    """Return the description of the verb, with a list of the files in configs/."""
    titles = {f"configs/{path.name}": _title(path) for path in sorted(CONFIGS.glob("*.py"))}
    width = max(map(len, titles), default=0)
    lines = [f"  {name.ljust(width)}  {title}" for name, title in titles.items()]
    return "\n".join([HELP, "Config files:", "", *lines])


def _title(path: Path) -> str:
    """Return the first words of a file's docstring, up to a full stop or a colon."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split())
    return re.split(r"[.:](?: |$)", text)[0]
