"""Batches of encoded clips: the records of the plan, read ahead by grain's threads.

Letters beyond the legend: A microbatches of a global batch, P token width. A row's random draws
(which caption, caption or none, which mask) depend only on seed, stage, step and row. A loader that
starts at step k therefore delivers the same batches as one that ran up to step k.
"""

import copy
import ctypes
import hashlib
import json
import math
import mmap
import signal
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from easyanimate_jax.data.held_out import HeldOut
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Cells, Records, padded, read_texts
from easyanimate_jax.diffusion.tasks import TASKS, TaskName

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # the buffer holds batches
FOREVER = 2**40  # steps
READERS = 64  # rows of a batch that are read in parallel: a store answers after milliseconds
MAX_BAD, FEW_BAD = 1e-3, 3  # limits of unreadable records: a share, and a minimum number
PR_SET_PDEATHSIG = 1  # from Linux's prctl
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's mallopt
WORSE = "worse_"  # begins the names of the worse clip's arrays in a record of a pair
KEPT = 2**25  # bytes; no record is larger, and glibc's limit is the same


class Worse(NamedTuple):
    """The worse clips of pairs; their grid, texts and weight are those of the better ones."""

    mean: np.ndarray  # (A, B, N, P) of the normalised latents
    logvar: np.ndarray  # (A, B, N, P)
    condition: np.ndarray | None  # (A, B, N, extra * 4): drawn as that of the better clip


class Group(NamedTuple):
    """Videos that a model sampled of the captions of a batch, n of each, and their rewards."""

    latents: np.ndarray  # (A, n, B, N, P) as tokens
    advantage: np.ndarray  # (A, n, B)
    reward: np.ndarray  # (A, n, B, k) of k rewards


class Batch(NamedTuple):
    """Latent statistics as tokens, zero past `lengths`. Padding rows have weight 0.

    Padding rows fill up the last microbatch. Latents and texts are float16, as on disk, which
    halves the bytes sent to a device. The training step converts them to float32.
    """

    mean: np.ndarray  # (A, B, N, P) of the normalised latents
    logvar: np.ndarray  # (A, B, N, P)
    grid: np.ndarray  # (A, B, 3) int32: latent frames, token rows, token columns
    lengths: np.ndarray  # (A, B) int32
    texts: tuple[np.ndarray, ...]  # (A, B, L, width) each
    condition: np.ndarray | None  # (A, B, N, extra * 4): mask first, or control first
    weight: np.ndarray  # (A, B), 1 or 0
    empty: tuple[np.ndarray, ...] | None = None  # (A, 1, L, width) each: states of no caption
    worse: Worse | None = None  # the worse clip of each row, in a set of pairs
    group: Group | None = None  # sampled videos of each row's caption


