"""Make videos and pictures from a checkpoint folder.

  text to video    sample.py runs/demo/train --prompt "a red circle moves to the left"
  text to picture  sample.py RUN --prompt "..." --frames 1
  image to video   sample.py RUN --prompt "..." --image start.png --end-image end.png
  longer           sample.py RUN --prompt "..." --frames 97 --segment 49
  video to video   sample.py RUN --prompt "..." --video film.mp4 --strength 0.7
  inpainting       sample.py RUN --prompt "..." --video film.mp4 --mask hole.png
  control          sample.py RUN --prompt "..." --control film.mp4 --operator canny
  camera           sample.py RUN --prompt "..." --camera poses.txt --reference look.png
  many             sample.py RUN --prompts lines.jsonl

Adds NUMBER.mp4 (or .png), a contact sheet and NUMBER.json, which holds all that is needed to make
it again. What cannot work is refused in one line with exit code 2, before a device starts.
"""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby

import numpy as np

from easyanimate_jax.generation.guard import suspicion
from easyanimate_jax.generation.inputs import complete, read_inputs
from easyanimate_jax.generation.options import (
    FILES,
    SAMPLING,
    check,
    given,
    option,
    parser,
    read_mesh,
    requests,
)
from easyanimate_jax.generation.outputs import finished, identity, record, write


def main(argv: list[str] | None = None) -> int:
    a = parser(__doc__).parse_args(argv)
    logging.basicConfig(format="sample.py: %(message)s")
    # Of a GPU's memory JAX takes three quarters unless told.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    try:
        todo = requests(a)
        for one in todo:
            with naming(one):
                check(one)
        # JAX is imported here, and no device is touched before `on_mesh`.
        from easyanimate_jax.weights.run_folder import read_meta

        step, meta = read_meta(a.checkpoint)
        sampling = examine(a, todo, meta)
        a.output.mkdir(parents=True, exist_ok=True)
        done = finished(a.output)
        todo = [one for one in todo if one.line is None or identity(one, step) not in done]
        with on_mesh(a.mesh):
            make(a, todo, meta, sampling)
    except (ValueError, OSError) as error:
        say(error)
        return 2
    except (MemoryError, RuntimeError) as error:  # of NumPy, of XLA
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = str(error).partition("\n")[0]
        say(f"there is too little memory; ask for fewer frames, or a smaller size ({why})")
        return 2
    return 0


def make(a: argparse.Namespace, todo: list[argparse.Namespace], meta: dict, sampling) -> None:
    """Load, sample and write; a batch of requests at a time."""
    from easyanimate_jax.runs.load import load_pipeline

    run = load_pipeline(a.checkpoint, low_memory=a.memory == "low", int8=a.weights == "int8")
    if a.memory == "all":  # read now, for they count when it is asked what else fits
        _ = run.diffusion.model, run.diffusion.vae
    logging.getLogger("easyanimate_jax.memory").setLevel(logging.INFO)
    warn(a, todo, run.encoder)
    for rows in batches(todo, a.batch):
        began = time.perf_counter()
        videos = generate(rows, run, sampling)
        seconds = (time.perf_counter() - began) / len(rows)
        for one, frames in zip(rows, videos, strict=True):
            print(write(one, frames, record(one, run.step, meta, seconds)))
            if problem := suspicion(frames):
                say(f"{one.where}{problem}")


def on_mesh(text: str | None):
    """The devices of `data=2,context=4` as the current mesh; without a text one device."""
    import jax

    from easyanimate_jax.sharding import MeshConfig, make_mesh

    if text is None:
        return nullcontext()
    return jax.set_mesh(make_mesh(MeshConfig(**{"fsdp": 1} | read_mesh(text))))


def say(what) -> None:
    print(f"sample.py: {what}", file=sys.stderr)


@contextmanager
def naming(one: argparse.Namespace) -> Iterator[None]:
    """Errors name the line of the prompt file."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{one.where}{error}") from error


def examine(a: argparse.Namespace, todo: list[argparse.Namespace], meta: dict):
    """How to sample; every request is completed and tried beside the checkpoint."""
    from easyanimate_jax.generation.denoising import Sampling, make_tables
    from easyanimate_jax.runs.config import from_json

    settings = {name: getattr(a, name) for name in SAMPLING}
    sampling = Sampling(**settings | {"guided": tuple(a.guided)})
    process = from_json(json.dumps(meta["config"]["process"]))
    for one in todo:
        with naming(one):
            complete(one, meta)
            strength = 1.0 if one.strength is None else one.strength
            one.evaluations = int(make_tables(process, sampling, strength).count)
            read_inputs(one)  # tried now, read again when its turn comes: films are large
    return sampling


def warn(a: argparse.Namespace, todo: list[argparse.Namespace], encoder) -> None:
    """What works, and not as its user may think."""
    if a.sampler == "pndm":
        say("pndm starts as if a little of the video were known; ddim fits better")
    for one in todo:
        for name in ("prompt", "negative_prompt"):
            if encoder.is_cut(getattr(one, name)):
                say(f"{one.where}--{option(name)} is too long, its end is not used")


def batches(todo: list[argparse.Namespace], size: int) -> Iterator[list[argparse.Namespace]]:
    """Neighbours of one shape, so many at once."""

    def shape_of(a):
        names = tuple(name for name in (*FILES, "segment") if given(a, name))
        return names, a.frames, a.height, a.width, a.strength, a.segment

    for _, alike in groupby(todo, key=shape_of):
        alike = list(alike)
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


def generate(rows: list[argparse.Namespace], run, sampling) -> np.ndarray:
    """(B, F, H, W, 3) uint8."""
    import jax
    from tqdm import tqdm

    from easyanimate_jax.generation.pipelines import Request

    way, options, evaluations = way_of(rows[0])
    parts = [read_inputs(one) for one in rows]
    inputs = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    # Shown from the first step on: before it stands what the programs take.
    bar = tqdm(desc="denoising", unit="step", total=evaluations, delay=1e-3)
    request = Request(
        run.encoder.encode([one.prompt for one in rows]),
        run.encoder.encode([one.negative_prompt for one in rows]),
        size=(rows[0].frames, rows[0].height, rows[0].width),
        seeds=[one.seed for one in rows],
        sampling=sampling,
        progress=lambda number: bar.update(),
    )
    with bar, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        videos = way(run.diffusion, request, **inputs, **options)
        jax.effects_barrier()
    for warning in told:
        say(warning.message)
    return videos


def way_of(a: argparse.Namespace):
    """(the pipeline, its own options beside the files, evaluations of the network)"""
    from easyanimate_jax.generation import pipelines

    way = pipelines.choose([name for name in FILES if given(a, name)], a.frames, a.segment)
    noise = {"picture_noise": a.picture_noise}
    if way is pipelines.long_video:
        count = len(pipelines.segments(a.frames, a.segment))
        return way, {"segment": a.segment}, count * a.evaluations
    if way is pipelines.video_to_video:
        return way, {"strength": a.strength} | noise, a.evaluations
    return way, noise if way is pipelines.image_to_video else {}, a.evaluations
