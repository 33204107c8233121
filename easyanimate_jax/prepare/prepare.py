"""Encode captioned files to records: `python -m easyanimate_jax prepare CONFIG`.

Each clip is cropped to a shape of its set's budget and encoded once, to mean and log-variance.
Training reads these tokens and draws new samples. All captions are kept, and several I2V masks with
noised references (spec 6.1) are drawn per clip. A set with `pixels` has only its texts encoded here
(see runs/visits.py).

    OUT/SET/                  the records of one latent set, see data/records.py
    OUT/empty.safetensors     text states of the empty prompt
    OUT/prompts.safetensors   text states of the config's sample prompts
    OUT/quarantine.jsonl      rows and clips that were left out, with the reason
    OUT/cut.jsonl             captions that are too long for a text encoder
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from easyanimate_jax.data.buckets import grid_of
from easyanimate_jax.data.records import LatentSet, Texts, Writer, write_texts
from easyanimate_jax.data.sources import places
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.data.sources.rows import Clip
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.prepare.clips import Job, Pixels, frames_of, make_job, read_pixels
from easyanimate_jax.prepare.encode import Encoder, encode_pixels

logger = logging.getLogger(__name__)

SHARD_SIZE = 128  # records
ROWS = 16  # clips encoded at once, at most
TEXT_ROWS, TEXT_CACHE = 128, 2**30  # prompts encoded at once; bytes of text states in the cache
MODEL_FILES = (
    "*.safetensors",
    "config.json",
    "text.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
)
SHOWN = 10  # clips that a message names
MAX_BAD = 0.05  # share of a set's clips that may be unreadable


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
    part: tuple[int, int] = (0, 1),
) -> bool:
    """Encode the clips of `source` for every set; return whether all sets are complete.

    Finished shards are kept.

    `part` (k, n) makes every n-th shard from the k-th on, so n processes on any hosts can share the
    work. The last process to finish writes the index.

    `text_encoder.encode(prompts)` returns one array of states per encoder. `weights` are the
    fingerprints of the folders of VAE and text encoders; records made with other models are not
    mixed in. Raises ValueError if more than `MAX_BAD` of the clips of a set or part are unreadable.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    clips, problems = read_clips(source)
    quarantine = Quarantine(output / "quarantine.jsonl")
    part, parts = part
    for problem in problems if part == 0 else ():
        quarantine.add(problem._asdict())
    texts = TextStates(text_encoder, Quarantine(output / "cut.jsonl"))
    encoder = Encoder(vae, jax.local_devices(), most=ROWS, announce=logger.info)
    write_texts(output / "empty.safetensors", texts([""]))
    if prompts:
        write_texts(output / "prompts.safetensors", texts(prompts))
        texts.note_cut([("sample prompt", prompt) for prompt in prompts])
    whole = []
    for latent_set in sets:
        jobs = select(latent_set, clips, seed)
        root = places.root_of(job.clip for job in jobs)
        made_of = {"weights": weights, "seed": seed, "shard_size": shard_size}
        writer = _writer(output / latent_set.name, latent_set, jobs, root, made_of)
        shards = [jobs[i : i + shard_size] for i in range(0, len(jobs), shard_size)]
        todo = [n for n in range(part, len(shards), parts) if not writer.has(n)]
        own = sum(len(shard) for shard in shards[part::parts])
        done = own - sum(len(shards[number]) for number in todo)
        with tqdm(total=own, initial=done, desc=latent_set.name, unit="clip") as progress:
            read = Reader(latent_set, own, encoder, quarantine, seed, progress)
            for number in todo:
                shard = shards[number]
                made = _located(shard, root, progress) if latent_set.pixels else read(shard)
                _add_texts(made, texts)
                records = [record for _, record in made]
                writer.write(number, records, [_index_row(job) for job, _ in made])
        whole.append(all(map(writer.has, range(len(shards)))))
        if whole[-1]:
            writer.finish(len(shards))
    texts.say_cut()
    return all(whole)


def select(latent_set: LatentSet, clips: Sequence[Clip], seed: int) -> list[Job]:
    """Return the set's clips as jobs, sorted by shape. Raises ValueError if no clip fits."""
    jobs = []
    for clip in clips:
        if clip.kind not in latent_set.kinds or clip.quality < latent_set.min_quality:
            continue
        if min(clip.height, clip.width) < latent_set.min_side:
            continue
        frames = frames_of(latent_set, clip)
        shape = latent_set.budget.choose(frames, clip.height, clip.width, clip.name)
        if shape is not None:
            jobs.append(make_job(latent_set, clip, shape, _rng(seed, latent_set.name, clip.name)))
    if not jobs:
        raise ValueError(
            f"set {latent_set.name!r}: none of {len(clips)} clips is of kind "
            f"{'/'.join(latent_set.kinds)}, at least {latent_set.min_side} pixels wide, of "
            f"quality {latent_set.min_quality} or more (only curation rates clips), and large "
            f"enough for {latent_set.budget}; change the set or add clips"
        )
    return sorted(jobs, key=lambda job: (job.shape, job.clip.name))


def fingerprint(folder: str | Path) -> str:
    """Return a hash of a model folder: of weights, configs and tokenizers, not of other files."""
    digest = hashlib.blake2b(digest_size=16)
    found = (path for pattern in MODEL_FILES for path in Path(folder).rglob(pattern))
    for path in sorted(path for path in found if path.is_file()):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").digest()
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + content)
    return digest.hexdigest()


