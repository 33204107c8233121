"""The key of content: the same bytes are the same thing, whatever their name and date."""

import os
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from easyanimate_jax.data import contents
from easyanimate_jax.data.contents import Contents, key
from easyanimate_jax.data.media import Cell, Content, Member


@pytest.fixture
def reads(monkeypatch):
    """The files that were opened and hashed, by name."""
    seen, digest = [], contents.hashlib.blake2b

    def note(*args, **more):
        seen.append(1)
        return digest(*args, **more)

    monkeypatch.setattr(contents.hashlib, "blake2b", note)
    return seen


def test_a_file_is_hashed_once_also_by_another_process(tmp_path, reads):
    (tmp_path / "a").write_bytes(b"one")
    one, other = Contents(tmp_path / "cache"), Contents(tmp_path / "cache")
    found = one(tmp_path / "a")
    assert [one(tmp_path / "a"), other(tmp_path / "a")] == [found] * 2
    assert Contents(tmp_path / "cache")(tmp_path / "a") == found and len(reads) == 1


def test_bytes_count_and_neither_name_nor_date(tmp_path):
    hashed = Contents(tmp_path / "cache")
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (1e9, 1e9))
    assert hashed(tmp_path / "a") == hashed(tmp_path / "b") != hashed(tmp_path / "c")
    before = hashed(tmp_path / "a")
    os.utime(tmp_path / "a", (2e9, 2e9))
    assert hashed(tmp_path / "a") == before
    (tmp_path / "a").write_bytes(b"two")
    os.utime(tmp_path / "a", (2e9, 2e9))
    assert hashed(tmp_path / "a") == hashed(tmp_path / "c")
    os.replace(tmp_path / "b", tmp_path / "a")
    assert hashed(tmp_path / "a") == before


def test_a_member_of_an_archive_is_its_own_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 9)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / "a", "a")
        tar.add(tmp_path / "b", "b")
    with tarfile.open(tmp_path / "t.tar") as tar:
        places = [(member.offset_data, member.size, member.name) for member in tar]
    found = [Member(tmp_path / "t.tar", *place) for place in places]
    hashed = Contents(tmp_path / "cache")
    assert [hashed(m) for m in found] == [hashed(tmp_path / "a"), hashed(tmp_path / "b")]
    assert hashed(Content(b"a" * 9, "x")) == hashed(tmp_path / "a")


def test_a_cell_of_a_table_is_its_own_bytes_and_is_hashed_once(tmp_path, reads):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 9)
    table = pyarrow.table({"image": [b"a" * 9, b"b" * 9]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    cells = [Cell(tmp_path / "t.parquet", "image", 0, row, "") for row in range(2)]
    hashed = Contents(tmp_path / "cache")
    found = [hashed(cell) for cell in cells]
    assert [hashed(cell) for cell in cells] == found and len(reads) == 2
    assert found == [hashed(tmp_path / "a"), hashed(tmp_path / "b")]


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_cannot_be_read_has_a_key_until_it_can(tmp_path, kind):
    path, hashed = tmp_path / "a", Contents(tmp_path / "cache")
    if kind != "missing":
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    before = hashed(path)
    assert before == hashed(path) and before.startswith("unreadable: ")
    if kind != "missing":
        path.rmdir() if kind == "folder" else path.unlink()
    path.write_text("good")
    assert hashed(path) not in (before, hashed(Path(tmp_path / "cache")))


def test_a_line_that_is_cut_or_mixed_costs_a_hash_and_no_more(tmp_path):
    (tmp_path / "a").write_text("a")
    found = Contents(tmp_path / "cache")(tmp_path / "a")
    whole = (tmp_path / "cache").read_bytes()
    for line in (b"{mixed\n", b'["a", 1]\n', b"3\n", whole[:-9]):
        (tmp_path / "cache").write_bytes(line)
        assert Contents(tmp_path / "cache")(tmp_path / "a") == found


def test_a_key_tells_values_and_their_order_apart():
    assert key("a", ["b"]) == key("a", ("b",)) and len(key()) == 32
    assert len({key("a", "b"), key("b", "a"), key("ab"), key(["a", "b"]), key("a", None)}) == 5
