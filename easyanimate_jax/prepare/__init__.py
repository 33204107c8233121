"""From captioned files to encoded records: `python -m easyanimate_jax.prepare CONFIG`.

Every clip is cut to a shape of its set's budget and encoded once, mean and log-variance, so that
training reads tokens and draws fresh samples. What cannot be encoded ahead stays a draw: captions
are all kept, and of I2V masks and noised references (spec 6.1) there are several per clip.

    OUT/SET/                  the records of one latent set, see data/records.py
    OUT/empty.safetensors     text states of the empty prompt
    OUT/prompts.safetensors   text states of the config's sample prompts
    OUT/quarantine.jsonl      rows and clips that were left out, with the reason

Letters beyond the legend: R rows encoded at once, M condition draws of a clip, P token width.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from easyanimate_jax.data.buckets import Shape, grid_of
from easyanimate_jax.data.control import (
    Camera,
    control_video,
    pluecker_rays,
    read_camera,
    stretched_camera,
)
from easyanimate_jax.data.decode import decoders
from easyanimate_jax.data.records import LatentSet, Texts, Writer, write_texts
from easyanimate_jax.data.sources import Clip, read_clips
from easyanimate_jax.diffusion.conditioning import (
    MASK_SCALE,
    UNKNOWN,
    camera_condition,
    random_mask,
    resize_mask,
)
from easyanimate_jax.models.mmdit import patchify
from easyanimate_jax.models.vae import CausalVAE

FPS = 8  # of training clips (spec 8.2)
SHARD_SIZE = 128  # records
ROWS, PIXELS = 16, 2**24  # encoded at once: at most so many clips, and so many pixels
TEXT_ROWS, TEXT_CACHE = 128, 2**30  # prompts whose states are made at once; bytes of states kept
FIRST_REFERENCE = 0.4  # share of random references that are the first frame (spec 7.2)
NO_TASK = 0.9  # share of all-masked draws that become plain T2V (spec 6.1)
MODEL_FILES = (
    "*.safetensors",
    "config.json",
    "text.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
)
MAX_BAD = 0.05  # share of a set's clips that may be unreadable


class Job(NamedTuple):
    """A clip, the shape it becomes, and where in the file it is read."""

    clip: Clip
    shape: Shape
    start: int
    stride: int
    control: tuple[str, ...] = ()


def prepare(
    source: str | Path,
    output: str | Path,
    sets: Sequence[LatentSet],
    vae: CausalVAE,
    text_encoder,
    prompts: Sequence[str],
    seed: int,
    *,
    weights: dict[str, str],
    shard_size: int = SHARD_SIZE,
) -> None:
    """Encode the clips of `source` for every set; finished shards are kept, others made.

    `text_encoder.encode(prompts)` gives one array of states per encoder. `weights` are the
    fingerprints of the VAE's and the text encoders' folders: records of others are not mixed in.
    Raises ValueError when more than `MAX_BAD` of a set's clips cannot be read.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    clips, problems = read_clips(source)
    quarantine = Quarantine(output / "quarantine.jsonl")
    for problem in problems:
        quarantine.add(problem._asdict())
    texts = TextStates(text_encoder)
    write_texts(output / "empty.safetensors", texts([""]))
    if prompts:
        write_texts(output / "prompts.safetensors", texts(prompts))
    for latent_set in sets:
        jobs = select(latent_set, clips, seed)
        identity = {
            "set": _told(latent_set),
            "weights": weights,
            "seed": seed,
            "jobs": _digest(repr([(j.clip.name, j.clip.captions, *j[1:4]) for j in jobs])),
            "shard_size": shard_size,
        }
        writer = Writer(output / latent_set.name, json.loads(json.dumps(identity)))
        _encode_set(latent_set, jobs, writer, vae, texts, quarantine, seed, shard_size)


