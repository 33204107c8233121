"""Measure a model on captioned clips: loss, reconstructions, and new videos beside the true ones.

    OUT/latents/                 the encoded clips, see data/records.py
    OUT/real/00001.mp4 ...       the clips as the model sees them
    OUT/rebuilt/00001.mp4 ...    after encoding and decoding by the VAE
    OUT/made/00001.mp4 ...       made from their captions, and from what the task gives beside them
    OUT/vbench/PROMPT-0.mp4 ...  videos of prompts, named as VBench's tools want them
    OUT/evaluation.json          all figures, also of each clip

A call that was stopped goes on with the videos that are not there yet. Features are computed on the
written films, so that other tools can compute them on the same pixels.
"""

import dataclasses
import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from tqdm import tqdm

from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.loader import Batch
from easyanimate_jax.data.records import LatentSet, Records, read_texts
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.diffusion.tasks import TASKS, task_of
from easyanimate_jax.evaluation import report
from easyanimate_jax.evaluation.measures import frechet_interval, mean, psnr, ssim
from easyanimate_jax.facts import FPS, to_bytes
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.generation.pipelines import text_to_video
from easyanimate_jax.generation.rows import Request
from easyanimate_jax.prepare.clips import read_pixels
from easyanimate_jax.prepare.prepare import prepare, select
from easyanimate_jax.runs.batches import held_out_loader
from easyanimate_jax.runs.config import TrainConfig, ValidationConfig
from easyanimate_jax.runs.load import Pipeline
from easyanimate_jax.runs.parts import Opened
from easyanimate_jax.runs.samples import made_again, rebuilt, rows_of
from easyanimate_jax.runs.validation import loss_program, losses_of, summary
from easyanimate_jax.storage import whole
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.weights.identity import fingerprint, weights_print

NAME = "clips"  # of the only set and stage
RELEASED = Budget(13312, lengths=(13824,), sizes=(512,), frames=49, min_fill=0.5)
PER_PROMPT = 5  # videos of a prompt that VBench's standard mode asks for
AT_ONCE = 16  # videos of one call of a feature function
MOST_BYTES = 240  # of a prompt; a file name has at most 255
KINDS = ("real", "rebuilt", "made")

Videos = UInt8[np.ndarray, "B F H W 3"]


class Features(NamedTuple):
    """A source of the numbers behind the Fréchet distance: a function, or arrays."""

    name: str
    function: Callable[[Videos], np.ndarray] | None = None  # of videos of one shape -> (B, D)
    arrays: dict[str, np.ndarray] | None = None  # real (N, D) and made (N, D)


class Asked(NamedTuple):
    """The settings of a measurement, beside the model and the clips."""

    clips: int = 64  # most clips; those with the lowest hashes of their names
    videos: int = 64  # of them, the most that are made again
    batch: int = 1  # clips and videos at once
    sampling: Sampling = Sampling()
    seed: int = 44  # of noise, masks and captions
    fps: int = FPS  # of the model


