"""Plan sets and texts from clips that come some at a time; memory does not grow with the source."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute

from easyanimate_jax.data.buckets import grid_of
from easyanimate_jax.data.contents import Contents, key
from easyanimate_jax.data.index import INDEX_TYPES
from easyanimate_jax.data.sources import places
from easyanimate_jax.data.sources.rows import Clip
from easyanimate_jax.prepare.clips import Job
from easyanimate_jax.prepare.jobs import Selection
from easyanimate_jax.prepare.manifest import KEYS, WHOLE, plan
from easyanimate_jax.prepare.sets import SetMaker
from easyanimate_jax.prepare.sorter import Sorter, without_repeats
from easyanimate_jax.prepare.texts import TextMaker
from easyanimate_jax.storage.stores import Place, make_folder, replace_text

LEAST, MOST = 128, 1024  # records of a shard
BYTES = 2**30  # of a shard with more than LEAST records
CAPTIONS = 512  # of a shard: V5's states are 1.2 MB each
RUN = 16  # clips whose files one thread reads after each other
JOBS = {
    "place": pyarrow.string(),  # of the clip, as JSON; see data/sources/places.py
    "captions": pyarrow.list_(pyarrow.string()),
    "start": pyarrow.float64(),
    "stride": pyarrow.int32(),
    "keys": KEYS,  # of its entries, slot by slot
    "texts": KEYS,  # of its captions' text states
}
TEXT = {"key": pyarrow.binary(16), "caption": pyarrow.string(), "keys": KEYS}


class SetPlan:
    """The rows of a set's manifest: those of the clips that `selection` takes."""

    def __init__(self, maker: SetMaker, selection: Selection):
        self.maker, self.selection = maker, selection
        self.sorter, self.roots = Sorter("clip", maker.folder.parent), []

    def add(
        self, clips: Sequence[Clip], contents: Contents, text_key: Callable[[str], str]
    ) -> dict[str, str]:
        """Add clips; return {key of the text states: caption} of those that the set takes."""
        jobs = self.selection.jobs(clips)
        if not jobs:
            return {}
        self.roots.append(places.root_of(job.clip for job in jobs))
        runs = [jobs[first : first + RUN] for first in range(0, len(jobs), RUN)]
        with ThreadPoolExecutor() as pool:  # which waits for the files to be read

            def keys_of(run: Sequence[Job]) -> list[list[str]]:
                return [self.maker.keys(job, contents) for job in run]

            keys = list(itertools.chain.from_iterable(pool.map(keys_of, runs)))
        texts = [[text_key(text) for text in job.clip.captions] for job in jobs]
        rows = [
            _row(job)
            | {"keys": list(map(bytes.fromhex, own)), "texts": list(map(bytes.fromhex, some))}
            for job, own, some in zip(jobs, keys, texts, strict=True)
        ]
        types = {
            n: pyarrow.from_numpy_dtype(t) if t is not str else pyarrow.string()
            for n, t in INDEX_TYPES.items()
        }
        columns = {n: pyarrow.array([r[n] for r in rows], t) for n, t in (types | JOBS).items()}
        self.sorter.add(pyarrow.table(columns), [job.shape for job in jobs])
        captions = itertools.chain.from_iterable(job.clip.captions for job in jobs)
        return dict(zip(itertools.chain.from_iterable(texts), captions, strict=True))

    def write(self, size: int) -> None:
        """Write the manifest, unless there is one, with `size` records a shard; 0: by bytes.

        Raises ValueError for a set with `pixels` whose clips lie below no common folder.
        """
        folder, root = self.maker.folder, places.common(self.roots)
        if root is None and self.maker.latent_set.pixels:
            raise ValueError(
                f"set {self.maker.latent_set.name!r} has pixels=True, and its clips lie in several "
                f"buckets, or on disks and in stores; put all of them below one folder"
            )
        make_folder(folder)
        replace_text(folder / "identity.json", json.dumps(self.maker.made_of, indent=1))
        text = _root_text(root, folder)

        def tables() -> Iterator[pyarrow.Table]:
            return (self._below(rows, root, text) for rows in self.sorter.tables())

        def weights(rows: pyarrow.Table) -> np.ndarray:
            if size:
                return np.full(len(rows), -(-WHOLE // size))
            # two float16 of 64 numbers a token
            record = rows["tokens"].to_numpy() * 256 * max(1, len(self.maker.slots))
            return WHOLE // np.clip(BYTES // record, LEAST, MOST)

        plan(folder, tables, weights, {"root": text, **self.maker.made_of})

    def _below(self, rows: pyarrow.Table, root: Place | None, text: str | None) -> pyarrow.Table:
        """Return rows whose places are relative to the root, with the keys of places."""
        if root is not None:
            prefix = json.dumps(str(root), ensure_ascii=False)[1:-1].rstrip("/")
            found = rows["place"]
            for field in places.FILES:  # no other value holds `"FIELD": "`: JSON escapes quotes
                begin = f'"{field}": "'
                below = f"{begin}{prefix}/", f"{begin}./"
                found = pyarrow.compute.replace_substring(found, *below)
            rows = rows.set_column(rows.column_names.index("place"), "place", found)
        if self.maker.latent_set.pixels:
            keys = [[bytes.fromhex(key("place", text, one))] for one in rows["place"].to_pylist()]
            at = rows.column_names.index("keys")
            rows = rows.set_column(at, "keys", pyarrow.array(keys, KEYS))
        return rows.combine_chunks()


class TextPlan:
    """The rows of the manifest of texts: each caption once."""

    def __init__(self, maker: TextMaker):
        self.maker, self.sorter = maker, Sorter("key", maker.folder.parent)

    def add(self, captions: dict[str, str]) -> None:
        """Add {key: caption}."""
        keys = list(map(bytes.fromhex, captions))
        columns = {"key": keys, "caption": list(captions.values()), "keys": [[k] for k in keys]}
        table = pyarrow.table({n: pyarrow.array(columns[n], kind) for n, kind in TEXT.items()})
        self.sorter.add(table, [one[0] for one in keys])

    def write(self, size: int, problems: Iterable[str]) -> None:
        """Write the manifest, unless there is one, with `size` captions a shard (0: CAPTIONS).

        `problems` are lines for the rows of the source that cannot be used.
        """

        def tables() -> Iterator[pyarrow.Table]:
            for rows in without_repeats(self.sorter.tables(), "key"):
                yield rows.drop_columns(["key"])

        about = {"weights": self.maker.weights, "problems": list(problems)}
        weight = -(-WHOLE // (size or CAPTIONS))
        plan(self.maker.folder, tables, lambda rows: np.full(len(rows), weight), about)


def _root_text(root: Place | None, folder: Place) -> str | None:
    """Return the root of the source, relative to the set's folder if both are local."""
    if root is None:
        return None
    both = isinstance(root, Path) and isinstance(folder, Path)
    return os.path.relpath(root, os.path.realpath(folder)) if both else str(root)


def _row(job: Job) -> dict:
    """Return the row of a job in the manifest, without its keys; its places are absolute."""
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
        "place": places.to_bytes(job.clip, None).tobytes().decode(),
        "captions": job.clip.captions,
        "start": job.start,
        "stride": job.stride,
    }
