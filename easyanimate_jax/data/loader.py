"""Batches of encoded clips: the plan's records, read ahead by grain's threads.

Letters beyond the legend: A microbatches of a global batch, P token width. A row's draws (which
caption, caption or none, which mask) come from seed, stage, step and row alone, so a loader that
starts at step k delivers what one that walked there would have.
"""

import ctypes
import hashlib
import json
import math
import mmap
import signal
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Records, read_texts
from easyanimate_jax.diffusion.tasks import TASKS, TaskName

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # in batches
FOREVER = 2**40  # steps
READERS = 16  # records of a batch that are read at the same time
MAX_BAD, FEW_BAD = 1e-3, 3  # records that may be unreadable: a share, and a number
PR_SET_PDEATHSIG = 1  # of Linux's prctl
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT = 2**25  # bytes; no record is larger, and glibc allows no more


class Batch(NamedTuple):
    """Latent statistics as tokens, zero past `lengths`. Rows of weight 0 fill microbatches up.

    Latents and texts are float16, as on disk: half the bytes to a device. The step makes them
    float32.
    """

    mean: np.ndarray  # (A, B, N, P) of the normalised latents
    logvar: np.ndarray  # (A, B, N, P)
    grid: np.ndarray  # (A, B, 3) int32: latent frames, token rows, token columns
    lengths: np.ndarray  # (A, B) int32
    texts: tuple[np.ndarray, ...]  # (A, B, L, width) each
    condition: np.ndarray | None  # (A, B, N, extra * 4): mask first, or control first
    weight: np.ndarray  # (A, B), 1 or 0