class Pages:
    """Memory for the arrays of batches; it is reused once no view of an array is left.

    New pages fault and are zeroed, which costs a third of the time to read a record. Pages of 2 MB,
    if available, fault once instead of every 4 KB.
    """

    def __init__(self):
        self.free = defaultdict(list)  # bytes -> pages of deleted arrays

    def array(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """Return an uninitialised array, to be filled by the caller."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        free = self.free[size]
        try:
            pages = free.pop()
        except IndexError:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if sys.platform == "linux":
                pages.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(pages, dtype)
        weakref.finalize(array, free.append, pages).atexit = False  # runs after the last view
        return array.reshape(shape)


class Loader:
    """Read `plan` from `records`, in microbatches of `microbatch` rows.

    `rows` are the rows of each microbatch that this process's devices need; None means all. Other
    rows are not read, and their memory is never touched. The rows of a batch are read in parallel.
    A caption is replaced by the empty prompt with probability `text_drop` (spec 5.3). The control,
    the reference (spec 7.2) and the start picture of a row are each replaced by zeros with the
    probabilities `drops`. If `draw_by` gives each record a number, the draws of a row depend on
    that alone. A batch of a set of pairs also has the worse clips. An unreadable record is replaced
    by the next of its bucket, and is logged in the file `quarantine`. Raises ValueError if the set
    does not fit the task, or if too many records are unreadable.
    """

    def __init__(
        self,
        records: Records,
        plan: Plan | HeldOut,
        *,
        task: TaskName,
        microbatch: int,
        text_drop: float,
        rows: Collection[int] | None = None,
        quarantine: Path | None = None,
        drops: tuple[float, float, float] = (0.0, 0.0, 0.0),
        draw_by: dict[int, int] | None = None,
    ):
        _check_task(records, plan.name, task)
        self.records, self.plan, self.task = records, plan, task
        self.microbatch, self.rows, self.text_drop = microbatch, rows, text_drop
        self.drops, self.draw_by = drops, draw_by
        self.pairs = records.header["set"].get("pairs", False)
        empty = read_texts(records.folder.parent / "empty.safetensors")
        self.empty = [text[0].astype(np.float16) for text in empty]
        self.name_word = int.from_bytes(hashlib.blake2b(plan.name.encode()).digest()[:8], "little")
        self.bad, self.quarantine = {}, quarantine  # record -> why it is unreadable
        keep_memory()

    def batches(self, start: int = 0, workers: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yield (token length, batch) of the stage's steps `start`, `start` + 1, ... without end.

        The batches are made by threads of this process, or by `workers` processes; they are the
        same.
        """
        return self._ahead(partial(self.batch, pages=Pages()), start, READ, workers)

    def batch(self, step: int, pages: Pages | None = None) -> tuple[int, Batch]:
        """Return (token length, batch) of one step; `pages` provides its memory if given."""
        length, ids = self.plan(int(step))
        own = self._own(len(ids))
        with ThreadPoolExecutor(READERS) as pool:
            fields = pool.map(lambda row: self._row(int(step), row, int(ids[row])), own)
            made = zip(own, fields, strict=True)
            return length, self._assemble(length, ids, made, pages or Pages())

    def _draw_caption(self, rng: np.random.Generator, record: int) -> int | None:
        """Return the number of a row's caption; None if it is replaced by the empty one."""
        number = rng.integers(self.records.index["num_captions"][record])
        return None if rng.random() < self.text_drop else int(number)

    def _ahead(
        self, function: Callable, start: int, read: grain.ReadOptions, workers: int
    ) -> Iterator:
        """Return an iterator over `function(step)` for the steps from `start`, computed ahead."""
        steps = grain.MapDataset.range(start, FOREVER)
        made = steps.map(function).to_iter_dataset(read)
        if workers:
            flags.FLAGS.mark_as_parsed()  # grain's processes read absl flags, unparsed here
            options = grain.MultiprocessingOptions(num_workers=workers)
            made = made.mp_prefetch(options, worker_init_fn=_start_worker)
        return iter(made)

    def _own(self, count: int) -> list[int]:
        """Return the rows to read of a batch of `count`.

        If this process holds only padding rows, row 0 is read for its shapes.
        """
        return [row for row in range(count) if self._holds(row)] or [0]

    def _holds(self, row: int) -> bool:
        """Return True if this process's devices hold the row."""
        return self.rows is None or row % self.microbatch in self.rows

    def _assemble(
        self, length: int, ids: np.ndarray, rows: Iterable[tuple[int, dict]], pages: Pages
    ) -> Batch:
        """Return the batch of records `ids`; `rows` are the fields of this process's rows."""
        micro = self.microbatch
        total = -(-len(ids) // micro) * micro
        # Padding rows get a grid of one token, so that their results are finite.
        grid = np.ones((total, 3), np.int32)
        grid[: len(ids)] = [self._grid(int(record)) for record in ids]
        weight = (np.arange(total) < len(ids)).astype(np.float32)
        arrays = {}

        def put(name: str, row: int, values: np.ndarray, *lead: int) -> None:
            if name not in arrays:
                dtype = np.float32 if name.endswith("condition") else np.float16
                arrays[name] = pages.array((total, *lead, *values.shape[1:]), dtype)
            arrays[name][row, : len(values)] = values
            arrays[name][row, len(values) :] = 0

        def put_texts(row: int, texts: list[np.ndarray]) -> None:
            for i, text in enumerate(texts):
                put(f"text{i}", row, text, len(text))

        latents = ["mean", "logvar", *(["condition"] if self.task != "t2v" else [])]
        latents += [f"{WORSE}{name}" for name in latents if self.pairs]
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
        worse = (arrays.get(f"{WORSE}{name}") for name in Worse._fields)
        return Batch(
            mean=split(arrays["mean"]),
            logvar=split(arrays["logvar"]),
            grid=split(grid),
            lengths=split(grid.prod(axis=1, dtype=np.int32)),
            texts=tuple(split(arrays[f"text{i}"]) for i in range(len(self.empty))),
            condition=split(arrays["condition"]) if self.task != "t2v" else None,
            weight=split(weight),
            worse=Worse(*(x if x is None else split(x) for x in worse)) if self.pairs else None,
        )

    def _row(self, step: int, row: int, record: int) -> dict:
        def read(candidate: int) -> dict:
            cells = self.records.cells(candidate)
            self._check_tokens(candidate, cells)
            return self._fields(step, row, candidate, cells)

        return self._instead(record, read)[1]

    def _fields(self, step: int, row: int, record: int, cells: Cells) -> dict:
        """Return the record's arrays that the row uses, chosen by the row's own random draws."""
        rng = np.random.default_rng(self._words(step, row, record))
        number = self._draw_caption(rng, record)
        texts = self.empty if number is None else list(padded(cells(f"text {number}"))[:-1])
        fields = {"grid": self._grid(record), "texts": texts}
        again = copy.deepcopy(rng) if self.pairs else rng
        fields |= _latents(rng, cells, self.task, self.drops)
        if self.pairs:
            found = _latents(again, _worse(cells), self.task, self.drops)
            fields |= {f"{WORSE}{name}": x for name, x in found.items()}
        return fields

    def _words(self, step: int, row: int, record: int) -> list[int]:
        """Return the seed of a row's random draws."""
        if self.draw_by is not None:
            return [self.plan.seed, self.draw_by[record]]
        return [self.plan.seed, self.name_word, step, row]

    def _instead(self, record: int, read: Callable[[int], object]) -> tuple:
        """Return (record, read(record)) of `record`, or of the next readable one of its bucket."""
        for candidate in self.plan.instead_of(record):
            if candidate in self.bad:
                continue
            try:
                return candidate, read(candidate)
            except ValueError as error:
                self._leave_out(candidate, str(error))
        raise ValueError(
            f"stage {self.plan.name!r}: no record of a whole bucket is readable; prepare the set "
            f"again"
        )

    def _check_tokens(self, record: int, cells: Cells) -> None:
        arrays, tokens = cells("latents"), int(self.records.index["tokens"][record])
        wrong = [n for n, x in arrays.items() if n.endswith("mean") and len(x) != tokens]
        if wrong:
            raise ValueError(
                f"{self.records.folder}: record {record} has {len(arrays[wrong[0]])} tokens, and "
                f"its index row {tokens}; prepare the set again"
            )

    def _leave_out(self, record: int, reason: str) -> None:
        if self.bad.setdefault(record, reason) is not reason:
            return  # another thread has reported it
        if self.quarantine:
            entry = {"stage": self.plan.name, "record": record, "reason": reason}
            with open(self.quarantine, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if len(self.bad) > max(FEW_BAD, MAX_BAD * len(self.records)):
            raise ValueError(
                f"stage {self.plan.name!r}: {len(self.bad)} of {len(self.records)} records do not "
                f"read, the latest because {reason}"
            )

    def _grid(self, record: int) -> np.ndarray:
        index = self.records.index
        return np.array([index[axis][record] for axis in ("T", "gh", "gw")], np.int32)


def captions(loader: Loader, step: int) -> dict[int, str]:
    """Return {row: caption} of the rows of a loader's step that this process's devices hold.

    It is the caption of which the batch has the states.
    """
    ids = loader.plan(step)[1]

    def caption(row: int) -> str:
        def read(candidate: int) -> str:
            rng = np.random.default_rng(loader._words(step, row, candidate))
            number = loader._draw_caption(rng, candidate)
            cells = loader.records.cells(candidate)
            return "" if number is None else padded(cells(f"text {number}"))[-1]

        return loader._instead(int(ids[row]), read)[1]

    own = [row for row in range(len(ids)) if loader._holds(row)]
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(own, pool.map(caption, own), strict=True))


def keep_memory() -> None:
    """Let malloc reuse a record's memory for the next one; otherwise all its pages fault again."""
    if sys.platform == "linux":
        for option, value in ((M_MMAP_THRESHOLD, KEPT), (M_TRIM_THRESHOLD, 8 * KEPT)):
            ctypes.CDLL(None).mallopt(option, value)


def _start_worker(_worker: int, _workers: int) -> None:
    """Make a worker process end when its parent ends, for whatever reason."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    keep_memory()


def _check_task(records: Records, name: str, task: TaskName) -> None:
    """Raise ValueError if the set does not hold what a stage of this name and task reads."""
    made = records.header["set"]
    if task == "i2v" and not (made["condition_draws"] or made.get("pixels")):
        raise ValueError(
            f"stage {name!r} is i2v, and {records.folder} was prepared without "
            f"condition_draws; set condition_draws and prepare the set again"
        )
    control = made.get("control", ())
    camera = "camera" in TASKS[task].holds
    if TASKS[task].is_control and (not control or ("camera" in control) != camera):
        raise ValueError(
            f"stage {name!r} is {task}, and {records.folder} was prepared with control "
            f"{', '.join(control) or 'of no kind'}; give the set "
            f"{'camera' if camera else 'another one'}"
        )


def _worse(cells: Cells) -> Cells:
    """Return the entries of a record with the arrays of the worse clip in place of the better."""

    def read(slot: str) -> dict[str, np.ndarray]:
        arrays = cells(slot)
        worse = {n.removeprefix(WORSE): x for n, x in arrays.items() if n.startswith(WORSE)}
        return arrays | worse

    return Cells(read, cells.slots)


def _latents(
    rng: np.random.Generator, cells: Cells, task: TaskName, drops: Sequence[float]
) -> dict[str, np.ndarray]:
    """Return mean and log-variance of a clip, and its condition if the task has one."""
    arrays = cells("latents")
    fields = {"mean": arrays["mean"], "logvar": arrays["logvar"]}
    if task == "i2v":
        kept = not drops[2] or rng.random() >= drops[2]
        fields["condition"] = kept * _condition(rng, cells)
    if TASKS[task].is_control:
        fields["condition"] = _control(rng, cells, task, drops[:2])
    return fields


def _condition(rng: np.random.Generator, cells: Cells) -> np.ndarray:
    """Return one of the clip's conditions (spec 6.1), (N, 4 + P): mask, then masked latents.

    The latents are a sample of the masked video's posterior. All values are 0 if the flag is 0.
    """
    arrays = cells(f"condition {rng.integers(cells.count('condition'))}")
    mean, logvar, mask, flag = (
        arrays[f"condition_{name}"].astype(np.float32)
        for name in ("mean", "logvar", "mask", "flag")
    )
    return flag * np.concatenate([mask, _sample(rng, mean, logvar)], axis=-1)


def _control(
    rng: np.random.Generator, cells: Cells, task: str, drops: Sequence[float]
) -> np.ndarray:
    """Return the control signal (spec 7.2): control latents or camera rays, then the reference.

    The latents of the reference frame occupy the tokens of latent frame 0; the others are 0.
    """

    def latents(slot: str) -> np.ndarray:
        name, arrays = slot.split()[0], cells(slot)
        parts = (arrays[f"{name}_{part}"].astype(np.float32) for part in ("mean", "logvar"))
        return _sample(rng, *parts)

    keep_control, keep_reference = rng.random(2) >= drops
    if "camera" in TASKS[task].holds:
        control, keep_reference = cells("control 0")["control_rays"].astype(np.float32), True
    else:
        control = keep_control * latents(f"control {rng.integers(cells.count('control'))}")
    if "reference picture" not in TASKS[task].holds:
        return control
    reference = keep_reference * latents("reference")
    placed = np.zeros((len(control), reference.shape[1]), np.float32)
    placed[: len(reference)] = reference
    return np.concatenate([control, placed], axis=-1)


def _sample(rng: np.random.Generator, mean: np.ndarray, logvar: np.ndarray) -> np.ndarray:
    """Return a sample of a posterior."""
    return mean + np.exp(logvar / 2) * rng.standard_normal(mean.shape, np.float32)