class Evaluation:
    """A model, a source of clips, and the folder of the results.

    `run` is the pipeline of `opened`. Raises ValueError for clips that do not fit the model.
    """

    def __init__(
        self, opened: Opened, run: Pipeline, clips: Place, output: Path, asked: Asked, mesh: Mesh
    ):
        self.opened, self.run, self.clips = opened, run, clips
        self.output, self.asked, self.mesh = output, asked, mesh
        self.config = config_of(opened, clips, output, asked)
        self.stage = self.config.stages[0]
        jobs = select(self.config.sets[0], read_clips(clips)[0], self.config.seed)
        self.jobs = {job.clip.name: job for job in jobs}

    def measure(self, features: Features | None = None) -> Sequence[str]:
        """Write the films, the figures and the page; return the figures as lines.

        Raises ValueError for a folder that was begun with another model, clips or settings.
        """
        self._encode()
        settings = begin(self.output, self.opened, self.asked, clips=self.content)
        results = {"settings": settings, "loss": self._losses()}
        rows = self._films()
        for name in ("psnr", "ssim"):
            results[name] = mean([row[name] for row in rows])._asdict()
        if features is not None:
            results["distance"] = self._distance(rows, features)
        results["clips"] = rows
        text = json.dumps(results, indent=1, ensure_ascii=False)
        whole.replace_text(self.output / "evaluation.json", text)
        whole.replace_text(self.output / "index.html", report.page(results, self.read))
        return report.lines(results)

    def path(self, kind: str, number: int) -> Path:
        """Return the path of a film of a clip; `kind` is one of `KINDS`."""
        return self.output / kind / f"{number:05d}.mp4"

    def read(self, kind: str, row: dict) -> UInt8[np.ndarray, "F H W 3"] | None:
        """Return a film of a clip, or None if it was not made."""
        path = self.path(kind, row["number"])
        return media.read_clip(path, 0, row["frames"], 1) if path.is_file() else None

    def _encode(self) -> None:
        """Encode the clips, and open their records."""
        opened, config = self.opened, self.config
        prints = {"vae": fingerprint(opened.vae), "text": fingerprint(opened.text)}
        parts = config.sets, self.run.vae, self.run.encoder, ()
        prepare(self.clips, config.prepared, *parts, config.seed, weights=prints)
        records = Records(Path(config.prepared) / NAME)
        self.loader = held_out_loader(config, self.stage, self.mesh, records, 1.0)
        self.numbers = {record: i for i, record in enumerate(self.loader.plan.ids.tolist(), 1)}
        self.names, self.content = records.index["clip"].tolist(), records.header["content"]

    def _losses(self) -> dict:
        """Return the loss on the clips: its mean, its standard error, by time and by length."""
        program, model = loss_program(self.config, self.mesh), self.run.diffusion.model
        programs = {NAME: lambda arrays, keys: program(model, None, arrays, keys)}
        losses, lengths = losses_of(self.loader, self.mesh, programs)
        return summary(losses[NAME], lengths)

    def _films(self) -> list[dict]:
        """Write the films of each clip; return its number, name, captions, size, PSNR and SSIM.

        A film that exists is not made again.
        """
        rows, rng = [], np.random.default_rng(0)  # of references, which are not used
        for kind in KINDS:
            (self.output / kind).mkdir(exist_ok=True)
        with tqdm(total=len(self.numbers), desc="clips", unit="clip") as progress:
            for batch, records in self._groups():
                jobs = [self.jobs[self.names[record]] for record in records]
                true = np.stack([to_bytes(read_pixels(job, [], rng).video) for job in jobs])
                copy = rebuilt(self.run.vae, batch, tuple(batch.grid[0].tolist()))
                self._write("real", records, true)
                self._write("rebuilt", records, copy)
                chosen = [i for i, r in enumerate(records) if self.numbers[r] <= self.asked.videos]
                some = [records[i] for i in chosen]
                if not all(self.path("made", self.numbers[record]).is_file() for record in some):
                    part = jax.tree.map(lambda x: x[chosen], batch)  # noqa: B023 called at once
                    self._write("made", some, self._made(part, some, true[chosen]))
                for record, job, a, b in zip(records, jobs, true, copy, strict=True):
                    about = {"number": self.numbers[record], "clip": job.clip.name}
                    about |= {"captions": job.clip.captions}  # a film is made from one of them
                    size = dict(zip(("frames", "height", "width"), a.shape[:3], strict=True))
                    rows.append(about | size | {"psnr": psnr(a, b), "ssim": ssim(a, b)})
                progress.update(len(records))
        return sorted(rows, key=lambda row: row["number"])

    def _distance(self, rows: Sequence[dict], features: Features) -> dict:
        """Return the Fréchet distance between the features of real and of made films.

        Raises ValueError for features of a wrong shape, and for fewer than two films of a kind.
        """
        if features.arrays is not None:
            return distance(features.name, features.arrays)
        found = {}
        for kind in ("real", "made"):
            films = (self.read(kind, row) for row in rows)
            found[kind] = features_of(filter(lambda x: x is not None, films), features.function)
        return distance(features.name, found)

    def _groups(self) -> Iterator[tuple[Batch, list[int]]]:
        """Yield the rows of one size of each batch, and their records."""
        plan = self.loader.plan
        for number in range(len(plan)):
            rows, records = rows_of(self.loader, number, self.mesh), plan(number)[1].tolist()
            grids = list(map(tuple, rows.grid.tolist()))
            for grid in dict.fromkeys(grids):
                same = [i for i, one in enumerate(grids) if one == grid]
                yield jax.tree.map(lambda x: x[same], rows), [records[i] for i in same]  # noqa: B023

    def _made(self, batch: Batch, records: Sequence[int], true: Videos) -> Videos:
        texts = tuple(text.astype(np.float32) for text in batch.texts)
        seeds = [self.loader.plan.keys[record] for record in records]
        empty = read_texts(Path(self.config.prepared) / "empty.safetensors")
        size = true.shape[1:4]
        request = Request(texts, empty, size=size, seeds=seeds, sampling=self.asked.sampling)
        return made_again(self.run.diffusion, self.stage.task, request, batch, true)

    def _write(self, kind: str, records: Sequence[int], videos: Videos) -> None:
        for record, frames in zip(records, videos, strict=True):
            path = self.path(kind, self.numbers[record])
            if not path.is_file():
                write_film(path, frames, self.config.sets[0].fps)