class Pages:
    """Memory for the arrays of batches, used again once no view of them is left.

    New pages fault and are zeroed, at a third of the time that a record takes to read; those of
    2 MB, where they fit, fault once instead of every 4 KB.
    """

    def __init__(self):
        self.free = defaultdict(list)  # bytes -> pages of arrays that are gone

    def array(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An array of any values, to be filled."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        free = self.free[size]
        try:
            pages = free.pop()
        except IndexError:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if sys.platform == "linux":
                pages.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(pages, dtype)
        weakref.finalize(array, free.append, pages).atexit = False  # when its last view is gone
        return array.reshape(shape)


class Loader:
    """Reads `plan` from `records`, in microbatches of `microbatch` rows.

    A caption is replaced by the empty prompt with probability `text_drop` (spec 5.3), the control
    and the reference of a row by zeros, each by itself, with those of `drops` (spec 7.2). A process
    reads and builds only the `rows` of every microbatch that its devices need, all of them if None;
    the others are memory that is never touched. The rows of a batch are read at the same time. A
    record that does not read is replaced by the next of its bucket, and noted in the file
    `quarantine`.
    """

    def __init__(
        self,
        records: Records,
        plan: Plan,
        *,
        task: TaskName,
        microbatch: int,
        text_drop: float,
        rows: Collection[int] | None = None,
        quarantine: Path | None = None,
        drops: tuple[float, float] = (0.0, 0.0),
    ):
        made = records.header["set"]
        if task == "i2v" and not (made["condition_draws"] or made.get("pixels")):
            raise ValueError(
                f"stage {plan.name!r} is i2v, and {records.folder} was prepared without "
                f"condition_draws; set them and prepare again"
            )
        control = made.get("control", ())
        camera = "camera" in TASKS[task].holds
        if TASKS[task].is_control and (not control or ("camera" in control) != camera):
            raise ValueError(
                f"stage {plan.name!r} is {task}, and {records.folder} was prepared with control "
                f"{', '.join(control) or 'of no kind'}; give the set "
                f"{'camera' if camera else 'another one'}"
            )
        self.records, self.plan, self.task = records, plan, task
        self.microbatch, self.text_drop, self.rows = microbatch, text_drop, rows
        self.drops = drops
        empty = read_texts(records.folder.parent / "empty.safetensors")
        self.empty = [text[0].astype(np.float16) for text in empty]
        self.name_word = int.from_bytes(hashlib.blake2b(plan.name.encode()).digest()[:8], "little")
        self.bad, self.quarantine = {}, quarantine  # record -> why it does not read
        keep_memory()

    def batches(self, start: int = 0, workers: int = 0) -> Iterator[tuple[int, Batch]]:
        """(token length, batch) of the stage's own steps `start`, `start` + 1, ... without end.

        By threads of this process, or by `workers` processes; the batches are the same.
        """
        return self._ahead(partial(self.batch, pages=Pages()), start, READ, workers)

    def batch(self, step: int, pages: Pages | None = None) -> tuple[int, Batch]:
        """(token length, batch) of one step, in memory of `pages` where they are given."""
        length, ids = self.plan(int(step))
        own = self._own(len(ids))
        with ThreadPoolExecutor(READERS) as pool:
            fields = pool.map(lambda row: self._row(int(step), row, int(ids[row])), own)
            made = zip(own, fields, strict=True)
            return length, self._assemble(length, ids, made, pages or Pages())

    def _ahead(
        self, function: Callable, start: int, read: grain.ReadOptions, workers: int
    ) -> Iterator:
        """What `function` makes of the steps `start`, `start` + 1, ..., made ahead."""
        steps = grain.MapDataset.range(start, FOREVER)
        made = steps.map(function).to_iter_dataset(read)
        if workers:
            flags.FLAGS.mark_as_parsed()  # grain's processes read flags that nobody parses here
            options = grain.MultiprocessingOptions(num_workers=workers)
            made = made.mp_prefetch(options, worker_init_fn=_start_worker)
        return iter(made)

    def _own(self, count: int) -> list[int]:
        """The rows to read of a batch of `count`; where all are padding, one for its shapes."""
        return [row for row in range(count) if self._holds(row)] or [0]

    def _holds(self, row: int) -> bool:
        """Whether this process's devices hold the row."""
        return self.rows is None or row % self.microbatch in self.rows

    def _assemble(
        self, length: int, ids: np.ndarray, rows: Iterable[tuple[int, dict]], pages: Pages
    ) -> Batch:
        """The batch of records `ids`, its own `rows` given as `_fields` gives them."""
        micro = self.microbatch
        total = -(-len(ids) // micro) * micro
        # All rows have a grid: padding rows are one token long, so that their numbers are finite.
        grid = np.ones((total, 3), np.int32)
        grid[: len(ids)] = [self._grid(int(record)) for record in ids]
        weight = (np.arange(total) < len(ids)).astype(np.float32)
        arrays = {}

        def put(name: str, row: int, values: np.ndarray, *lead: int) -> None:
            if name not in arrays:
                dtype = np.float32 if name == "condition" else np.float16
                arrays[name] = pages.array((total, *lead, *values.shape[1:]), dtype)
            arrays[name][row, : len(values)] = values
            arrays[name][row, len(values) :] = 0

        def put_texts(row: int, texts: list[np.ndarray]) -> None:
            for i, text in enumerate(texts):
                put(f"text{i}", row, text, len(text))

        latents = ("mean", "logvar", *(["condition"] if self.task != "t2v" else []))
        for row, fields in rows:
            grid[row] = fields["grid"]
            for name in latents:
                put(name, row, fields[name], length)
            put_texts(row, fields["texts"])
        for row in filter(self._holds, range(len(ids), total)):
            for name in latents:
                arrays[name][row] = 0
            put_texts(row, self.empty)

        split = lambda x: x.reshape(-1, micro, *x.shape[1:])  # noqa: E731
        return Batch(
            mean=split(arrays["mean"]),
            logvar=split(arrays["logvar"]),
            grid=split(grid),
            lengths=split(grid.prod(axis=1, dtype=np.int32)),
            texts=tuple(split(arrays[f"text{i}"]) for i in range(len(self.empty))),
            condition=split(arrays["condition"]) if self.task != "t2v" else None,
            weight=split(weight),
        )

    def _row(self, step: int, row: int, record: int) -> dict:
        record, arrays = self._instead(record, self._arrays)
        return self._fields(step, row, record, arrays)

    def _fields(self, step: int, row: int, record: int, arrays: dict[str, np.ndarray]) -> dict:
        """What the row shows of the record's arrays, by the row's own draws."""
        rng = np.random.default_rng(self._words(step, row))
        caption = rng.integers(self.records.index["num_captions"][record])
        dropped = rng.random() < self.text_drop
        texts = [
            empty if dropped else arrays[f"text{i}"][caption] for i, empty in enumerate(self.empty)
        ]
        fields = {"mean": arrays["mean"], "logvar": arrays["logvar"], "texts": texts}
        fields["grid"] = self._grid(record)
        if self.task == "i2v":
            fields["condition"] = _condition(rng, arrays)
        if TASKS[self.task].is_control:
            fields["condition"] = _control(rng, arrays, self.task, self.drops)
        return fields

    def _words(self, step: int, row: int) -> list[int]:
        """The seed of a row's draws."""
        return [self.plan.seed, self.name_word, step, row]

    def _instead(self, record: int, read: Callable[[int], object]) -> tuple:
        """The record, or the next of its bucket that `read` can read, and what it gives."""
        for candidate in self.plan.instead_of(record):
            if candidate in self.bad:
                continue
            try:
                return candidate, read(candidate)
            except ValueError as error:
                self._leave_out(candidate, str(error))
        raise ValueError(f"stage {self.plan.name!r}: no record of a whole bucket reads")

    def _arrays(self, record: int) -> dict[str, np.ndarray]:
        arrays, tokens = self.records[record], self.records.index["tokens"][record]
        if len(arrays["mean"]) != tokens:
            raise ValueError(
                f"{self.records.folder}: record {record} has {len(arrays['mean'])} "
                f"tokens, and its index row {tokens}; prepare the set again"
            )
        return arrays

    def _leave_out(self, record: int, reason: str) -> None:
        if self.bad.setdefault(record, reason) is not reason:
            return  # another thread met it too
        if self.quarantine:
            entry = {"stage": self.plan.name, "record": record, "reason": reason}
            with open(self.quarantine, "a") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if len(self.bad) > max(FEW_BAD, MAX_BAD * len(self.records)):
            raise ValueError(
                f"stage {self.plan.name!r}: {len(self.bad)} of {len(self.records)} records do not "
                f"read, the latest because {reason}"
            )

    def _grid(self, record: int) -> np.ndarray:
        index = self.records.index
        return np.array([index[axis][record] for axis in ("T", "gh", "gw")], np.int32)


def keep_memory() -> None:
    """Let malloc reuse a record's memory for the next: else every page of each faults anew."""
    if sys.platform == "linux":
        for option, value in ((M_MMAP_THRESHOLD, KEPT), (M_TRIM_THRESHOLD, 8 * KEPT)):
            ctypes.CDLL(None).mallopt(option, value)


def _start_worker(_worker: int, _workers: int) -> None:
    """A worker process ends when its parent does, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    keep_memory()


def _condition(rng: np.random.Generator, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """One of the clip's conditionings (spec 6.1): (N, 4 + P), the mask and a sample of the masked
    video's latents; all zero where its flag is."""
    draw = rng.integers(len(arrays["condition_flag"]))
    mean, logvar, mask, flag = (
        arrays[f"condition_{name}"][draw].astype(np.float32)
        for name in ("mean", "logvar", "mask", "flag")
    )
    return flag * np.concatenate([mask, _sample(rng, mean, logvar)], axis=-1)


def _control(
    rng: np.random.Generator, arrays: dict[str, np.ndarray], task: str, drops: tuple[float, float]
) -> np.ndarray:
    """What leads the clip (spec 7.2): one of its control videos or the rays, then the reference
    frame in the tokens of latent frame 0."""

    def latents(name: str, which=slice(None)) -> np.ndarray:
        parts = (arrays[f"{name}_{part}"][which].astype(np.float32) for part in ("mean", "logvar"))
        return _sample(rng, *parts)

    keep_control, keep_reference = rng.random(2) >= drops
    if "camera" in TASKS[task].holds:
        control, keep_reference = arrays["control_rays"].astype(np.float32), True
    else:
        which = rng.integers(len(arrays["control_mean"]))
        control = keep_control * latents("control", which)
    if "reference picture" not in TASKS[task].holds:
        return control
    reference = keep_reference * latents("reference")
    placed = np.zeros((len(control), reference.shape[1]), np.float32)
    placed[: len(reference)] = reference
    return np.concatenate([control, placed], axis=-1)


def _sample(rng: np.random.Generator, mean: np.ndarray, logvar: np.ndarray) -> np.ndarray:
    """A draw from a posterior."""
    return mean + np.exp(logvar / 2) * rng.standard_normal(mean.shape, np.float32)
