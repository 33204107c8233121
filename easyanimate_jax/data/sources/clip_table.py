"""Read the parquet table of clips: one row per clip, with all its known properties.

`prepare.curate` writes it; training sources and the plan's report read it. A clip is a span of a
file; no video is encoded again. Other programs may have edited the table, so each value is checked,
a column at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from pyarrow import types

from easyanimate_jax.data.paths import beside, open_regular, safe_path
from easyanimate_jax.data.sources.rows import KINDS, Clip, Problem, caption_of
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.errors import raise_if_of_the_system
from easyanimate_jax.storage.stores import Place

COLUMNS = {
    "clip": pyarrow.string(),  # the clip's name: its file, and its span if it is not the whole
    "file": pyarrow.string(),  # relative to the folder of the films
    "kind": pyarrow.string(),
    "first": pyarrow.int64(),  # first frame, counted in the file
    "frames": pyarrow.int64(),
    "fps": pyarrow.float64(),
    "height": pyarrow.int32(),
    "width": pyarrow.int32(),
    "captions": pyarrow.list_(pyarrow.string()),
}
FILM_FRAMES = "film_frames"  # a column that may be missing: frames of the whole file
TEXTS = ("clip", "file", "kind")
CHUNK = 2**14  # rows in memory at a time
NUMBERS = {  # column -> (least value, whether it is a whole number)
    "first": (0, True),
    "frames": (1, True),
    "fps": (0, False),
    "height": (1, True),
    "width": (1, True),
}


def is_table(path: str | Place) -> bool:
    """Return True if `path` is a parquet file with the columns of spans of films.

    Raises ValueError if it has these and lacks others of a table of clips.
    """
    path = stores.place(path)
    if path.suffix.lower() != ".parquet":
        return False
    try:
        with open_regular(path) as file:
            have = set(pyarrow.parquet.read_schema(file).names)
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # also no such file
        raise_if_of_the_system(error)
        return False
    if not {"clip", "first"} <= have:
        return False
    missing = sorted(set(COLUMNS) - have)
    if missing:
        raise ValueError(
            f"{path} is a table of clips without the columns {', '.join(missing)}; write them back"
        )
    return True


def sizes(path: str | Place) -> tuple[dict[str, np.ndarray], list[Problem]]:
    """Return columns of the kept clips, and a `Problem` for each row that cannot be used.

    The columns are clip, kind, frames, fps, height, width and quality.
    """
    names, parts, problems = ["clip", "kind", "frames", "fps", "height", "width"], [], []
    with _opened(stores.place(path)) as table:
        for columns, _, bad in table.rows(names):
            for name in ("clip", "kind"):
                texts = [text.encode() for text in columns[name].to_pylist()]
                columns[name] = np.array(texts) if texts else np.zeros(0, "S1")
            parts.append(columns)
            problems += bad
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return columns, sorted(problems)


def clips(path: str | Place, links: str | Path | None = None) -> tuple[list[Clip], list[Problem]]:
    """Return the clips of the table that are captioned and not left out, in its order.

    The second result has a `Problem` for each row that cannot be used. `links` is that of
    `read_clips`. Raises ValueError if there is no clip.
    """
    found, problems = [], []
    for some, bad in chunks(path, links):
        found += some
        problems += bad
    return found, sorted(problems)


def chunks(
    path: str | Place, links: str | Path | None = None
) -> Iterator[tuple[list[Clip], list[Problem]]]:
    """Yield what `clips` returns for some rows at a time; memory does not grow with the table."""
    path, first, shown, count = stores.place(path), None, [], 0
    with _opened(path) as table:
        # `root` is the folder of the films, relative to the table's folder.
        root = beside(path.parent, table.told.get(b"root", b".").decode())
        for columns, rows, problems in table.rows([*TEXTS, *NUMBERS, "captions"]):
            found = _clips(columns, rows, root, links, problems)
            if first is None and found:
                first = found[0].path
                if b"root" not in table.told and not first.is_file():
                    raise ValueError(
                        f"{path} has lost its metadata `root`, the folder of the films, as pandas "
                        f"does when it writes a table, and {first} is not there; move the table "
                        f"into that folder"
                    )
            count += len(problems)
            shown += problems[: 20 - len(shown)]
            yield found, problems
    if first is None:
        listed = "".join(f"\n  row {p.row} {p.file}: {p.reason}" for p in sorted(shown))
        raise ValueError(
            f"{path} holds no clip that is captioned and kept ({count} bad rows); curate it again"
            f"{listed}"
        )


def _clips(columns: dict, rows: np.ndarray, root: Place, links, problems: list) -> list[Clip]:
    """Return the captioned clips of usable rows; add the others with a reason to `problems`."""
    found = []
    texts = zip(*(columns[name].to_pylist() for name in (*TEXTS, "captions")), strict=True)
    numbers = zip(*(columns[name].tolist() for name in (*NUMBERS, "quality")), strict=True)
    for number, (name, file, kind, captions), sized in zip(
        rows.tolist(), texts, numbers, strict=True
    ):
        captions = [captions] if isinstance(captions, str) else captions or []
        first, frames, fps, height, width, quality = sized
        reasons = [f"captions: {reason}" for text in captions if (reason := caption_of(text))]
        try:
            film = safe_path(root, file, links)
        except ValueError as error:
            reasons.append(f"file: {error}")
        if reasons:
            problems.append(Problem(number, name, reasons[0]))
        elif captions:
            size = frames, height, width, fps
            captions = tuple(captions)
            found.append(Clip(name, film, kind, captions, *size, first, quality=quality))
    return found


@contextmanager
def _opened(path: Place) -> Iterator["_Table"]:
    with open_regular(path) as file, pyarrow.parquet.ParquetFile(file) as parquet:
        yield _Table(path, parquet)


class _Table:
    """An open table; `told` is its metadata."""

    def __init__(self, path: Place, parquet: pyarrow.parquet.ParquetFile):
        self.path, self.parquet = path, parquet
        self.told = parquet.schema_arrow.metadata or {}
        self.have = parquet.schema_arrow.names
        self.firsts: dict[str, int] = {}  # of the names that come again: the row of the first

    def rows(self, names: list[str]) -> Iterator[tuple[dict, np.ndarray, list[Problem]]]:
        """Yield columns of the usable kept rows, the rows' numbers, and the other kept rows.

        Rows are numbered from 0. Numbers are NumPy arrays, and texts and captions pyarrow's. A
        table without `quality` gives zeros.
        """
        more = [name for name in ("quality", FILM_FRAMES, "left_out") if name in self.have]
        again, first = self._again(), 0
        for batch in self.parquet.iter_batches(CHUNK, columns=[*names, *more]):
            yield self._usable(pyarrow.Table.from_batches([batch]), names, first, again)
            first += len(batch)
        if not first:
            yield self._usable(self.parquet.read([*names, *more]), names, 0, again)

    def _again(self) -> set[int]:
        """Return the hashes of names that come more than once."""
        if not _is_text(self.parquet.schema_arrow.field("clip").type):
            return set()
        parts = [
            np.fromiter(map(hash, batch["clip"].to_pylist()), np.int64, len(batch))
            for batch in self.parquet.iter_batches(CHUNK, columns=["clip"])
        ]
        hashes, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *parts]), return_counts=1)
        return set(hashes[counts > 1].tolist())

    def _usable(self, table: pyarrow.Table, names: list[str], number: int, again: set[int]):
        rows = np.flatnonzero(_kept(table, self.path))
        table, faults, columns = table.take(rows), {}, {"quality": np.zeros(len(rows))}
        rows += number
        for name in [*names, *(["quality"] if "quality" in self.have else [])]:
            columns[name], bad, repair = _checked(name, table[name])
            for place in np.flatnonzero(bad).tolist():
                faults.setdefault(place, f"{name} is {table[name][place].as_py()!r}; {repair}")
        for place in np.flatnonzero((columns["fps"] == 0) & (columns["frames"] > 1)).tolist():
            faults.setdefault(place, "fps is 0; give the rate of these frames")
        if "first" in names and FILM_FRAMES in self.have and _is_number(table[FILM_FRAMES].type):
            whole, ends = _floats(table[FILM_FRAMES]), columns["first"] + columns["frames"]
            for place in np.flatnonzero(ends > whole).tolist():
                told = f"{ends[place]:g}; the film has {whole[place]:g} frames"
                faults.setdefault(place, f"first and frames end at {told}")
        for place, name in enumerate(columns["clip"].to_pylist() if again else ()):
            if place not in faults and hash(name) in again:
                first = self.firsts.setdefault(name, int(rows[place]))
                if first != rows[place]:
                    faults[place] = f"clip has the name of row {first}; give it a name of its own"
        good = np.setdiff1d(np.arange(len(rows)), list(faults))
        for name, values in columns.items():
            columns[name] = values.take(good)
            if name in NUMBERS and NUMBERS[name][1]:
                columns[name] = columns[name].astype(np.int64)
        problems = [
            Problem(int(rows[place]), str(table["clip"][place].as_py()), reason)
            for place, reason in sorted(faults.items())
        ]
        return columns, rows[good], problems


def _kept(table: pyarrow.Table, path: Place) -> np.ndarray:
    """Return a mask of the rows that are not left out. Raises ValueError if it is not a text."""
    if "left_out" not in table.column_names:
        return np.ones(len(table), bool)
    column = table["left_out"]
    if _is_number(column.type) and not np.isfinite(_floats(column)).any():
        return np.ones(len(table), bool)  # pandas writes NaN for a text that is missing
    if not _is_text(column.type) and not types.is_null(column.type):
        raise ValueError(
            f"{path}: left_out is of type {column.type}; write the reason, or an empty text"
        )
    texts = pyarrow.compute.fill_null(column.cast(pyarrow.string()), "")
    return pyarrow.compute.equal(texts, "").to_numpy()


def _checked(name: str, column: pyarrow.ChunkedArray) -> tuple:
    """Return the values of a column, a mask of the unusable ones, and what to use instead."""
    every = np.ones(len(column), bool)
    if name in NUMBERS or name == "quality":
        if not _is_number(column.type):
            return np.zeros(len(column)), every, f"write a number, not {column.type}"
        values = _floats(column)
        if name == "quality":  # rows that others added have none
            values = np.where(np.isnan(values), 0.0, values)
            return values, (values < 0) | (values > 1), "use 0 to 1"
        least, whole = NUMBERS[name]
        bad = ~((values >= least) & (values < 2**53))  # NaN is neither
        if whole:
            bad |= values != np.floor(values)
        return values, bad, f"use a {'whole ' * whole}number of {least} or more"
    if name == "captions":
        inner = column.type.value_type if hasattr(column.type, "value_type") else column.type
        bad = ~every if _is_text(inner) or types.is_null(inner) else every
        return column, bad, f"write a list of texts, not {column.type}"
    if not _is_text(column.type):
        empty = pyarrow.chunked_array([pyarrow.nulls(len(column), pyarrow.string())])
        return empty, every, f"write a text, not {column.type}"
    texts = pyarrow.compute.fill_null(column.cast(pyarrow.string()), "")
    if name == "kind":
        known = pyarrow.compute.is_in(texts, pyarrow.array(KINDS)).to_numpy()
        return texts, ~known, f"use one of {', '.join(KINDS)}"
    return texts, pyarrow.compute.equal(texts, "").to_numpy(), "write a text"


def _is_number(kind: pyarrow.DataType) -> bool:
    return types.is_integer(kind) or types.is_floating(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


def _floats(column: pyarrow.ChunkedArray) -> np.ndarray:
    """Return numbers as float64; null becomes NaN."""
    return column.cast(pyarrow.float64(), safe=False).to_numpy()