def begin(output: Path, opened: Opened, asked: Asked, **more) -> dict:
    """Write the settings of a folder of films, and return them.

    Raises ValueError for a folder that was begun with others.
    """
    path = output / "settings.json"
    now = {
        "model": str(opened.path),
        "step": opened.step,
        "weights_of": opened.weights,
        "weights": weights_print(opened.model, opened.step),
        "sampling": dataclasses.asdict(asked.sampling),
        "seed": asked.seed,
        **more,
    }
    now = json.loads(json.dumps(now))
    before = json.loads(path.read_text()) if path.is_file() else now
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise ValueError(
            f"{output} was begun with another {', '.join(changed)}: name another folder, or "
            f"remove this one"
        )
    whole.replace_text(path, json.dumps(now, indent=1))
    return now


def config_of(opened: Opened, clips: Place, output: Path, asked: Asked) -> TrainConfig:
    """Return a config whose only stage reads the clips as the model was trained on its own.

    For a run it is the stage of the checkpoint. A folder tells no stage; its clips then have up to
    49 frames and about 512 x 512 pixels.
    """
    task = task_of(opened.config.in_channels)
    name = next(name for name, one in TASKS.items() if one is task)
    if opened.training is None:
        control = "camera" if "camera" in task.holds else "file" if task.is_control else ()
        latents = LatentSet(NAME, RELEASED, control=control)
        stage = Stage(NAME, NAME, batch_size=1, steps=1, task=name)
        rest = {"process": opened.process}
    else:
        stages = {stage.name: stage for stage in opened.training.stages}
        stage = stages[opened.meta["stage"]]
        latents = opened.training.set(stage.data)
        rest = {name: getattr(opened.training, name) for name in ("process", "seed")}
    draws = max(latents.condition_draws, int(name == "i2v"))
    latents = replace(latents, name=NAME, pixels=False, pairs=False, min_quality=0.0)
    latents = replace(latents, condition_draws=draws)
    stage = replace(stage, name=NAME, data=NAME, batch_size=asked.batch, microbatch=None)
    stage = replace(stage, weights=(), objective=None)
    return TrainConfig(
        source=str(clips),
        prepared=str(output / "latents"),
        vae=str(opened.vae),
        text=str(opened.text),
        run=str(output),
        model=opened.config,
        sets=(latents,),
        stages=(stage,),
        validation=ValidationConfig(clips=asked.clips, seed=asked.seed),
        **rest,
    )


