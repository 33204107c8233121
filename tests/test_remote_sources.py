"""Clips in `gs://` and `s3://` are those of a local folder, and cost few requests."""
# ruff: noqa: F811 (pytest finds fixtures by name)

import csv
import dataclasses
import errno
import io
import json
import shutil
import tarfile
import types
from pathlib import Path

import av
import flax.nnx as nnx
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fake_stores import servers, upload  # noqa: F401
from fakes import TINY_VAE
from test_sources import CLIP, write_clips

from easyanimate_jax.commands.sources import main as sources
from easyanimate_jax.data import media, paths
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.contents import Contents
from easyanimate_jax.data.control import read_camera
from easyanimate_jax.data.decode import Decoders, decoders
from easyanimate_jax.data.media import Member
from easyanimate_jax.data.records import LatentSet, Records
from easyanimate_jax.data.sources import places, read
from easyanimate_jax.generation.inputs import read_inputs, read_mask
from easyanimate_jax.generation.request import SampleRequest, check
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.prepare.prepare import prepare
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.errors import of_store
from easyanimate_jax.storage.stores import Remote, place
from easyanimate_jax.training.safety.exits import BAD_INPUT, DONE, STORAGE

POSE = "0 0.5 0.5 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n"
NAMES = ["a.mp4", "deep/b.png", "deep/c.gif", "none.mp4"]


@pytest.fixture
def gcs(servers):
    servers.counts.clear()
    servers.reads.clear()
    servers.sent = 0
    yield servers
    servers.faults.clear()


@pytest.fixture(scope="module")
def clips(servers, tmp_path_factory):
    """Every layout over the same files, local and in both stores."""
    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    films = root / "films"
    (films / "deep").mkdir(parents=True)
    frames = rng.integers(0, 255, (9, 4, 6, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    media.write_video(films / "a.mp4", frames)
    media.write_png(films / "deep/b.png", rng.integers(0, 255, (32, 48, 3), np.uint8))
    media.write_gif(films / "deep/c.gif", frames)
    side = root / "side"
    shutil.copytree(films, side)
    for name in NAMES[:2]:
        (side / name).with_suffix(".txt").write_text(f"text of {name}", "utf-16")
    (side / "notes.md").write_text("no clip")
    shutil.copy(films / "a.mp4", films / "control.mp4")
    (films / "poses.txt").write_text("title\n" + POSE * 9)
    rows = [{"video": name, "caption": f"text of {name}"} for name in NAMES]
    rows[0] |= {"control_file_path": "control.mp4", "worse_file_path": "control.mp4"}
    rows[1] |= {"control_file_path": "poses.txt"}
    rows += [{"video": "../side/a.mp4", "caption": "outside"}]
    (films / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(films, root / "json")
    (root / "json/metadata.json").write_text(json.dumps(rows))
    with open(films / "t.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0] | rows[1])
        table.writeheader()
        table.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), films / "t.parquet")
    (root / "lists").mkdir()
    shutil.copy(films / "a.mp4", root / "lists")
    (root / "lists/videos.txt").write_text("a.mp4\nnone.mp4\n")
    (root / "lists/prompt.txt").write_text("one\ntwo\n")
    contents = [(films / name).read_bytes() for name in NAMES[:3]]
    cells = {"video": contents, "caption": ["one", "two", "three"]}
    (root / "cells").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(cells), root / "cells/c.parquet")
    (root / "tars").mkdir()
    with tarfile.open(root / "tars/t.tar", "w") as tar:
        for i, name in enumerate(NAMES[:3]):
            tar.add(films / name, f"{i}{Path(name).suffix}")
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"one"))
    (root / "table").mkdir()
    write_clips(root / "table", CLIP, CLIP | {"clip": "b", "first": 0}, root=b"../films")
    (root / "mix.toml").write_text('one = "films/t.csv"\ntwo = "tars/t.tar"\n')
    return root, *upload(root, "gs://bucket/clips", "s3://bucket/clips")


LAYOUTS = ["side", "json", "films/t.jsonl", "films/t.csv", "films/t.parquet", "lists", "cells"]
LAYOUTS += ["cells/c.parquet", "tars", "tars/t.tar", "table/clips.parquet", "mix.toml"]


