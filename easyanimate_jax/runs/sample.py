"""Sample a model: process requests in batches and write numbered files."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from easyanimate_jax.data import media
from easyanimate_jax.generation.denoising import Sampling, make_plan
from easyanimate_jax.generation.guard import suspicion
from easyanimate_jax.generation.inputs import Model, complete, read_inputs
from easyanimate_jax.generation.outputs import Origin, record, write
from easyanimate_jax.generation.protocols import Files
from easyanimate_jax.generation.request import (
    FILES,
    SAMPLING,
    Asked,
    SampleRequest,
    given,
    option,
    read_times,
)
from easyanimate_jax.generation.rows import Request
from easyanimate_jax.generation.ways import way_of
from easyanimate_jax.runs.parts import Opened
from easyanimate_jax.storage.stores import Place

Say = Callable[[str], None]  # takes warnings: of requests that work, but perhaps not as expected


def examine(
    asked: Sequence[Asked],
    opened: Opened,
    files: Files = media,
    allow: Callable[[SampleRequest], None] = lambda request: None,
) -> list[Asked]:
    """Return the requests with defaults filled in and the number of model evaluations of each.

    Uses no device. `files` is that of `inputs.complete`. `allow` is called with each completed
    request before its files are read, and may raise. Raises ValueError, with the line of the
    prompt file, for a request that the model does not support or a file that cannot be read.
    """
    process, samples, found = opened.process, opened.samples, []
    size = samples.frames, samples.height, samples.width
    model = Model(str(opened.path), opened.config.in_channels, *size, opened.fps, opened.defaults)
    for one in asked:
        with one.named():
            request = complete(one.request, model, files)
            allow(request)
            strength = 1.0 if request.strength is None else request.strength
            sampling = sampling_of(request)
            calibration = opened.calibration.read() if sampling.magcache else None
            plan = make_plan(process, sampling, strength, calibration)
            read_inputs(
                request, files
            )  # only a check: films are too large to keep, so read again later
        found.append(one._replace(request=request, evaluations=plan.evaluations))
    return found


def sampling_of(request: SampleRequest) -> Sampling:
    """Return the sampling settings of a request."""
    options = {name: getattr(request, name) for name in SAMPLING if given(request, name)}
    return Sampling(**options | {"times": read_times(request.times)})


def make(
    asked: Sequence[Asked],
    run,
    origin: Origin,
    output: Place,
    *,
    batch: int,
    tile: int | None,
    gif: bool,
    say: Say,
) -> Iterator[Place]:
    """Sample the requests with a `runs.load.Pipeline`; yield the path of each output file.

    `batch` is the number of requests that are sampled at once. With a `tile`, videos are decoded in
    tiles of so many pixels.
    """
    warn(asked, run.encoder, say)
    for rows in _batches(asked, batch):
        began = time.perf_counter()
        # The bar appears at the first step; before it, the memory of the programs is printed.
        total = evaluations(rows[0])
        with tqdm(desc="denoising", unit="step", total=total, delay=1e-3) as bar:
            videos = generate(rows, run, tile, say, progress=lambda number, bar=bar: bar.update())
        seconds = (time.perf_counter() - began) / len(rows)
        for one, frames in zip(rows, videos, strict=True):
            sidecar = record(one, origin, output, seconds)
            yield write(output, frames, sidecar, fps=one.request.fps, gif=gif)
            if problem := suspicion(frames):
                say(f"{one.where}{problem}")


def evaluations(one: Asked) -> int:
    """Return how often the network is evaluated for an examined request."""
    return way_of(one.request)[2] * one.evaluations


def generate(
    rows: Sequence[Asked],
    run,
    tile: int | None,
    say: Say,
    *,
    progress: Callable[[int], None],
    files: Files = media,
) -> UInt8[np.ndarray, "B F H W 3"]:
    """Return the videos of requests of one shape, sampled as one batch.

    `progress` is that of `generation.rows.Request`, `files` that of `examine`.
    """
    requests = [one.request for one in rows]
    first = requests[0]
    way, options, _ = way_of(first)
    parts = [read_inputs(request, files) for request in requests]
    inputs = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    request = Request(
        run.encoder.encode([request.prompt for request in requests]),
        run.encoder.encode([request.negative_prompt for request in requests]),
        size=(first.frames, first.height, first.width),
        seeds=[request.seed for request in requests],
        sampling=sampling_of(first),
        tile=tile,
        progress=progress,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        videos = way(run.diffusion, request, **inputs, **options)
    for warning in told:
        say(str(warning.message))
    return videos


def warn(asked: Sequence[Asked], encoder, say: Say) -> None:
    """Say what of requests that work may surprise: a sampler, or texts that are cut."""
    if asked and asked[0].request.sampler == "pndm":
        say("pndm starts as if a little of the video were known; ddim fits better")
    for one in asked:
        for name in ("prompt", "negative_prompt"):
            if encoder.is_cut(getattr(one.request, name)):
                say(f"{one.where}--{option(name)} is too long, its end is not used")


def _batches(asked: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Yield groups of neighbouring requests of one shape, at most `size` in a group."""

    for _, alike in groupby(asked, key=lambda one: shape_of(one.request)):
        alike = list(alike)
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


def shape_of(request: SampleRequest) -> tuple:
    """Return what must be equal in completed requests that are sampled as one batch.

    Beside it the options of sampling must be equal; lines of a prompt file always share them.
    """
    names = tuple(name for name in (*FILES, "segment") if given(request, name))
    size = request.frames, request.height, request.width
    return names, *size, request.strength, request.segment, request.overlap
