# ruff: noqa: F811 (pytest finds fixtures by name)

import errno
import os
import threading

import pytest
from fake_stores import servers  # noqa: F401

from easyanimate_jax.storage import stores
from easyanimate_jax.storage.stores import Remote, place


@pytest.fixture(params=["local", "gs", "s3"])
def folder(request, servers, tmp_path):
    """An empty folder of each kind."""
    name = "".join(c for c in request.node.name if c.isalnum())
    return tmp_path if request.param == "local" else place(f"{request.param}://bucket/{name}")


@pytest.fixture
def gcs(servers):
    servers.counts.clear()
    yield servers
    servers.faults.clear()


def test_a_place_is_a_local_path_or_an_object(tmp_path, servers):
    assert place(tmp_path) == tmp_path
    assert place("gs://b/x//y/") == Remote("gs", "b", "x/y")
    assert str(place("S3://b/x") / "y/z.txt") == "s3://b/x/y/z.txt"
    there = place("gs://b/x/y.tar.gz")
    assert (there.name, there.stem, there.suffix) == ("y.tar.gz", "y.tar", ".gz")
    assert (
        str(there.parent) == "gs://b/x" and str(there.with_suffix(".json")) == "gs://b/x/y.tar.json"
    )
    assert place(str(there)) == there


@pytest.mark.parametrize("text", ["hf://b/x", "az://b/x", "http://h/x", "gs:///x", "s3://b/../c"])
def test_other_schemes_and_names_are_refused(text):
    with pytest.raises(ValueError, match=text.partition(":")[0]):
        place(text)


def test_a_library_of_local_files_refuses_a_remote(servers):
    with pytest.raises(TypeError):
        os.fspath(place("gs://bucket/x"))


def test_a_file_is_written_read_listed_and_deleted(folder):
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt"):
        stores.make_folder((folder / name).parent)
        stores.replace_text(folder / name, f"text of {name}")
    assert (folder / "sub/b.txt").read_text() == "text of sub/b.txt"
    assert stores.list_names(folder) == ["a.txt", "sub"]
    found = sorted(stores.list_files(folder))
    assert [f.name for f in found] == ["a.txt", "sub/b.txt", "sub/deep/c.txt"]
    assert found[0].size == len("text of a.txt") and found[0].changed > 1.7e9
    assert (folder / "sub").is_dir() and not (folder / "sub").is_file()
    assert (folder / "a.txt").is_file() and (folder / "a.txt").exists()
    stores.replace_text(folder / "a.txt", "other")
    assert (folder / "a.txt").read_text() == "other"
    (folder / "a.txt").unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "a.txt").unlink()
    (folder / "a.txt").unlink(missing_ok=True)
    stores.delete_folder(folder / "sub")
    assert stores.list_names(folder) == [] and not list(stores.list_files(folder))
    assert stores.list_names(folder / "none") == []


def test_of_many_creators_one_wins_and_its_content_stays(folder):
    won = []

    def run(i: int) -> None:
        if stores.create(folder / "commit", f"caller {i}".encode()):
            won.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (folder / "commit").read_text() == f"caller {won[0]}"
    assert stores.create(folder / "commit", f"caller {won[0]}".encode())
    assert not stores.create(folder / "commit", b"another")
    assert [f.name for f in stores.list_files(folder)] == ["commit"]


def test_a_creator_whose_answer_is_lost_knows_its_own_content(gcs):
    puts = []

    def cut(method: str, path: str) -> str | None:
        puts.extend([path] * (method == "PUT"))
        return "cut" if method == "PUT" and len(puts) == 1 else None

    gcs.faults.append(cut)
    assert stores.create(place("gs://bucket/lost"), b"mine")
    assert len(puts) == 2  # the first was done, and the second refused


def test_ranges_are_exact_and_near_ones_are_one_request(folder, servers):
    content = bytes(range(256)) * 2000
    stores.replace_bytes(folder / "x", content)
    ranges = [(0, 10), (20, 300), (400_000, 400_001), (511_990, 512_000), (5, 5)]
    before = servers.counts["get"]
    assert stores.read_ranges(folder / "x", ranges) == [content[a:b] for a, b in ranges]
    if isinstance(folder, Remote) and folder.scheme == "gs":
        assert servers.counts["get"] - before == 3
    assert stores.read_ranges(folder / "x", []) == []
    with pytest.raises(ValueError, match="ends before byte 512,001"):
        stores.read_ranges(folder / "x", [(511_990, 512_001)])
    with pytest.raises(FileNotFoundError):
        stores.read_ranges(folder / "none", [(0, 1)])


def test_a_large_file_goes_up_and_down_whole(folder, tmp_path):
    content = os.urandom(12_000_000)
    stores.replace(folder / "large", lambda new: new.write_bytes(content))
    if isinstance(folder, Remote):
        stores.download(folder / "large", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
        with (folder / "large").open() as file:
            file.seek(11_999_000)
            assert bytes(file.read(2000)) == content[11_999_000:]
    assert (folder / "large").read_bytes() == content


def test_a_writer_that_fails_leaves_what_was_there(folder):
    stores.replace_text(folder / "x", "before")

    def write(new) -> None:
        new.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        stores.replace(folder / "x", write)
    assert (folder / "x").read_text() == "before"
    assert [f.name for f in stores.list_files(folder)] == ["x"]


def test_a_listing_has_all_pages(gcs):
    for i in range(1205):
        stores.replace_bytes(place(f"gs://bucket/pages/{i % 2}/{i}"), b"")
    assert len(list(stores.list_files(place("gs://bucket/pages")))) == 1205
    assert stores.list_names(place("gs://bucket/pages")) == ["0", "1"]


def test_a_version_changes_with_the_content(folder):
    stores.replace_text(folder / "x", "one")
    if isinstance(folder, Remote):
        first = (folder / "x").version()
        stores.replace_text(folder / "x", "two")
        assert first.size == 3 and (folder / "x").version() != first
        assert (folder / "none").version() is None


def test_a_store_that_fails_is_named_and_says_nothing_about_the_file(gcs):
    from easyanimate_jax.storage.errors import is_of_the_system

    gcs.faults.append(lambda method, path: "503")
    with pytest.raises(OSError, match="did not answer") as caught:
        place("gs://bucket/x").read_bytes()
    assert caught.value.filename == "gs://bucket/x"
    assert is_of_the_system(caught.value)
    gcs.faults.clear()
    with pytest.raises(FileNotFoundError) as caught:
        place("gs://bucket/never").read_bytes()
    assert caught.value.errno == errno.ENOENT and caught.value.filename == "gs://bucket/never"


def test_a_store_that_fails_once_is_asked_again(gcs):
    stores.replace_text(place("gs://bucket/again"), "text")
    failed = []
    gcs.faults.append(lambda m, path: "503" if not failed and not failed.append(path) else None)
    assert place("gs://bucket/again").read_text() == "text" and failed


def test_tensorstore_writes_where_kvstore_says(folder):
    import tensorstore

    spec = {"driver": "zarr", "kvstore": stores.kvstore(folder / "array")}
    array = tensorstore.open(spec, create=True, dtype=tensorstore.int32, shape=[4]).result()
    array[...] = 7
    assert stores.list_names(folder / "array") == [".zarray", "0"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.ENOTSUP])
def test_a_disk_without_links_creates_files_all_the_same(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    assert stores.create(tmp_path / "x", b"one") and stores.create(tmp_path / "x", b"one")
    assert not stores.create(tmp_path / "x", b"other")
    assert (tmp_path / "x").read_bytes() == b"one" and os.listdir(tmp_path) == ["x"]