def seen(source):
    """What training sees: everything of the clips but the place, and every frame."""
    clips, problems = read.read_clips(source)
    found = []
    for clip in clips:
        span = clip.first, clip.num_frames, 1, None
        still = clip.kind == "image"
        args = (clip.path, None) if still else (clip.path, *span)
        frames = (decoders().read_still if still else decoders().read_clip)(*args)
        where = {"control": None, "worse": None, "path": Path()}
        beside = [file and file.name for file in (clip.control, clip.worse)]
        found.append((dataclasses.replace(clip, **where), beside, frames.tobytes()))
    return found, [(p.row, p.file) for p in problems]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_holds_the_same_clips_in_a_store(clips, layout):
    local, gs, s3 = (seen(root / layout) for root in clips)
    assert local == gs == s3 and len(local[0]) >= 1
    assert bool(local[1]) == (layout not in ("cells", "cells/c.parquet", "tars", "tars/t.tar")) - (
        layout == "table/clips.parquet"
    )


def test_a_folder_is_listed_once_and_no_object_is_asked_for(clips, gcs):
    found, _ = read.read_clips(clips[1] / "side")
    hashed = Contents(Path("unused"))
    assert len({hashed(clip.path) for clip in found}) == 2
    # Is it a folder; which of five descriptions has it; its files.
    assert (gcs.counts["list"], gcs.counts["head"]) == (2, 5)
    assert {name.rpartition("/")[2] for name in gcs.reads} == {"a.mp4", "a.txt", "b.png", "b.txt"}
    assert set(gcs.reads.values()) == {1}


def test_a_table_costs_a_request_for_each_film(clips, gcs):
    found, _ = read.read_clips(clips[1] / "films/t.csv")
    # Is it a folder; the table, three films, a worse one and a missing one.
    assert gcs.counts == {"list": 1, "get": 6}
    hashed = Contents(Path("unused"))
    assert [hashed(clip.path) for clip in found] == [hashed(clip.path) for clip in found]
    assert gcs.counts["head"] == len(found)


def test_control_and_camera_files_lie_beside_their_table(clips):
    for root in clips[1:]:
        a, b, *_ = read.read_clips(root / "films/t.jsonl")[0]
        assert a.control == a.worse == root / "films/control.mp4"
        local = read_camera(clips[0] / "films/poses.txt")
        np.testing.assert_array_equal(read_camera(b.control).poses, local.poses)


def long_film(path: Path) -> None:
    """Write 60 s of 1080p at 4 Mbit/s with its index at the end: two seconds, thirty times."""
    base = np.random.default_rng(0).integers(0, 255, (135, 240, 3), np.uint8)
    with av.open(str(path), "w", format="mp4") as out:
        options = {"preset": "ultrafast", "g": "16", "bf": "0", "b": "4000000"}
        stream = out.add_stream("libx264", rate=8, options=options)
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        packets = []
        for i in range(16):
            pixels = np.roll(base, i, 1).repeat(8, 0).repeat(8, 1)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            packets += stream.encode(frame)
        for number in range(30):
            for packet in [*packets, *(stream.encode() if not number else ())]:
                again = av.Packet(bytes(packet))
                again.stream, again.time_base = stream, packet.time_base
                again.pts, again.dts = packet.pts + 16 * number, packet.dts + 16 * number
                again.is_keyframe = packet.is_keyframe
                out.mux(again)


def test_a_clip_of_a_long_film_is_a_few_requests_and_not_the_film(gcs, tmp_path):
    long_film(tmp_path / "long.mp4")
    size = (tmp_path / "long.mp4").stat().st_size
    (film,) = upload(tmp_path / "long.mp4", "gs://bucket/long.mp4")
    assert media.probe(film) == media.probe(tmp_path / "long.mp4") and size > 10_000_000
    assert gcs.counts["get"] <= 3 and gcs.sent < size / 10  # its head, its index, a first frame
    gcs.counts.clear()
    gcs.sent = 0
    ours = decoders().read_at(film, 50.0, 49, (64, 96))
    assert gcs.counts["get"] <= 8 and gcs.counts["head"] == 0 and gcs.sent < size / 5
    local = decoders().read_at(tmp_path / "long.mp4", 50.0, 49, (64, 96))
    np.testing.assert_array_equal(ours, local)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_an_overwritten_object_gets_another_key_and_no_other_does(clips, servers, scheme):
    films = place(f"{scheme}://bucket/keys")
    for name in ("a", "b", "t.tar"):
        stores.replace_bytes(films / name, name.encode() * 9)
    files = [films / "a", films / "b", *(Member(films / "t.tar", n, 9, "x") for n in (0, 9))]
    before = [Contents(Path("unused"))(file) for file in files]
    assert before == [Contents(Path("unused"))(file) for file in files]
    assert len(set(before)) == 4
    stores.replace_bytes(films / "a", b"Z" * 9)
    stores.replace_bytes(films / "t.tar", b"Z" * 45)
    after = [Contents(Path("unused"))(file) for file in files]
    assert [x == y for x, y in zip(before, after, strict=True)] == [False, True, False, False]
    listed = {found.name: found for found in stores.list_files(films)}
    found = listed["a"]
    known = dataclasses.replace(films / "a", listed=stores.Version(found.size, found.tag))
    assert Contents(Path("unused"))(known) == after[0]
    assert Contents(Path("unused"))(films / "none").startswith("unreadable: ")