def select(latent_set: LatentSet, clips: Sequence[Clip], seed: int) -> list[Job]:
    """The set's clips, each with its shape, ordered so that equal shapes are neighbours."""
    jobs = []
    for clip in clips:
        if clip.kind not in latent_set.kinds or clip.quality < latent_set.min_quality:
            continue
        if min(clip.height, clip.width) < latent_set.min_side:
            continue
        stride = max(1, round(clip.fps / FPS))
        frames = (clip.num_frames - 1) // stride + 1
        shape = latent_set.budget.choose(frames, clip.height, clip.width, clip.name)
        if shape is not None:
            last_start = clip.num_frames - 1 - (shape.frames - 1) * stride
            start = int(_rng(seed, latent_set.name, clip.name).integers(last_start + 1))
            jobs.append(Job(clip, shape, clip.first + start, stride, latent_set.control))
    if not jobs:
        raise ValueError(
            f"set {latent_set.name!r}: none of {len(clips)} clips is of kind "
            f"{'/'.join(latent_set.kinds)}, at least {latent_set.min_side} pixels wide, of "
            f"quality {latent_set.min_quality} or more (only curation rates clips), and large "
            f"enough for {latent_set.budget}; change the set or add clips"
        )
    return sorted(jobs, key=lambda job: (job.shape, job.clip.name))


def fingerprint(folder: str | Path) -> str:
    """A hash of a model folder: weights, configs and tokenizers, not what its training left."""
    digest = hashlib.blake2b(digest_size=16)
    found = (path for pattern in MODEL_FILES for path in Path(folder).rglob(pattern))
    for path in sorted(path for path in found if path.is_file()):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").digest()
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + content)
    return digest.hexdigest()


class Quarantine:
    """A JSON line for each thing left out; a resumed run does not repeat them."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = set(path.read_text().splitlines()) if path.is_file() else set()

    def add(self, entry: dict) -> None:
        line = json.dumps(entry, ensure_ascii=False)
        if line not in self.lines:
            self.lines.add(line)
            with open(self.path, "a") as file:
                file.write(line + "\n")


class TextStates:
    """Text states as float16, each distinct prompt encoded once while the cache lasts."""

    def __init__(self, text_encoder):
        self.text_encoder, self.cache = text_encoder, {}

    def __call__(self, prompts: Sequence[str]) -> Texts:
        """The states of `prompts`, per encoder."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.cache]
        for i in range(0, len(new), TEXT_ROWS):
            some = new[i : i + TEXT_ROWS]
            states = [np.asarray(s, np.float16) for s in self.text_encoder.encode(some)]
            if not all(np.isfinite(s).all() for s in states):
                raise ValueError(f"text states of {some} are not finite in float16")
            self.cache |= {p: tuple(s[row] for s in states) for row, p in enumerate(some)}
        rows = [self.cache[prompt] for prompt in prompts]
        if len(self.cache) * sum(s.nbytes for s in rows[0]) > TEXT_CACHE:
            self.cache = {}
        return tuple(np.stack(column) for column in zip(*rows, strict=True))


def _encode_set(latent_set, jobs, writer, vae, texts, quarantine, seed, shard_size) -> None:
    shards = [jobs[i : i + shard_size] for i in range(0, len(jobs), shard_size)]
    done = sum(len(shard) for number, shard in enumerate(shards) if writer.has(number))
    num_bad = 0
    progress = tqdm(total=len(jobs), initial=done, desc=latent_set.name, unit="clip")
    with progress, ThreadPoolExecutor() as pool:
        for number, shard in enumerate(shards):
            if writer.has(number):
                continue
            encoded = []  # jobs and their records
            for group in _groups(shard):
                good = []
                for job, found in zip(group, pool.map(_read_both, group), strict=True):
                    if isinstance(found, ValueError):
                        num_bad += 1
                        quarantine.add({"file": job.clip.name, "reason": str(found)})
                    else:
                        good.append((job, *found))
                if num_bad > max(1, MAX_BAD * len(jobs)):
                    raise ValueError(
                        f"set {latent_set.name!r}: {num_bad} of {len(jobs)} clips cannot be read; "
                        f"the reasons are in {quarantine.path}"
                    )
                if good:
                    latents = _encode_group(vae, latent_set, good, seed)
                    encoded += [
                        (job, record) for (job, *_), record in zip(good, latents, strict=True)
                    ]
                progress.update(len(group))
            if encoded:
                _add_texts(encoded, texts)
            records = [record for _, record in encoded]
            writer.write(number, records, [_index_row(job) for job, _ in encoded])
    writer.finish(len(shards))


