"""Records of films are found again, in few files, by any process and after a kill."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_stores import servers  # noqa: F401

from easyanimate_jax.data.contents import key
from easyanimate_jax.prepare import film_store
from easyanimate_jax.prepare.film_store import FilmStore, slot_of
from easyanimate_jax.storage.stores import list_names, place


@pytest.mark.parametrize("where", ["file", "gs://bucket/films", "s3://bucket/films"])
def test_a_newer_record_counts_for_all_who_read_later(where, tmp_path, servers):  # noqa: F811
    folder = tmp_path if where == "file" else place(where)
    store, other = FilmStore(folder), FilmStore(folder)
    assert store.read("a/bc", "f") is None
    store.write("a/bc", "f", {"key": "1", "rows": []})
    assert store.read("a/bc", "f") == {"key": "1", "rows": []}
    assert FilmStore(folder).read("a/bc", "f") is None  # it is in memory only
    store.flush()
    assert other.read("a/bc", "f")["key"] == "1"
    other.write("a/bc", "f", {"key": "2", "rows": [{"clip": "f\u2028", "x": float("nan")}]})
    other.flush()
    assert FilmStore(folder).read("a/bc", "f")["rows"][0]["clip"] == "f\u2028"
    assert FilmStore(folder).read("a/bc", "g") is None
    names = [name.partition("-")[0] for name in list_names(folder / "a/bc")]
    assert names == ["000001", "000002"]


def test_many_films_are_few_files_and_none_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(film_store, "FILMS", 50)
    store, names = FilmStore(tmp_path), [f"{i}.mp4" for i in range(1000)]
    slots = {name: slot_of(name)[:1] + "/00" for name in names}  # 16 of them
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.write(slots[name], key(name), {"key": name}), names))
    store.flush()
    later = FilmStore(tmp_path)
    assert all(later.read(slots[name], key(name)) == {"key": name} for name in names)
    assert len(later.slots) == film_store.SLOTS
    files = list(tmp_path.rglob("*.jsonl"))
    assert 20 <= len(files) <= 32 and all(len(f.read_text().splitlines()) <= 50 for f in files)


def test_what_is_finished_is_in_a_file_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(film_store, "SECONDS", -1.0)
    FilmStore(tmp_path).write("a/bc", "f", {"key": "1"})
    assert FilmStore(tmp_path).read("a/bc", "f") == {"key": "1"}


def test_a_store_that_was_sent_reads_no_file(tmp_path):
    store = FilmStore(tmp_path, {"f": {"key": "1"}})
    (tmp_path / "a" / "bc").mkdir(parents=True)
    (tmp_path / "a" / "bc" / "000001-0.jsonl").write_text(json.dumps({"film": "g", "key": "2"}))
    assert store.read("a/bc", "f") == {"key": "1"} and store.read("a/bc", "g") is None
    store.write("a/bc", "g", pickle.loads(pickle.dumps({"key": "3"})))
    store.flush()
    assert store.read("a/bc", "g") == {"key": "3"}
    assert FilmStore(tmp_path).read("a/bc", "g") == {"key": "3"}