def test_a_copy_of_an_object_keeps_its_key_where_the_store_hashes_it(servers):
    for name in ("one", "two"):
        stores.replace_bytes(place(f"s3://bucket/copies/{name}"), b"same")
    hashed = Contents(Path("unused"))
    assert hashed(place("s3://bucket/copies/one")) == hashed(place("s3://bucket/copies/two"))
    for name in ("one", "two"):  # here the ETag is a counter
        stores.replace_bytes(place(f"gs://bucket/copies/{name}"), b"same")
    assert hashed(place("gs://bucket/copies/one")) != hashed(place("gs://bucket/copies/two"))


def test_a_store_that_fails_for_a_moment_changes_nothing(clips, gcs):
    failed = set()

    def once(method: str, path: str) -> str | None:
        first = (method, path) not in failed
        failed.add((method, path))
        return "503" if first else None

    gcs.faults.append(once)
    assert seen(clips[1] / "side") == seen(clips[0] / "side") and failed


def test_a_store_that_stays_away_ends_in_one_line_and_blames_no_file(clips, gcs, capsys):
    gcs.faults.append(lambda method, path: "503" if "a%2Emp4" in path else None)
    with pytest.raises(OSError, match="did not answer"):
        Contents(Path("unused"))(clips[1] / "films/a.mp4")
    assert sources([f"{clips[1]}/side"]) == STORAGE
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert error.startswith(f"error: {clips[1]}/side/a.mp4: the store did not answer; run the same")
    gcs.faults.clear()
    assert sources([f"{clips[1]}/side"]) == DONE and "2 clips" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.mp4", "deep/b.png", "deep/c.gif"])
def test_a_store_that_fails_while_a_file_is_decoded_is_no_damage(clips, gcs, name, monkeypatch):
    from easyanimate_jax.storage import ranges

    monkeypatch.setattr(ranges, "FIRST", 600)  # a header, and a part of what follows
    gcs.faults.append(lambda method, path: "503" if gcs.counts["get"] else None)
    read_file = media.read_image if name.endswith("png") else media.read_seconds
    with pytest.raises(OSError, match="did not answer") as caught:
        read_file(clips[1] / "films" / name)
    assert caught.value.filename == f"{clips[1]}/films/{name}"


def test_missing_things_are_named(clips, servers, capsys):
    with pytest.raises(ValueError, match=r"bucket/clips/x\.mp4: there is no such object; corr"):
        decoders().probe(clips[1] / "x.mp4")
    for nothing in ("gs://bucket/nothing", "gs://bucket/nothing.csv"):
        assert sources([nothing]) == BAD_INPUT
        assert nothing in capsys.readouterr().err
    from obstore.exceptions import GenericError, PermissionDeniedError

    for error in (GenericError("PUT http://169.254.169.254/token"), PermissionDeniedError("no")):
        told = of_store(error, "s3://b/x")
        assert told.errno == errno.EACCES and "credentials; see `gcloud" in str(told)


def test_a_film_that_is_overwritten_while_it_is_read_is_no_damage(gcs):
    film = place("gs://bucket/changing")
    stores.replace_bytes(film, bytes(1_000_000))
    told = pytest.raises(OSError, match="overwritten while it was read")
    with told as caught, paths.open_regular(film) as file:
        stores.replace_bytes(film, bytes(1_000_000))
        file.read()
    assert caught.value.errno == errno.ESTALE and caught.value.filename == str(film)


