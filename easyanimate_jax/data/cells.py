"""Read files that lie in the cells of parquet tables, as Hugging Face `datasets` writes them.

A cell holds the bytes of a file, or {bytes, path}. Parquet decodes a whole group of rows at once,
so the last small groups are kept for the rows beside a row that was read.
"""

import functools
import os

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from pyarrow import types

from easyanimate_jax.data.paths import open_regular
from easyanimate_jax.storage.errors import raise_if_of_the_system
from easyanimate_jax.storage.stores import Place, Remote

MOST_BYTES = 2**30  # of the files in one group of rows, which are in memory together
KEPT_BYTES = 2**26  # larger groups are decoded again for every cell


def leaf_of(column: str, kind: pyarrow.DataType) -> str | None:
    """Return the name of the values that hold bytes: `video` or `video.bytes`; None without any."""
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column, kind = f"{column}.bytes", kind.field("bytes").type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    some = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary
    return column if any(test(kind) for test in some) else None


def check_group(
    table: Place, metadata: pyarrow.parquet.FileMetaData, group: int, leaf: str
) -> None:
    """Raise ValueError if the files in a group of rows are too large to be in memory together."""
    size = chunk_of(metadata, group, leaf).total_uncompressed_size
    if size > MOST_BYTES:
        raise ValueError(
            f"{table}: row group {group} holds {size:,} bytes of files, which are read together; "
            f"write at most {MOST_BYTES:,} (a smaller row_group_size)"
        )


def chunk_of(metadata: pyarrow.parquet.FileMetaData, group: int, leaf: str):
    """Return what the table says about the values of a group of rows. Raises ValueError."""
    for number in range(metadata.num_columns):
        chunk = metadata.row_group(group).column(number)
        if chunk.path_in_schema == leaf:
            return chunk
    raise ValueError(f"there is no column {leaf}")


def empty_rows(table: Place, leaf: str, group: int) -> set[int]:
    """Return the rows of a group that hold no bytes; they are decoded only if there may be some."""
    with open_regular(table) as handle, pyarrow.parquet.ParquetFile(handle) as file:
        told = chunk_of(file.metadata, group, leaf).statistics
    if told is not None and told.has_null_count and told.null_count == 0:
        return set()
    empty = pyarrow.compute.is_null(_group(table, leaf, group)).to_pylist()
    return {row for row, missing in enumerate(empty) if missing}


def read_cell(table: Place, leaf: str, group: int, row: int) -> bytes:
    """Return the bytes in row `row` of a group of rows. Raises ValueError if there are none."""
    try:
        values = _kept(table, leaf, group, _state(table))
        if values is None:
            values = _group(table, leaf, group)
        content = values[row].as_py()
    except (OSError, IndexError, ValueError, pyarrow.ArrowException) as error:
        raise_if_of_the_system(error)
        raise ValueError(f"{table}: row {row} of group {group} does not read: {error}") from error
    if content is None:
        raise ValueError(f"{table}: row {row} of group {group} is empty; the table was changed")
    return content


def _state(table: Place) -> tuple:
    """Return values that change when the table does."""
    if isinstance(table, Remote):
        return (table.stamp(),)
    with open_regular(table) as file:
        found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _kept(table: Place, leaf: str, group: int, _: tuple) -> pyarrow.ChunkedArray | None:
    """Return the values of a group of rows, or None if they are too large to be kept."""
    with open_regular(table) as handle, pyarrow.parquet.ParquetFile(handle) as file:
        size = chunk_of(file.metadata, group, leaf).total_uncompressed_size
        return _values(table, file, leaf, group) if size <= KEPT_BYTES else None


def _group(table: Place, leaf: str, group: int) -> pyarrow.ChunkedArray:
    with open_regular(table) as handle, pyarrow.parquet.ParquetFile(handle) as file:
        return _values(table, file, leaf, group)


def _values(
    table: Place, file: pyarrow.parquet.ParquetFile, leaf: str, group: int
) -> pyarrow.ChunkedArray:
    check_group(table, file.metadata, group, leaf)
    column = file.read_row_group(group, columns=[leaf], use_threads=False).column(0)
    return pyarrow.compute.struct_field(column, "bytes") if types.is_struct(column.type) else column
