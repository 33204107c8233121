"""Shards are written whole, read by id, and never silently short."""

import errno
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from disk import files_of_at_most

from easyanimate_jax.commands.parse import NO_ROOM
from easyanimate_jax.data import records
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet, Records, Writer


def row(i):
    sizes = dict.fromkeys(records.INDEX_TYPES, i)
    return sizes | {"clip": f"剪辑{i}.mp4", "kind": "video"}


def record(i):
    return {"mean": np.full((3, 4), i, np.float16), "text0": np.arange(i + 1)}


@pytest.fixture
def folder(tmp_path):
    writer = Writer(tmp_path / "set", {"vae": "abc"})
    writer.write(0, [record(0), record(1)], [row(0), row(1)])
    writer.write(1, [], [])  # every clip of it was unreadable
    writer.write(2, [record(2)], [row(2)])
    writer.finish(3)
    return tmp_path / "set"


def test_records_read_back_by_id_beside_their_index_rows(folder):
    read = Records(folder)
    assert len(read) == 3 and read.header["vae"] == "abc" and read.header["shards"] == [2, 0, 1]
    for i in (2, 0, 1):
        np.testing.assert_array_equal(read[i]["mean"], record(i)["mean"])
        np.testing.assert_array_equal(read[i]["text0"], record(i)["text0"])
        assert read.index["clip"][i] == f"剪辑{i}.mp4" and read.index["tokens"][i] == i


def test_writing_resumes_and_refuses_another_origin(folder):
    again = Writer(folder, {"vae": "abc"})
    assert again.has(0) and again.has(2) and not again.has(3)
    with pytest.raises(ValueError, match="another vae"):
        Writer(folder, {"vae": "other"})


def test_an_unfinished_set_is_refused(tmp_path):
    Writer(tmp_path / "set", {}).write(0, [record(0)], [row(0)])
    with pytest.raises(ValueError, match="no finished set"):
        Records(tmp_path / "set")


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_shard_is_named_when_the_set_is_opened(folder, damage):
    shard = folder / "shard-00002.arrayrecord"
    data = shard.read_bytes()
    shard.unlink() if damage == "gone" else shard.write_bytes(
        data[: {"cut": -1, "empty": 0}[damage]]
    )
    with pytest.raises(ValueError, match=r"shard-00002.*damaged"):
        Records(folder)


def test_few_shards_are_open_at_once_and_all_read(tmp_path, monkeypatch):
    writer = Writer(tmp_path / "set", {})
    for i in range(9):
        writer.write(i, [record(i)], [row(i)])
    writer.finish(9)
    monkeypatch.setattr(records, "READERS", 2)
    monkeypatch.setattr(records, "LOOKED_INTO", 0)
    read = Records(tmp_path / "set")
    assert not read.readers  # nothing is opened before it is needed
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: read[i]["mean"][0, 0], [*range(9)] * 5))
    assert found == [*range(9)] * 5 and len(read.readers) <= 2


def test_a_process_without_free_files_is_told_so(folder):
    """Not that a shard is damaged, which would have it removed."""
    read = Records(folder)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path("/dev/null").open() as file:
        free = file.fileno()  # the lowest number, which the next file gets
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        with pytest.raises(OSError, match=r"no more files; raise `ulimit -n`"):
            read[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(read[0]["text0"]) == 1


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.ENOMEM, errno.ENFILE])
def test_a_shard_that_does_not_open_now_is_not_called_damaged(folder, monkeypatch, code):
    read = Records(folder)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(OSError) as error:
            read[0]
    assert error.value.errno == code and len(read[0]["text0"]) == 1


def test_a_flipped_bit_is_named_when_the_record_is_read(tmp_path):
    writer = Writer(tmp_path, {})
    noise = np.random.default_rng(0).integers(0, 255, 50_000, np.uint8)
    writer.write(0, [{"x": noise}], [row(0)])
    writer.finish(1)
    path = tmp_path / "shard-00000.arrayrecord"
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00000.*record 0"):
        Records(tmp_path)[0]


def test_texts_read_back_as_float32(tmp_path):
    texts = (np.ones((2, 3, 4), np.float16), np.zeros((2, 5, 6), np.float16))
    records.write_texts(tmp_path / "empty.safetensors", texts)
    for a, b in zip(records.read_texts(tmp_path / "empty.safetensors"), texts, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="prepare"):
        records.read_texts(tmp_path / "prompts.safetensors")


def test_a_set_knows_two_kinds():
    with pytest.raises(ValueError, match="sound"):
        LatentSet("s", Budget(48, (48,), (64,)), kinds=("sound",))


def test_shards_from_before_there_were_mixtures_still_join(folder):
    for path in folder.glob("shard-*.npz"):
        with np.load(path) as columns:
            old = {name: columns[name] for name in columns if name != "source"}
        np.savez(path, **old)
    Writer(folder, {"vae": "abc"}).finish(3)
    assert Records(folder).index["source"].tolist() == ["", "", ""]


NOISE = np.random.default_rng(0).integers(0, 255, 50_000, np.uint8)
LONG = [row(i) | {"clip": f"{i:0300}"} for i in range(40)]  # a large index of small records


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: Writer(folder, {}).write(0, [{"x": NOISE}], [row(0)]),
        lambda folder: Writer(folder, {}).write(0, [{"x": NOISE[:9]}] * 40, LONG),
        lambda folder: Writer(folder, {"a": "b" * 20_000}),
        lambda folder: records.write_texts(folder / "empty.safetensors", (NOISE[None, None] / 2,)),
    ],
    ids=["records", "index", "identity", "texts"],
)
def test_a_full_disk_is_said_and_leaves_no_file_half_written(tmp_path, write):
    with files_of_at_most(9_000), pytest.raises(OSError) as raised:
        write(tmp_path)
    assert raised.value.errno in NO_ROOM
    whole = {"identity.json", "shard-00000.npz"}  # an index without its shard does not count
    assert {path.name for path in tmp_path.iterdir()} <= whole
    write(tmp_path)  # the same again, with room