def distance(name: str, found: Mapping[str, Float[np.ndarray, "_N D"]]) -> dict:
    """Return the Fréchet distance of features, with their name and numbers."""
    counts = {kind: len(vectors) for kind, vectors in found.items()}
    return {"features": name} | frechet_interval(**found)._asdict() | counts


def features_in(path: Path) -> Features:
    """Return the arrays `real` and `made` of a file .npz, computed elsewhere. Raises ValueError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {kind: np.asarray(file[kind], np.float64) for kind in ("real", "made")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} has no arrays real and made: {error}") from error
    shapes = [x.shape for x in arrays.values()]
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"{path}: real is {shapes[0]} and made {shapes[1]}; give (videos, numbers) with as "
            f"many numbers in each"
        )
    return Features(str(path), arrays=arrays)


def features_of(films: Iterable[np.ndarray], features: Callable) -> Float[np.ndarray, "N D"]:
    """Return the features of films, which a function computes for several of one shape at once.

    Raises ValueError if it does not return one row of numbers for each.
    """
    found = []
    for _, alike in itertools.groupby(films, key=lambda film: film.shape):
        while some := list(itertools.islice(alike, AT_ONCE)):
            rows = np.asarray(features(np.stack(some)), np.float64)
            if (
                rows.ndim != 2
                or len(rows) != len(some)
                or (found and rows.shape[1:] != found[0].shape[1:])
            ):
                raise ValueError(
                    f"the features of {len(some)} videos have the shape {rows.shape}: return one "
                    f"row of equally many numbers for each video"
                )
            found.append(rows)
    return np.concatenate(found) if found else np.zeros((0, 1))


def prompt_videos(run: Pipeline, prompts: Sequence[str], folder: Path, asked: Asked) -> None:
    """Write the films of prompts that VBench's tools ask for: PROMPT-0.mp4 to PROMPT-4.mp4.

    A film that exists is not made again. Film n of a prompt has the seed `asked.seed` + n.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [
        (prompt, number, path)
        for prompt in prompts
        for number in range(PER_PROMPT)
        if not (path := folder / f"{prompt}-{number}.mp4").is_file()
    ]
    samples = run.samples
    size = samples.frames, samples.height, samples.width
    make_films(run, todo, size, asked)


def make_films(
    run: Pipeline, todo: Sequence[tuple[str, int, Path]], size: tuple[int, int, int], asked: Asked
) -> None:
    """Write the films of (prompt, number, path); film n has the seed `asked.seed` + n.

    `size` is (frames, height, width).
    """
    empty = run.encoder.encode([""])
    with tqdm(total=len(todo), desc="prompts", unit="video") as progress:
        for first in range(0, len(todo), asked.batch):
            some = todo[first : first + asked.batch]
            request = Request(
                run.encoder.encode([prompt for prompt, _, _ in some]),
                empty,
                size=size,
                seeds=[asked.seed + number for _, number, _ in some],
                sampling=asked.sampling,
            )
            videos = text_to_video(run.diffusion, request)
            for (_, _, path), frames in zip(some, videos, strict=True):
                write_film(path, frames, asked.fps)
            progress.update(len(some))


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line, or of VBench's list in JSON.

    Raises ValueError for a prompt that cannot be a part of a file name, as VBench asks.
    """
    try:
        text = path.read_text("utf-8-sig")
        lines = text.splitlines()
        if path.suffix == ".json":
            lines = [row["prompt_en"] for row in json.loads(text)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--vbench {path}: no text in lines, and no list of VBench ({error})"
        ) from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ValueError(f"--vbench {path} holds no prompt")
    for prompt in prompts:
        if "/" in prompt or "\0" in prompt or len(prompt.encode()) > MOST_BYTES:
            raise ValueError(
                f"--vbench {path}: {prompt[:80]!r} cannot be a file name, by which VBench knows a "
                f"prompt; use at most {MOST_BYTES} bytes, without /"
            )
    return prompts


def write_film(path: Path, frames: UInt8[np.ndarray, "F H W 3"], fps: int) -> None:
    """Write a film completely or not at all."""
    whole.replace(path, lambda new: media.write_video(new, frames, fps))