class Quarantine:
    """A JSON-lines file of what was left out of rows and clips; a resumed run repeats no line."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = set(path.read_text().splitlines()) if path.is_file() else set()

    def add(self, entry: dict) -> None:
        """Append an entry, unless the file already has it."""
        line = json.dumps(entry, ensure_ascii=False)
        if line not in self.lines:
            self.lines.add(line)
            with open(self.path, "a") as file:
                file.write(line + "\n")


class TextStates:
    """Text states as float16, with a cache: each distinct prompt in it is encoded once.

    Captions whose end no encoder reads are noted in the file `cut`.
    """

    def __init__(self, text_encoder, cut: Quarantine):
        self.text_encoder, self.cache = text_encoder, {}
        self.cut, self.long, self.number = cut, [], 0

    def __call__(self, prompts: Sequence[str]) -> Texts:
        """Return the states of `prompts`, one array per encoder.

        Raises ValueError if a state is not finite in float16.
        """
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

    def note_cut(self, captions: Sequence[tuple[str, str]]) -> None:
        """Note which (clip, caption) pairs have captions that are too long for an encoder."""
        self.number += len(captions)
        for clip, caption in captions:
            if self.text_encoder.is_cut(caption):
                self.long.append(clip)
                self.cut.add({"file": clip, "caption": caption})

    def say_cut(self) -> None:
        """Log how many captions were cut, and of which clips."""
        if self.long:
            some = ", ".join(dict.fromkeys(self.long[:SHOWN]))
            logger.warning(
                f"{len(self.long):,} of {self.number:,} captions are too long for a text encoder, "
                f"which does not read their end: {some}{', ...' * (len(self.long) > SHOWN)}. "
                f"{self.cut.path} holds all of them; shorten them, or go on"
            )


class Reader:
    """Reads and encodes the jobs of a set; raises ValueError after too many unreadable clips."""

    def __init__(self, latent_set: LatentSet, jobs: int, encoder, quarantine, seed: int, progress):
        self.latent_set, self.jobs, self.encoder, self.seed = latent_set, jobs, encoder, seed
        self.quarantine, self.progress, self.bad = quarantine, progress, 0

    def __call__(self, jobs: Sequence[Job]) -> list[tuple[Job, dict[str, np.ndarray]]]:
        """Return (job, record) of each readable job; the others go to the quarantine."""
        encoded = []
        with ThreadPoolExecutor() as pool:
            for group in self._groups(jobs):
                good = []
                for job, found in zip(group, pool.map(self._read, group), strict=True):
                    if isinstance(found, ValueError):
                        self._leave_out(job, str(found))
                    else:
                        good.append((job, found))
                if good:
                    records = encode_pixels(self.encoder, [pixels for _, pixels in good])
                    encoded += zip([job for job, _ in good], records, strict=True)
                self.progress.update(len(group))
        return encoded

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Yield groups of neighbouring jobs of one shape, as many as are encoded at once."""
        for shape, same in itertools.groupby(jobs, key=lambda job: job.shape):
            while group := list(itertools.islice(same, self.encoder.rows(shape))):
                yield group

    def _read(self, job: Job) -> Pixels | ValueError:
        def rng(*names):
            return _rng(self.seed, self.latent_set.name, job.clip.name, *names)

        draws = [rng(draw) for draw in range(self.latent_set.condition_draws)]
        try:
            return read_pixels(job, draws, rng("reference"))
        except ValueError as error:
            return error

    def _leave_out(self, job: Job, reason: str) -> None:
        self.bad += 1
        self.quarantine.add({"file": job.clip.name, "reason": reason})
        if self.bad > max(1, MAX_BAD * self.jobs):
            raise ValueError(
                f"set {self.latent_set.name!r}: {self.bad} of {self.jobs} clips cannot be read; "
                f"repair or remove them. The reasons are in {self.quarantine.path}"
            )


def _located(jobs: Sequence[Job], root: Path, progress) -> list[tuple[Job, dict[str, np.ndarray]]]:
    """Return (job, record) of each job; the record holds the location of its clip."""
    progress.update(len(jobs))
    return [(job, {"place": places.to_bytes(job.clip, root)}) for job in jobs]


def _add_texts(encoded: list[tuple[Job, dict]], texts: TextStates) -> None:
    """Add the text states of its captions to every record.

    The captions of a shard are encoded together, so that batches are full.
    """
    if not encoded:
        return
    captions = [(job.clip.name, text) for job, _ in encoded for text in job.clip.captions]
    states = texts([text for _, text in captions])
    texts.note_cut(captions)
    first = 0
    for job, record in encoded:
        last = first + len(job.clip.captions)
        record |= {f"text{i}": s[first:last] for i, s in enumerate(states)}
        first = last


def _writer(
    folder: Path, latent_set: LatentSet, jobs: Sequence[Job], root: Path, made_of: dict
) -> Writer:
    """Return the set's writer; it continues only shards of the same set, jobs and `made_of`."""
    identity = {
        "set": _told(latent_set),
        "jobs": _digest(repr([(j.clip.name, j.clip.captions, *j[1:4]) for j in jobs])),
        **made_of,
    }
    if latent_set.pixels:
        identity["root"] = os.path.relpath(root, os.path.realpath(folder))
    return Writer(folder, json.loads(json.dumps(identity)))


def _told(latent_set: LatentSet) -> dict:
    """Return the set's fields without the newer ones that are unset.

    Sets written by older versions do not have these fields.
    """
    fields = dataclasses.asdict(latent_set)
    unknown = () if latent_set.control else ("control", "random_reference")
    unknown += () if latent_set.min_quality else ("min_quality",)
    unknown += () if latent_set.pixels else ("pixels",)
    unknown += () if latent_set.reference_rate else ("reference_rate",)
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
