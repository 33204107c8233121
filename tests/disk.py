"""What several test files put on disk."""

import json
import resource
from contextlib import contextmanager
from dataclasses import replace

import jax

from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.runs.config import load, to_json
from easyanimate_jax.training.checkpoint import Checkpoints
from easyanimate_jax.training.step import TrainState

FLOW = Flow()


def flip_a_bit(folder):
    """In the middle of the largest file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)


@contextmanager
def files_of_at_most(size):
    """The kernel refuses to write beyond `size` bytes of a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_run(
    folder,
    models,
    vae="weights/vae",
    text="weights",
    process=FLOW,
    prints=None,
    objective=None,
):
    """A run folder with checkpoints 3 and 7; `models` are the raw and averaged weights at 7.

    `prints` are the fingerprints of the VAE and the text encoders that it was trained with.
    """
    config = replace(
        load("configs/demo.py"),
        model=replace(models[0].config, in_channels=16),
        vae=str(vae),
        text=str(text),
        process=process,
    )
    stages = tuple(replace(stage, objective=objective) for stage in config.stages)
    config = replace(config, stages=stages, init="weights" if objective else "")
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    meta = {"in_channels": models[0].config.in_channels, "config": json.loads(to_json(config))}
    meta["weights"] = prints or {}
    meta["stage"] = "small_t2v" if meta["in_channels"] == 16 else "medium_i2v"
    zero = jax.numpy.zeros((), jax.numpy.int32)
    for step, (raw, ema) in ((3, models[::-1]), (7, models)):
        checkpoints.save(step, TrainState(zero, zero, raw, ema, ()), meta)
    checkpoints.close()
