"""Shards are written whole, read by id, and never silently short."""

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from disk import files_of_at_most

from easyanimate_jax.commands.parse import NO_ROOM
from easyanimate_jax.data import index, records
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.index import INDEX_TYPES
from easyanimate_jax.data.names import file_hashes
from easyanimate_jax.data.records import LatentSet, Records, write_set
from easyanimate_jax.storage import stores


def row(i):
    sizes = dict.fromkeys(INDEX_TYPES, i)
    return sizes | {"clip": f"剪辑{i}.mp4", "kind": "video", "num_captions": i + 1}


def record(i):
    texts = np.arange(4 * (i + 1), dtype=np.float16).reshape(i + 1, 2, 2)
    return {"mean": np.full((3, 4), i, np.float16), "text0": texts}


@pytest.fixture
def folder(tmp_path):
    records = [record(i) for i in range(3)], [row(i) for i in range(3)]
    write_set(tmp_path / "set", {"vae": "abc"}, *records, shard_size=2)
    return tmp_path / "set"


def shards(folder):
    return sorted(folder.rglob("*.shard"))


def test_records_read_back_by_id_beside_their_index_rows(folder):
    read = Records(folder)
    assert len(read) == 3 and read.header["vae"] == "abc" and len(shards(folder)) == 2
    for i in (2, 0, 1):
        np.testing.assert_array_equal(read[i]["mean"], record(i)["mean"])
        np.testing.assert_array_equal(read[i]["text0"], record(i)["text0"])
        assert read.index["clip"][i] == f"剪辑{i}.mp4" and read.index["tokens"][i] == i
    with pytest.raises(IndexError):
        read[3]


def test_all_arrays_of_a_record_come_back_whatever_their_entries(tmp_path):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float16)

    whole = {"mean": draw(6, 64), "worse_mean": draw(6, 64), "condition_flag": draw(3)}
    whole |= {"condition_mask": draw(3, 6, 4), "worse_condition_mean": draw(3, 6, 64)}
    whole |= {"control_mean": draw(2, 6, 64), "reference_mean": draw(2, 64)}
    whole |= {"text0": draw(2, 5, 8), "text1": draw(2, 3, 4)}
    whole["text0"][0, 2:] = whole["text0"][0, 2]  # as padding that an encoder masks
    whole["text0"][1] = 0
    words = json.dumps(["a b", "片"], ensure_ascii=False).encode()
    whole["captions"] = np.frombuffer(words, np.uint8)
    rows = [row(i) | {"num_captions": 2} for i in range(4)]
    write_set(tmp_path / "set", {}, [whole] * 4, rows, shard_size=3)
    read = Records(tmp_path / "set")
    slots = ["latents", "condition 0", "condition 1", "condition 2", "control 0", "control 1"]
    assert read.header["slots"] == [*slots, "reference"]
    assert read[3].keys() == whole.keys()
    for name, array in whole.items():
        assert read[3][name].dtype == array.dtype
        np.testing.assert_array_equal(read[3][name], array)
    cells = read.cells(1)
    assert cells("text 0")["text0"].shape == (3, 8) and cells("text 1")["text0"].shape == (1, 8)
    assert cells.count("condition") == 3 and cells.count("control") == 2


def test_of_a_record_only_what_is_asked_for_is_read(folder, monkeypatch):
    reads = []
    monkeypatch.setattr(
        records, "read_entry", lambda place, spot: reads.append(spot) or {"a": NOISE}
    )
    cells = Records(folder).cells(2)
    assert not reads
    cells("text 1"), cells("text 1")
    assert len(reads) == 1 and "texts" in reads[0].file


def test_an_unfinished_set_is_refused(folder):
    (folder / "header.json").unlink()
    with pytest.raises(ValueError, match="no finished set"):
        Records(folder)


def test_a_set_of_an_earlier_version_is_refused_by_name(folder):
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps(header | {"version": 1}))
    with pytest.raises(ValueError, match=r"version 1.*prepare the set again in another folder"):
        Records(folder)


