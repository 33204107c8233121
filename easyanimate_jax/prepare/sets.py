"""Make the records of one latent set: plan what is missing, encode it, and write the index."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow

from easyanimate_jax.data.buckets import Shape, grid_of
from easyanimate_jax.data.contents import Contents, key
from easyanimate_jax.data.index import INDEX_TYPES
from easyanimate_jax.data.paths import beside
from easyanimate_jax.data.records import SHARDS, LatentSet, finish_set, split
from easyanimate_jax.data.shards import Shards, key_array, write_shard
from easyanimate_jax.data.sources import places
from easyanimate_jax.facts import FPS
from easyanimate_jax.prepare.clips import Job
from easyanimate_jax.prepare.manifest import KEYS, WHOLE, Manifest, latest, plan
from easyanimate_jax.storage.stores import Place, make_folder, replace_text

# What may change in a set: the entries that it asks for are made, and the others stay.
FREE = ("control", "condition_draws", "random_reference", "min_side", "min_quality", "kinds")
LEAST, MOST = 128, 1024  # records of a shard
RUN = 16  # clips whose files one thread reads after each other
BYTES = 2**30  # of a shard with more than LEAST records
JOBS = {
    "place": pyarrow.string(),  # of the clip, as JSON; see data/sources/places.py
    "captions": pyarrow.list_(pyarrow.string()),
    "start": pyarrow.float64(),
    "stride": pyarrow.int32(),
    "keys": KEYS,  # of its entries, slot by slot
    "texts": KEYS,  # of its captions' text states
}

Made = dict[str, np.ndarray] | str  # the arrays of a job's entries, or why it has none


class Todo(NamedTuple):
    """The work of one shard, a list of each of its clips."""

    shard: int
    rows: list[dict]  # of the manifest
    wanted: list[list[str]]  # the slots whose entries are missing
    jobs: list[Job]
    kinds: list[frozenset[str]]  # of the wanted entries


class SetMaker:
    """Makes the records of a set in a folder.

    `made_of` holds the fingerprints of the `weights`, and the `seed`. Raises ValueError, and writes
    nothing, if the folder was begun with other settings; those of `FREE` and the text encoder may
    change.
    """

    def __init__(self, folder: Place, latent_set: LatentSet, made_of: dict):
        self.folder, self.latent_set = folder, latent_set
        self.made_of = json.loads(json.dumps({"set": _told(latent_set), **made_of}))
        self.slots = _slots(latent_set)
        check_identity(folder, self.made_of)

    def plan(
        self, jobs: Sequence[Job], contents: Contents, text_key: Callable[[str], str], size: int
    ) -> None:
        """Write the manifest of these jobs, unless there is one; 0 records a shard: by bytes."""
        make_folder(self.folder)
        replace_text(self.folder / "identity.json", json.dumps(self.made_of, indent=1))
        root = places.root_of(job.clip for job in jobs)
        if root is None and self.latent_set.pixels:
            raise ValueError(
                f"set {self.latent_set.name!r} has pixels=True, and its clips lie in several "
                f"buckets, or on disks and in stores; put all of them below one folder"
            )
        runs = [jobs[first : first + RUN] for first in range(0, len(jobs), RUN)]
        with ThreadPoolExecutor() as pool:  # which waits for the files to be read

            def keys_of(run: Sequence[Job]) -> list[list[str]]:
                return [self._keys(job, contents, root) for job in run]

            keys = itertools.chain.from_iterable(pool.map(keys_of, runs))
            rows = [
                _row(job, root)
                | {"keys": [bytes.fromhex(k) for k in own]}
                | {"texts": [bytes.fromhex(text_key(text)) for text in job.clip.captions]}
                for job, own in zip(jobs, keys, strict=True)
            ]
        types = {
            n: pyarrow.from_numpy_dtype(t) if t is not str else pyarrow.string()
            for n, t in INDEX_TYPES.items()
        }
        table = pyarrow.table(
            {n: pyarrow.array([row[n] for row in rows], t) for n, t in (types | JOBS).items()}
        )
        weights = self._weights(table["tokens"].to_numpy(), size)
        plan(self.folder, table, weights, {"root": self._root_text(root), **self.made_of})

    def open(self) -> Manifest:
        """Return the manifest that was planned last. Raises ValueError if there is none."""
        return latest(self.folder)

    def todo(self, manifest: Manifest, shard: int) -> Todo:
        """Return the work of one shard."""
        rows = manifest.rows(shard)
        wanted = [[s for s, make in zip(self.slots, r["make"], strict=True) if make] for r in rows]
        kinds = [frozenset(slot.split()[0] for slot in slots) for slots in wanted]
        return Todo(shard, rows, wanted, [self._job(row, manifest) for row in rows], kinds)

    def write_places(self, manifest: Manifest, todo: Todo) -> None:
        """Create a shard of a set with `pixels`: its records hold where their clips lie."""
        places = (np.frombuffer(row["place"].encode(), np.uint8) for row in todo.rows)
        self.write(manifest, todo, [{"place": one} for one in places])

    def write(self, manifest: Manifest, todo: Todo, found: Sequence[Made]) -> None:
        """Create the shard, unless it exists, of what each of its jobs has become."""
        entries, left_out = [], []
        for row, slots, made in zip(todo.rows, todo.wanted, found, strict=True):
            if isinstance(made, str):
                left_out.append(made)
                continue
            parts = split(made)
            keys = dict(zip(self.slots, row["keys"], strict=True))
            entries += [(keys[slot].hex(), parts[slot]) for slot in slots]
        notes = {"left_out": left_out}
        write_shard(self.folder / SHARDS / manifest.shards[todo.shard], entries, notes)

    def finish(self, manifest: Manifest) -> list[str] | None:
        """Write the index; return the lines of the clips left out, or None if a shard is missing.

        Raises ValueError if an entry is neither there nor left out.
        """
        shards = Shards(self.folder / SHARDS)
        if not set(manifest.shards) <= set(shards.sizes):
            return None
        table = manifest.columns([*INDEX_TYPES, "keys", "texts"])
        lists = [table[name].combine_chunks() for name in ("keys", "texts")]
        keys, counts = _joined(*lists)
        more = {"root": manifest.about["root"]} if self.latent_set.pixels else {}
        spare = {f"{SHARDS}/{name}" for name in manifest.shards}
        columns = {name: table[name] for name in INDEX_TYPES}
        about = {**self.made_of, **more}
        good = finish_set(self.folder, about, self.slots, columns, keys, counts, spare)
        _, notes = shards.tables(manifest.shards)
        lines = [line for name in manifest.shards for line in notes[name]["left_out"]]
        if len(set(lines)) < len(good) - np.sum(good):
            raise ValueError(
                f"{self.folder} has lost entries of its shards; run python -m easyanimate_jax "
                f"prepare again, which makes them again"
            )
        return lines

    def _keys(self, job: Job, contents: Contents, root: Place | None) -> list[str]:
        """Return the keys of a job's entries, slot by slot, from the content that they show."""
        clip, of_clip = job.clip, (self.made_of["seed"], self.latent_set.name, job.clip.name)
        if self.latent_set.pixels:  # the record has no pixels, but the place of the clip
            where = places.to_bytes(clip, root).tobytes().decode()
            return [key("place", self._root_text(root), where)]
        content = [contents(clip.path)] + ([contents(clip.worse)] if clip.worse else [])
        sizes = clip.kind, clip.first, clip.num_frames, clip.fps, clip.height, clip.width
        how = job.shape, job.start, job.stride, job.rate, self.latent_set.reference_rate
        latents = key("latents", self.made_of["weights"].get("vae"), content, sizes, how)
        found = []
        for slot in self.slots:
            kind, _, number = slot.partition(" ")
            if kind == "latents":
                found.append(latents)
            elif kind == "condition":
                found.append(key(kind, latents, of_clip, int(number)))
            elif kind == "control":
                name = job.control[int(number)]
                led = name in ("file", "camera") and clip.control
                found.append(key(kind, latents, name, contents(clip.control) if led else None))
            else:
                found.append(key(kind, latents, of_clip if job.random_reference else None))
        return found

    def _job(self, row: dict, manifest: Manifest) -> Job:
        """Return the job of a row of the manifest."""
        root = manifest.about["root"] and beside(self.folder, manifest.about["root"])
        clip = places.from_bytes(np.frombuffer(row["place"].encode(), np.uint8), root)
        clip = dataclasses.replace(clip, captions=tuple(row["captions"]))
        shape, latent_set = Shape(*(row[name] for name in Shape._fields)), self.latent_set
        led = latent_set.control, latent_set.random_reference, latent_set.fps
        return Job(clip, shape, row["start"], row["stride"], *led)

    def _weights(self, tokens: np.ndarray, size: int) -> np.ndarray:
        """Return the weight of each record in a shard that is full at WHOLE."""
        if size:
            return np.full(len(tokens), -(-WHOLE // size))
        record = tokens * 256 * max(1, len(self.slots))  # two float16 of 64 numbers a token
        return WHOLE // np.clip(BYTES // record, LEAST, MOST)

    def _root_text(self, root: Place | None) -> str | None:
        """Return the root of the source, relative to the set's folder if both are local."""
        if root is None:
            return None
        both = isinstance(root, Path) and isinstance(self.folder, Path)
        return os.path.relpath(root, os.path.realpath(self.folder)) if both else str(root)


def check_identity(folder: Place, made_of: dict) -> None:
    """Raise ValueError if the set in `folder` was begun with other settings than may change."""
    path = folder / "identity.json"
    before = json.loads(path.read_text()) if path.is_file() else made_of
    if "shard_size" in before or "jobs" in before:
        raise ValueError(
            f"{folder} was begun by an earlier version, whose records have another form: prepare "
            f"again in another folder (--prepared)"
        )
    fixed = [_fixed(made_of), _fixed(before)]
    changed = [k for k in made_of if fixed[0].get(k) != fixed[1].get(k)]
    if changed:
        raise ValueError(
            f"{folder} was begun with another {', '.join(changed)}; remove the folder, or "
            f"choose another one, to prepare the set again"
        )


def _fixed(made_of: dict) -> dict:
    """Return the settings of a set that may not change."""
    weights = {k: v for k, v in made_of.get("weights", {}).items() if k != "text"}
    fields = {k: v for k, v in made_of.get("set", {}).items() if k not in FREE}
    return made_of | {"weights": weights, "set": fields}


def _slots(latent_set: LatentSet) -> list[str]:
    """Return the slots of a set's records, in the order of their entries in the index."""
    if latent_set.pixels:
        return ["place"]
    slots = ["latents", *(f"condition {i}" for i in range(latent_set.condition_draws))]
    slots += [f"control {i}" for i in range(len(latent_set.control))]
    return slots + (["reference"] if latent_set.control else [])


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


def _row(job: Job, root: Place | None) -> dict:
    """Return the row of a job in the manifest, without its keys."""
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
        "place": places.to_bytes(job.clip, root).tobytes().decode(),
        "captions": job.clip.captions,
        "start": job.start,
        "stride": job.stride,
    }


def _joined(slots: pyarrow.ListArray, texts: pyarrow.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys of all rows, those of the slots before those of the texts, and the counts."""
    counts = [np.diff(part.offsets.to_numpy()) for part in (slots, texts)]
    flat = [key_array(part.flatten()) for part in (slots, texts)]
    row = [np.repeat(np.arange(len(slots)), count) for count in counts]
    order = np.argsort(np.concatenate(row), kind="stable")
    return np.concatenate(flat)[order], sum(counts)
