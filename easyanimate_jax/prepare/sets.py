"""Make the shards of one latent set: encode what is new, and copy what did not change."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from easyanimate_jax.data.buckets import grid_of
from easyanimate_jax.data.contents import Contents, key
from easyanimate_jax.data.records import Kept, LatentSet, Origin, Writer, check_identity
from easyanimate_jax.data.sources import places
from easyanimate_jax.facts import FPS
from easyanimate_jax.prepare.clips import Job

Record = dict[str, np.ndarray]


class SetMaker:
    """Makes the shards of a set, from its jobs in order.

    `made_of` holds weights, seed and shard_size. Raises ValueError, and writes nothing, if the
    folder was begun with other settings.
    """

    def __init__(
        self,
        folder: Path,
        latent_set: LatentSet,
        jobs: Sequence[Job],
        contents: Contents,
        made_of: dict,
    ):
        self.folder, self.latent_set, self.contents = folder, latent_set, contents
        self.seed, size = made_of["seed"], made_of["shard_size"]
        self.root = places.root_of(job.clip for job in jobs)
        self.identity = json.loads(json.dumps({"set": _told(latent_set), **made_of}))
        check_identity(folder, self.identity)
        self.shards = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        self.origins: dict[int, list[Origin]] = {}
        self.left_out: list[str] = []

    def jobs(self, part: tuple[int, int]) -> int:
        """Return the number of jobs of a part."""
        return sum(map(len, self.shards[part[0] :: part[1]]))

    def make(self, part: tuple[int, int], read: Callable, texts: Callable, progress) -> bool:
        """Make this part's shards that are missing or out of date; return whether all exist.

        `read` returns for each job its record, or a line that says why it has none. If all shards
        exist, write the index, and set `left_out` to the lines of the clips that are in no shard.
        """
        writer = Writer(self.folder, self.identity)
        for number in range(part[0], len(self.shards), part[1]):
            if writer.has(number, self.key(number)):
                progress.update(len(self.shards[number]))
            else:
                self._make(number, read, texts, progress, writer)
        begun = {path.name.split("-")[1] for path in self.folder.glob("shard-*.arrayrecord")}
        if len(begun) < len(self.shards):  # do not hash the films of other parts
            return False
        keys = [self.key(number) for number in range(len(self.shards))]
        if not all(itertools.starmap(writer.has, enumerate(keys))):
            return False
        more = {"root": self._relative_root()} if self.latent_set.pixels else {}
        self.left_out = writer.finish(len(keys), keys, **more)
        return True

    def key(self, number: int) -> str:
        """Return the key of a shard, from the content of its films, controls and captions."""
        if number not in self.origins:
            with ThreadPoolExecutor() as pool:
                self.origins[number] = list(pool.map(self._origin, self.shards[number]))
        return key(self.origins[number])

    @cached_property
    def kept(self) -> Kept:
        """Return the records that the folder holds."""
        return Kept(self.folder)

    def _origin(self, job: Job) -> Origin:
        clip, captions = job.clip, key(job.clip.captions)
        if self.latent_set.pixels:  # the record has no pixels, but the place of the clip
            place = places.to_bytes(clip, self.root).tobytes().decode()
            return Origin(key(self.identity, self._relative_root(), place), captions)
        led = clip.control and {"file", "camera"} & set(job.control)
        content = [self.contents(clip.path), self.contents(clip.control) if led else None]
        content += [self.contents(clip.worse)] if clip.worse else []
        sizes = clip.first, clip.num_frames, clip.fps, clip.height, clip.width
        made_by = job[1:-1]  # the rate is in the identity
        return Origin(key(self.identity, clip.name, clip.kind, sizes, content, made_by), captions)

    def _make(self, number: int, read: Callable, texts: Callable, progress, writer: Writer) -> None:
        """Write one shard: records of known content are copied, the others are made."""
        jobs, shard_key, origins = self.shards[number], self.key(number), self.origins[number]
        found = [self.kept.get(origin.pixels) for origin in origins]
        new = [job for job, old in zip(jobs, found, strict=True) if old is None]
        progress.update(len(jobs) - len(new))
        if self.latent_set.pixels:
            made = iter({"place": places.to_bytes(job.clip, self.root)} for job in new)
            progress.update(len(new))
        else:
            made = iter(read(new))
        records, told, left_out = [], [], []
        for job, origin, old in zip(jobs, origins, found, strict=True):
            record, captions = old or (next(made), "")
            if isinstance(record, str):
                left_out.append(record)
                continue
            if captions != origin.captions:
                record = {n: x for n, x in record.items() if not n.startswith("text")}
            records.append(record)
            told.append((job, origin))
        untold = [(job, r) for (job, _), r in zip(told, records, strict=True) if "text0" not in r]
        _add_texts(untold, texts)
        rows, kept = [_index_row(job) for job, _ in told], [origin for _, origin in told]
        writer.write(number, records, rows, shard_key, kept, left_out)

    def _relative_root(self) -> str:
        return os.path.relpath(self.root, os.path.realpath(self.folder))


def _add_texts(records: list[tuple[Job, Record]], texts: Callable) -> None:
    """Add its captions and their text states to every record.

    The captions of a shard are encoded together, so that batches are full.
    """
    if not records:
        return
    captions = [(job.clip.name, text) for job, _ in records for text in job.clip.captions]
    states = texts([text for _, text in captions])
    texts.note_cut(captions)
    first = 0
    for job, record in records:
        last = first + len(job.clip.captions)
        record |= {f"text{i}": s[first:last] for i, s in enumerate(states)}
        words = json.dumps(job.clip.captions, ensure_ascii=False).encode()
        record["captions"] = np.frombuffer(words, np.uint8)
        first = last


def _told(latent_set: LatentSet) -> dict:
    """Return the set's fields without the newer ones that are unset.

    Sets written by older versions do not have these fields.
    """
    fields = dataclasses.asdict(latent_set)
    unknown = () if latent_set.control else ("control", "random_reference")
    unknown += () if latent_set.min_quality else ("min_quality",)
    unknown += () if latent_set.pairs else ("pairs",)
    unknown += () if latent_set.pixels else ("pixels",)
    unknown += () if latent_set.reference_rate else ("reference_rate",)
    unknown += () if latent_set.fps != FPS else ("fps",)
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
