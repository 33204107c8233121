"""Rows come in order whatever their number, as often as they are wanted."""

import numpy as np
import pyarrow
import pytest

from easyanimate_jax.prepare import sorter
from easyanimate_jax.prepare.sorter import Sorter, without_repeats


@pytest.mark.parametrize("most", [2**18, 50])
def test_rows_are_sorted_by_group_and_column_in_small_parts_too(tmp_path, monkeypatch, most):
    monkeypatch.setattr(sorter, "ROWS", 16)
    monkeypatch.setattr(sorter, "MOST", most)
    rng = np.random.default_rng(0)
    rows = [(int(rng.integers(4)), f"片{n:04}") for n in rng.permutation(700).tolist()]
    some = Sorter("name", tmp_path)
    for first in range(0, 700, 33):
        part = rows[first : first + 33]
        table = pyarrow.table({"name": [n for _, n in part], "group": [g for g, _ in part]})
        some.add(table, [(g, "x") for g, _ in part])
    for _ in range(2):
        found = [row for table in some.tables() for row in table.to_pylist()]
        assert [(row["group"], row["name"]) for row in found] == sorted(rows)
    assert all(len(table) <= 16 for table in some.tables())


def test_repeats_are_dropped_across_tables():
    values = [[1, 1, 2], [2], [2, 3], [3, 3]]
    tables = (pyarrow.table({"a": some, "b": list(range(len(some)))}) for some in values)
    found = [row for table in without_repeats(tables, "a") for row in table.to_pylist()]
    assert [row["a"] for row in found] == [1, 2, 3]
    assert [row["b"] for row in found] == [0, 2, 1]


def test_a_disk_without_room_names_the_folder(tmp_path):
    from disk import files_of_at_most

    some = Sorter("name", tmp_path)
    table = pyarrow.table({"name": [f"{i:0100}" for i in range(5000)]})
    with files_of_at_most(9_000), pytest.raises(OSError) as raised:
        some.add(table, [0] * 5000)
    assert str(tmp_path) in raised.value.filename
