"""Read parquet tables with a column of files and a column of captions.

The files are paths, or they lie in the cells: as bytes, or as {bytes, path}. These are read in
place, see data/cells.py.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

import pyarrow
import pyarrow.parquet
from pyarrow import types

from easyanimate_jax.data.cells import check_group, empty_rows, leaf_of
from easyanimate_jax.data.media import Cell
from easyanimate_jax.data.paths import name_fault, open_regular
from easyanimate_jax.data.sources.layouts import (
    KNOWN,
    NAMES,
    TEXTS,
    check_columns,
    key_of,
    row_of,
)
from easyanimate_jax.data.sources.rows import Problem, Row
from easyanimate_jax.storage.errors import raise_if_of_the_system
from easyanimate_jax.storage.stores import Place


def rows(path: Place) -> Iterator[Row | Problem]:
    """Yield a row for each caption of each row of a table.

    Raises ValueError for an unreadable table, and for one without a column of files.
    """
    try:
        with open_regular(path) as handle, pyarrow.parquet.ParquetFile(handle) as file:
            have = {key_of(name): name for name in file.schema_arrow.names}
            column = _column_of_files(path, have, file.schema_arrow)
            number = 0
            for group in range(file.num_row_groups):
                for row, cell in _group(path, file, group, have, column):
                    for text in _captions(row):
                        if cell is None:
                            yield row_of(number, row | {"text": text})
                        else:
                            found = cell._replace(name=f"{path.stem}/{number:08d}{cell.name}")
                            yield Row(number, found.name, text, row.get("type"), found)
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise_if_of_the_system(error)
        raise ValueError(f"{path} is not a readable parquet table: {error}") from error


def _column_of_files(path: Place, have: dict[str, str], schema: pyarrow.Schema) -> str | None:
    """Return the column whose cells hold files; None if the files are paths.

    Cells with files come before paths. Raises ValueError if there is neither, or if one cannot say
    which of several columns is meant.
    """
    columns = [key_of(name) for name in schema.names]
    kinds = {key: schema.field(name).type for key, name in have.items()}
    holding = [key for key, kind in kinds.items() if leaf_of(key, kind)]
    named = [key for key in NAMES if key in holding]
    paths = [key for key in NAMES if key in have and key not in holding]
    for key in paths:
        if types.is_nested(kinds[key]):
            raise ValueError(
                f"{path}: column {have[key]} is of type {kinds[key]}; write paths, bytes, or "
                f"structs of bytes and path"
            )
    if not holding or (paths and not named):
        check_columns(path, columns)
        return None
    if not named and len(holding) > 1:
        raise ValueError(
            f"{path}: the columns {', '.join(holding)} hold bytes; name the one that holds the "
            f"films `video`, or the pictures `image`"
        )
    check_columns(path, columns, files=False)
    return have[(named or holding)[0]]


def _group(
    path: Place, file: pyarrow.parquet.ParquetFile, group: int, have: dict, column: str | None
) -> Iterator[tuple[dict, Cell | None]]:
    """Yield the known columns of each row of a group, and the cell of its file if it has one.

    The name of a cell is a slash and the name of its file, or empty.
    """
    kinds = {key: file.schema_arrow.field(name).type for key, name in have.items()}
    columns = [have[key] for key in kinds if key in KNOWN and not leaf_of(key, kinds[key])]
    leaf, inner, empty = None, False, set()
    if column is not None:
        kind = kinds[key_of(column)]
        leaf = leaf_of(column, kind)
        check_group(path, file.metadata, group, leaf)
        empty = empty_rows(path, leaf, group)
        inner = types.is_struct(kind) and kind.get_field_index("path") >= 0
    columns += [f"{column}.path"] if inner else []
    batches = file.iter_batches(row_groups=[group], columns=columns)
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        told = (row.pop(column) or {}).get("path") if inner else None
        row = {key_of(name): value for name, value in row.items()}
        if leaf is None:
            yield row, None
            continue
        told = told or next((row[key] for key in NAMES if row.get(key)), None)
        if number in empty:
            yield {k: v for k, v in row.items() if k not in NAMES} | {"path": told}, None
        else:
            name = PurePosixPath(told).name if isinstance(told, str) else ""
            yield row, Cell(path, leaf, group, number, "" if name_fault(name) else f"/{name}")


def _captions(row: dict) -> list:
    text = next((row[key] for key in TEXTS if row.get(key) is not None), None)
    return text if isinstance(text, list) and text else [text]
