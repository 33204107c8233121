"""Sort tables that are larger than memory: by a group, and in it by a column.

The rows of each group are in one file of a temporary folder until they are read. A large group is
cut at some of its values into parts, each with a file of its own, and memory holds one part.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.ipc

from easyanimate_jax.storage.stores import Place

MOST = 2**18  # rows of a part
ROWS = 4096  # of a group in memory before they are written, and of a table that is returned


class Sorter:
    """Takes tables of one schema, and returns their rows in order, as often as they are wanted.

    The files are in a folder in `beside` if it is local, else where the system keeps such files.
    Raises OSError, which names the folder, if there is no room.
    """

    def __init__(self, column: str, beside: Place):
        self.column, self.parts = column, {}  # parts of large groups
        where = beside if isinstance(beside, Path) else None
        self.folder = tempfile.TemporaryDirectory(prefix=".sorted-", dir=where)
        self.waiting: dict[Hashable, list[pyarrow.Table]] = defaultdict(list)
        self.writers: dict[Hashable, pyarrow.ipc.RecordBatchFileWriter] = {}

    def add(self, table: pyarrow.Table, groups: Sequence[Hashable]) -> None:
        """Add rows, each of a group; groups are sorted as Python sorts them."""
        rows = defaultdict(list)
        for row, group in enumerate(groups):
            rows[group].append(row)
        for group, some in rows.items():
            waiting = self.waiting[group]
            waiting.append(table.take(some))
            if sum(map(len, waiting)) >= ROWS:
                self._write(group)

    def tables(self) -> Iterator[pyarrow.Table]:
        """Yield all rows in order, in tables of at most ROWS rows of one chunk."""
        for group in [group for group, waiting in self.waiting.items() if waiting]:
            self._write(group)
        for writer in self.writers.values():
            try:
                writer.close()  # again is no error
            except OSError as error:
                raise self._named(error) from error
        for group in sorted(self.writers):
            with pyarrow.OSFile(os.fspath(self._path(group)), "rb") as file:
                yield from self._sorted(group, pyarrow.ipc.open_file(file))

    def _sorted(self, group: Hashable, file) -> Iterator[pyarrow.Table]:
        """Yield the rows of a group in order."""
        batches = range(file.num_record_batches)
        # `take` copies: a column of a batch would keep the whole batch in memory.
        columns = (file.get_batch(i)[self.column] for i in batches)
        names = pyarrow.chunked_array([column.take(np.arange(len(column))) for column in columns])
        if group not in self.parts and len(names) > MOST:
            order = pyarrow.compute.sort_indices(names).to_numpy()
            part = np.empty(len(order), np.int32)
            part[order] = np.arange(len(order)) // MOST
            parts, first = Sorter(self.column, Path(self.folder.name)), 0
            for i in batches:
                table = pyarrow.Table.from_batches([file.get_batch(i)])
                parts.add(table, part[first : first + len(table)].tolist())
                first += len(table)
            self.parts[group] = parts
        if group in self.parts:
            yield from self.parts[group].tables()
            return
        table = file.read_all().combine_chunks()
        order = pyarrow.compute.sort_indices(table[self.column])
        for first in range(0, len(order), ROWS):
            yield table.take(order.slice(first, ROWS)).combine_chunks()

    def _write(self, group: Hashable) -> None:
        table = pyarrow.concat_tables(self.waiting.pop(group)).combine_chunks()
        try:
            if group not in self.writers:
                path = os.fspath(self._path(group))
                self.writers[group] = pyarrow.ipc.new_file(path, table.schema)
            self.writers[group].write_table(table)
        except OSError as error:
            raise self._named(error) from error

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror or str(error), self.folder.name)

    def _path(self, group: Hashable) -> Path:
        names = {known: number for number, known in enumerate(self.writers)}
        return Path(self.folder.name) / str(names.get(group, len(names)))


def without_repeats(tables: Iterator[pyarrow.Table], column: str) -> Iterator[pyarrow.Table]:
    """Yield tables that are sorted by a column, without rows of equal values after the first."""
    last = None
    for table in tables:
        values = table[column].to_pylist()
        new = np.array([a != b for a, b in zip(values, [last, *values], strict=False)], bool)
        last = values[-1]
        if new.any():
            yield table.filter(new).combine_chunks()