def test_an_index_of_other_content_than_the_header_is_refused(folder):
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps(header | {"content": "other"}))
    with pytest.raises(ValueError, match=r"index\.parquet is not the index of header\.json"):
        Records(folder)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_shard_is_named_when_the_set_is_opened(folder, damage):
    shard = shards(folder)[1]
    data = shard.read_bytes()
    shard.unlink() if damage == "gone" else shard.write_bytes(
        data[: {"cut": -1, "empty": 0}[damage]]
    )
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        Records(folder)


def test_a_damaged_index_is_named(folder):
    data = (folder / "index.parquet").read_bytes()
    for wrong in (data[:-1], b"", b"<html>" * 100):
        (folder / "index.parquet").write_bytes(wrong)
        with pytest.raises(ValueError, match=r"index\.parquet is damaged"):
            Records(folder)


def test_a_large_index_is_mapped_and_reads_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "GROUP", 2)  # so it is converted in two parts
    write_set(folder, {"vae": "abc"}, [record(i) for i in range(3)], [row(i) for i in range(3)])
    small = Records(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "MAPPED", 2)
    large, again = Records(folder), Records(folder)
    assert len(list((tmp_path / "cache").rglob("index.json"))) == 1
    np.testing.assert_array_equal(large.index["held"], file_hashes(small.index["clip"]))
    assert large.index["clip"].tolist() == small.index["clip"].tolist()
    for name in INDEX_TYPES:
        np.testing.assert_array_equal(large.index[name], small.index[name])
        np.testing.assert_array_equal(again.index[name], small.index[name])
    for i in range(3):
        assert isinstance(large.index["tokens"], np.memmap)
        np.testing.assert_array_equal(large[i]["text0"], small[i]["text0"])


def test_names_are_chosen_by_number_mask_slice_and_text(folder):
    names = Records(folder).index["clip"]
    assert names[1] == "剪辑1.mp4" and names[np.int64(2)] == "剪辑2.mp4"
    assert names[1:].tolist() == names[np.array([1, 2])].tolist() == ["剪辑1.mp4", "剪辑2.mp4"]
    assert names[np.array([True, False, False])].tolist() == ["剪辑0.mp4"]
    np.testing.assert_array_equal(names == "剪辑1.mp4", [False, True, False])
    np.testing.assert_array_equal(Records(folder).index["kind"] == "video", [True] * 3)


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
        patch.setattr(stores.os, "open", fail)
        with pytest.raises(OSError) as error:
            read[0]
    assert error.value.errno == code and len(read[0]["text0"]) == 1


def test_a_flipped_bit_is_named_when_the_record_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, 50_000, np.uint8)
    write_set(tmp_path / "set", {}, [{"x": noise}], [row(0) | {"num_captions": 0}])
    (path,) = shards(tmp_path / "set")
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path.name} is damaged.*byte 0"):
        Records(tmp_path / "set")[0]


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


NOISE = np.random.default_rng(0).integers(0, 255, 50_000, np.uint8)
NOISES = np.random.default_rng(0).integers(97, 122, (400, 60), np.uint8)  # a large index


@pytest.mark.parametrize(
    "write",
    [
        lambda f: write_set(f, {}, [{"x": NOISE}], [row(0) | {"num_captions": 0}]),
        lambda f: write_set(f, {}, [{"x": NOISE[:9]}] * 400, LONG, shard_size=50),
        lambda f: write_set(f, {"a": "b" * 20_000}, [record(0)], [row(0)]),
        lambda f: records.write_texts(f / "empty.safetensors", (NOISE[None, None] / 2,)),
    ],
    ids=["records", "index", "header", "texts"],
)
def test_a_full_disk_is_said_and_leaves_no_file_half_written(tmp_path, write):
    folder = tmp_path / "set"
    folder.mkdir()
    with files_of_at_most(9_000), pytest.raises(OSError) as raised:
        write(folder)
    assert raised.value.errno in NO_ROOM
    assert not list(tmp_path.rglob("*.new")) and not (folder / "header.json").exists()
    write(folder)  # the same again, with room


LONG = [row(i) | {"clip": bytes(n).decode(), "num_captions": 0} for i, n in enumerate(NOISES)]