def test_a_file_of_a_store_reads_like_a_local_one(gcs, tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "x").write_bytes(content)
    (film,) = upload(tmp_path / "x", "gs://bucket/x")
    rng = np.random.default_rng(1)
    with film.open() as ours, open(tmp_path / "x", "rb") as local:
        for _ in range(300):
            place_, count = int(rng.integers(3_100_000)), int(rng.integers(200_000))
            assert ours.seek(place_) == local.seek(place_)
            assert ours.read(count) == local.read(count) and ours.tell() == local.tell()
        assert ours.seek(-5, io.SEEK_END) == local.seek(-5, io.SEEK_END)
        assert ours.read() == local.read() and ours.read() == b""
    assert gcs.counts["get"] < 30
    stores.replace_bytes(film, b"")
    with film.open() as file:
        assert file.read() == b""


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_no_name_leaves_the_folder_of_a_store(servers, scheme):
    root = place(f"{scheme}://bucket/films")
    assert paths.safe_path(root, "a/b:c ~.mp4") == root / "a/b:c ~.mp4"
    assert paths.safe_path(root, f"{scheme}://bucket/films/a.mp4") == root / "a.mp4"
    assert paths.safe_path(root, "a\\b.mp4") == root / "a/b.mp4"
    stores.replace_bytes(root / "c\\d", b"")
    assert paths.safe_path(root, "c\\d") == root / "c\\d"
    other = {"gs": "s3", "s3": "gs"}[scheme]
    for name in ("../up", "a/../../up", "/etc/passwd", f"{scheme}://bucket/other/a", "", "a\0b"):
        with pytest.raises(ValueError, match="file name"):
            paths.safe_path(root, name)
    for name in (
        f"{other}://bucket/films/a",
        f"{scheme}://bucket/filmsx",
        "http://h/a",
        "file:///a",
    ):
        with pytest.raises(ValueError, match="file name"):
            paths.safe_path(root, name)
    with pytest.raises(ValueError, match="file name"):
        paths.safe_path(Path("films"), f"{scheme}://bucket/films/a")


@pytest.mark.parametrize("name", ["odd//a.mp4", "odd/../../a.mp4"])
def test_a_folder_with_a_key_that_is_no_path_is_refused_by_name(gcs, name):
    gcs.put("bucket", name, b"x", None)
    with pytest.raises(ValueError, match=r"gs://bucket/odd: .*odd/.*; rename the object"):
        read.read_clips(place("gs://bucket/odd"))
    gcs.remove("bucket", name, None)


def test_what_you_name_yourself_may_be_anywhere(clips, tmp_path):
    root, gs, s3 = clips
    (tmp_path / "mix.toml").write_text(
        f'a = "{root}/side"\nb = "{gs}/side"\nc = "{s3}/films/t.csv"\n'
    )
    found, _ = read.read_clips(tmp_path / "mix.toml")
    assert {clip.source for clip in found} == {"a", "b", "c"}
    assert places.root_of(found) is None
    stores.replace_text(gs / "deep/mix.toml", 'up = "../side"')
    assert len(read.read_clips(gs / "deep/mix.toml")[0]) == 2
    stores.replace_text(gs / "deep/mix.toml", 'up = "../../../side"')
    with pytest.raises(ValueError, match="leaves the bucket"):
        read.read_clips(gs / "deep/mix.toml")
    table = write_clips(tmp_path, CLIP, root=str(gs / "films").encode())
    ((clip,), _) = read.read_clips(table)
    assert clip.path == gs / "films/a.mp4"


def test_a_record_says_where_a_clip_lies(clips):
    for root in clips[1:]:
        found = [
            *read.read_clips(root / "films/t.csv")[0],
            *read.read_clips(root / "tars/t.tar")[0],
        ]
        found += read.read_clips(root / "cells")[0]
        common = places.root_of(found)
        assert common == root
        for clip in found:
            again = places.from_bytes(places.to_bytes(clip, common), common)
            assert again == dataclasses.replace(clip, captions=())
    found += read.read_clips(clips[0] / "films/t.csv")[0]
    assert places.root_of(found) is None  # of disks and stores: then files are absolute
    for clip in found:
        again = places.from_bytes(places.to_bytes(clip, None), None)
        assert again == dataclasses.replace(clip, captions=())