def _add_texts(encoded: list[tuple[Job, dict]], texts: TextStates) -> None:
    """Give every record the states of its captions, a shard's together: full batches."""
    states = texts([caption for job, _ in encoded for caption in job.clip.captions])
    first = 0
    for job, record in encoded:
        last = first + len(job.clip.captions)
        record |= {f"text{i}": s[first:last] for i, s in enumerate(states)}
        first = last


def _groups(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Neighbours of one shape, as many as are encoded at once."""
    for shape, same in itertools.groupby(jobs, key=lambda job: job.shape):
        same = list(same)
        for i in range(0, len(same), _rows(shape)):
            yield same[i : i + _rows(shape)]


def _rows(shape: Shape) -> int:
    return max(1, min(ROWS, PIXELS // (shape.frames * shape.height * shape.width)))


def _read_both(job: Job) -> tuple[np.ndarray, list[np.ndarray]] | ValueError:
    """The clip, and the videos or the camera's rays that lead it."""
    frames = _read(job)
    if isinstance(frames, ValueError):
        return frames
    try:
        return frames, [_read_control(job, control, frames) for control in job.control]
    except ValueError as error:
        return error


def _read_control(job: Job, control: str, frames: UInt8[np.ndarray, "F H W 3"]) -> np.ndarray:
    """The control of the same frames, resized and cropped as they were (spec 7.2)."""
    if control not in ("file", "camera"):
        return control_video(frames, control)
    path, (count, height, width) = job.clip.control, job.shape
    if path is None:
        raise ValueError(f"{job.clip.name} has no control_file_path, and the set wants one")
    if control == "camera":
        start = job.start - job.clip.first  # the poses are those of the clip
        camera = stretched_camera(read_camera(path), job.clip.num_frames)
        chosen = slice(start, start + (count - 1) * job.stride + 1, job.stride)
        return pluecker_rays(Camera(*(x[chosen] for x in camera)), height, width)
    if decoders().probe(path).kind == "image":
        return np.repeat(decoders().read_image(path, (height, width)), count, axis=0)
    return decoders().read_clip(path, job.start, count, job.stride, (height, width))


def _read(job: Job) -> UInt8[np.ndarray, "F H W 3"] | ValueError:
    size = job.shape[1:]
    try:
        if job.clip.kind == "image":
            return decoders().read_image(job.clip.path, size)
        return decoders().read_clip(job.clip.path, job.start, job.shape.frames, job.stride, size)
    except ValueError as error:
        return error


def _encode_group(vae, latent_set: LatentSet, good: list, seed: int) -> list[dict[str, np.ndarray]]:
    """Latents and condition draws of clips of one shape; missing rows repeat the last clip."""
    jobs, frames, controls = zip(*good, strict=True)
    missing = _rows(jobs[0].shape) - len(jobs)
    videos = np.stack(frames + frames[-1:] * missing).astype(np.float32) / 127.5 - 1
    names = [job.clip.name for job in jobs + jobs[-1:] * missing]
    mean, logvar = _encode(vae, videos)
    fields = {"mean": mean, "logvar": logvar}
    draws = [
        _draw_condition(vae, videos, [_rng(seed, latent_set.name, name, draw) for name in names])
        for draw in range(latent_set.condition_draws)
    ]
    if latent_set.control:
        controls = zip(*(controls + controls[-1:] * missing), strict=True)
        controls = [np.stack(control) for control in controls]
        fields |= _control_fields(vae, latent_set, videos, controls, names, seed)
    if draws:
        fields |= {name: np.stack([draw[name] for draw in draws], axis=1) for name in draws[0]}
    fields = {name: np.asarray(field, np.float16) for name, field in fields.items()}
    for name, field in fields.items():
        if not np.isfinite(field).all():
            raise ValueError(f"set {latent_set.name!r}: {name} of {names} is not finite in float16")
    return [{name: field[i] for name, field in fields.items()} for i in range(len(jobs))]


def _draw_condition(vae, videos, rngs: list[np.random.Generator]) -> dict[str, np.ndarray]:
    """What the inpaint model is given of each video, spec 6.1; a flag of 0 takes all of it away."""
    masks = np.stack([random_mask(rng, *videos.shape[1:4]) for rng in rngs])
    flags = [
        not (mask.all() and rng.random() < NO_TASK) for mask, rng in zip(masks, rngs, strict=True)
    ]
    given = [_noised_reference(*row) for row in zip(rngs, videos, masks, strict=True)]
    mean, logvar = _encode(vae, np.stack(given))
    return {
        "condition_mean": np.asarray(mean),
        "condition_logvar": np.asarray(logvar),
        "condition_mask": np.asarray(_mask_tokens(masks)),
        "condition_flag": np.array(flags),
    }


def _control_fields(vae, latent_set: LatentSet, videos, controls, names, seed: int) -> dict:
    """What leads the clips and what they look like, spec 7.2."""
    camera = "camera" in latent_set.control
    if camera:
        fields = {"control_rays": _ray_tokens(controls[0])}
    else:
        encoded = [_encode(vae, control.astype(np.float32) / 127.5 - 1) for control in controls]
        means, logvars = zip(*encoded, strict=True)
        fields = {
            "control_mean": np.stack(means, axis=1),
            "control_logvar": np.stack(logvars, axis=1),
        }
    chosen = np.zeros(len(names), int)
    if latent_set.random_reference and not camera:
        rngs = [_rng(seed, latent_set.name, name, "reference") for name in names]
        chosen = np.array([_reference_frame(rng, videos.shape[1]) for rng in rngs])
    mean, logvar = _encode(vae, videos[np.arange(len(names)), chosen][:, None])
    return fields | {"reference_mean": mean, "reference_logvar": logvar}


def _reference_frame(rng: np.random.Generator, frames: int) -> int:
    """Any frame, the first in `FIRST_REFERENCE` of all cases."""
    if frames == 1 or rng.random() < FIRST_REFERENCE:
        return 0
    return int(rng.integers(1, frames))


@jax.jit
def _ray_tokens(rays: Float[Array, "R F H W 6"]) -> Float[Array, "R N 24"]:
    return patchify(camera_condition(rays))


@jax.jit
def _encode(
    vae: CausalVAE, videos: Float[Array, "R F H W 3"]
) -> tuple[Float[Array, "R N P"], Float[Array, "R N P"]]:
    """Mean and log-variance of the normalised latents, as tokens."""
    mean, logvar = vae.encode(videos)
    scale = jnp.array(vae.config.latent_scale).reshape(1, 1, 1, 1, -1)
    return patchify(vae.normalize(mean)), patchify(logvar + 2 * jnp.log(scale))


@jax.jit
def _mask_tokens(masks: Float[Array, "R F H W 1"]) -> Float[Array, "R N 4"]:
    """The mask as the network sees it, 1 where given."""
    return patchify(resize_mask(1 - masks) * MASK_SCALE)


def _noised_reference(
    rng: np.random.Generator,
    video: Float[np.ndarray, "F H W 3"],
    mask: Float[np.ndarray, "F H W 1"],
) -> Float[np.ndarray, "F H W 3"]:
    """The given pixels with noise; pixels of exactly -1 are unknown and stay so (spec 6.4).

    On the host: a random-number program per shape would compile longer than the VAE's.
    """
    given = np.where(mask > 0.5, np.float32(UNKNOWN), video)
    strength = np.float32(np.exp(-3.0 + 0.5 * rng.standard_normal()))
    noise = strength * rng.standard_normal(video.shape, np.float32)
    return np.where(given == UNKNOWN, given, given + noise)


def _told(latent_set: LatentSet) -> dict:
    """The set's fields, but for those that older sets do not know and that say nothing here."""
    fields = dataclasses.asdict(latent_set)
    unknown = () if latent_set.control else ("control", "random_reference")
    unknown += () if latent_set.min_quality else ("min_quality",)
    return {name: value for name, value in fields.items() if name not in unknown}


def _index_row(job: Job) -> dict:
    T, gh, gw = grid_of(*job.shape)
    return {
        "clip": job.clip.name,
        "kind": job.clip.kind,
        **job.shape._asdict(),
        "T": T,
        "gh": gh,
        "gw": gw,
        "tokens": T * gh * gw,
        "source_height": job.clip.height,
        "source_width": job.clip.width,
        "num_captions": len(job.clip.captions),
        "source": job.clip.source,
    }


def _rng(seed: int, *names) -> np.random.Generator:
    return np.random.default_rng([seed, int(_digest(repr(names)), 16)])


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
