"""Train: `python train.py configs/demo.py [--stages.0.steps 10 ...]`.

With `--describe` the whole schedule is printed and no device is touched. With `--replay STEP` one
step is made twice from a checkpoint, to see whether the hardware makes the same bits.
"""

import gc
import logging
import os
import sys
import traceback
from typing import NoReturn

from easyanimate_jax import processes


def main(args: list[str]) -> int:
    # Of a GPU's memory JAX takes three quarters unless told.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    # JAX makes so many objects that the collector, by default, takes a tenth of a start.
    gc.set_threshold(100_000, 50, 50)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("easyanimate_jax").setLevel(logging.INFO)
    describe = "--describe" in args
    if describe:
        args = [a for a in args if a != "--describe"]
        os.environ["JAX_PLATFORMS"] = "cpu"
    replay = None
    if "--replay" in args[:-1]:
        place = args.index("--replay")
        replay = args[place + 1]
        args = args[:place] + args[place + 2 :]
    if not args or args[0].startswith("-") or not (replay is None or replay.isdigit()):
        usage = "usage: python train.py CONFIG [--describe | --replay STEP] [--field value ...]"
        print(usage, file=sys.stderr)
        return 2
    from easyanimate_jax.runs import config as configs

    try:
        config = configs.load(args[0], args[1:])
        if describe:
            from easyanimate_jax.runs.describe import describe_run

            print(describe_run(config))
            return 0
        processes.join()
        from easyanimate_jax.training.safety.faults import Faults

        faults = Faults.from_environment(os.environ)
        if isinstance(config, configs.VAETrainConfig):
            from easyanimate_jax.training.vae import loop as vae

            return vae.train(config, faults)
        from easyanimate_jax.runs import loop

        return loop.train(config, faults) if replay is None else loop.replay(config, int(replay))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: list[str]) -> NoReturn:
    """`main`, and the end of the process, whatever comes of it."""
    several = processes.several_processes(os.environ)
    try:
        code = main(args)
    except Exception:
        if not several:
            raise
        traceback.print_exc()
        code = 1
    if code not in (0, 42) and several:
        sys.stdout.flush()
        os._exit(code)  # leaving in order would wait for the others, who wait for us
    sys.exit(code)