def test_a_worker_gets_few_threads_and_says_that_its_store_fails(clips, gcs):
    workers = Decoders(1)
    assert workers.probe(clips[1] / "films/a.mp4").num_frames == 9
    worker = workers.free.get()
    status = Path(f"/proc/{worker.pid}/status").read_text()
    workers.free.put(worker)
    assert int(status.partition("Threads:")[2].split()[0]) <= 6
    gcs.faults.append(lambda method, path: "503")
    with pytest.raises(OSError, match="did not answer"):
        workers.probe(clips[1] / "films/a.mp4")
    gcs.faults.clear()
    assert workers.probe(clips[1] / "films/a.mp4").num_frames == 9  # the same worker
    assert workers.free.get() is worker
    workers.free.put(worker)
    workers.close()


def test_the_inputs_of_a_sample_may_lie_in_a_store(clips, tmp_path):
    size = {"height": 32, "width": 48, "frames": 9, "fps": 8}
    mask = np.zeros((32, 48, 3), np.uint8)
    mask[8:, 8:] = 255
    media.write_png(tmp_path / "mask.png", mask)
    (tmp_path / "path.json").write_text("[[[10, 20], [30, 20]]]")
    masks = [tmp_path, *upload(tmp_path, "gs://bucket/masks", "s3://bucket/masks")]
    found = []
    for root, drawn in zip(clips, masks, strict=True):
        films = root / "films"
        given = [
            {"image": films / "deep/b.png", "end_image": films / "deep/b.png"},
            {"video": films / "a.mp4", "mask": drawn / "mask.png"},
            {"control": films / "a.mp4", "reference": films / "deep/b.png"},
            {"camera": films / "poses.txt"},
            {"trajectory": drawn / "path.json"},
        ]
        requests = [SampleRequest("x", **{k: str(v) for k, v in g.items()}, **size) for g in given]
        requests[3] = dataclasses.replace(requests[3], frames=1)
        for request in requests:
            check(request)
        found.append([read_inputs(request) for request in requests])
        assert read_mask(requests[1]).any()
    for other in found[1:]:
        for local, ours in zip(found[0], other, strict=True):
            assert local.keys() == ours.keys()
            for name in local:
                np.testing.assert_array_equal(local[name], ours[name])
    with pytest.raises(ValueError, match=r"--image: there is no file gs://bucket/none\.png"):
        check(SampleRequest("x", image="gs://bucket/none.png"))


def test_records_are_the_same_and_an_overwritten_film_is_encoded_again(clips, gcs, tmp_path):
    vae = CausalVAE(TINY_VAE, rngs=nnx.Rngs(0))
    latents = LatentSet("s", Budget(12, (4, 12), (32,), frames=9), condition_draws=1)

    def encode(prompts):
        return (np.ones((len(prompts), 3, 4), np.float32),)

    def records(source, out):
        text = types.SimpleNamespace(encode=encode, is_cut=lambda prompt: False)
        prepare(str(source), tmp_path / out, [latents], vae, text, (), 0, weights={})
        found = Records(tmp_path / out / "s")
        return [found[i] for i in range(len(found))]

    (films,) = upload(clips[0] / "side", "gs://bucket/prepared")
    local, ours = records(clips[0] / "side", "local"), records(films, "gs")
    jax.tree.map(np.testing.assert_array_equal, local, ours)
    gcs.reads.clear()
    jax.tree.map(np.testing.assert_array_equal, ours, records(films, "gs"))
    assert gcs.reads["prepared/a.mp4"] == 1  # its header, and no frame again
    media.write_video(tmp_path / "a.mp4", 255 - media.read_clip(films / "a.mp4", 0, 9))
    stores.upload(tmp_path / "a.mp4", films / "a.mp4")
    assert not np.array_equal(records(films, "gs")[0]["mean"], ours[0]["mean"])


def test_folders_that_consoles_make_are_no_files(servers):
    import os

    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for key in ("made/", "made/sub/", "made/sub/x", "made/sub.y"):
        client.put_object(Bucket="bucket", Key=key, Body=b"")
    found = stores.list_files(Remote("s3", "bucket", "made"))
    assert sorted(f.name for f in found) == ["sub.y", "sub/x"]
