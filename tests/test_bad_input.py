"""Bad files, rows, names, archives and shards: a reason for each, and no crash, hang or request."""

import http.server
import io
import json
import os
import re
import shutil
import signal
import tarfile
import threading
import time
import zlib

import av
import numpy as np
import pytest
from PIL import Image
from test_prepare import SET, FakeText, vae  # noqa: F401 fixture

from easyanimate_jax.data import media, paths
from easyanimate_jax.data.decode import Decoders, decoders
from easyanimate_jax.data.index import INDEX_TYPES
from easyanimate_jax.data.records import Records, write_set
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.data.sources.rows import MAX_CAPTION
from easyanimate_jax.prepare import prepare as prepare_module
from easyanimate_jax.prepare import quarantine


@pytest.fixture(scope="module")
def canary():
    """A server that notes every request; its address."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.mp4"
    server.shutdown()
    assert seen == []


def noise(frames=9, height=48, width=64):
    return np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), np.uint8)


def encode(path, codec="libx264", container=None, frames=None, options=None, pix_fmt="yuv420p"):
    with av.open(str(path), "w", format=container, options=options or {}) as out:
        stream = out.add_stream(codec, rate=8)
        frames = noise() if frames is None else frames
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        out.mux(stream.encode())
    return path.read_bytes()


def sound(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())


def picture(kind):
    buffer = io.BytesIO()
    Image.fromarray(noise()[0]).save(buffer, kind)
    return buffer.getvalue()


def png_header(height, width):
    """A PNG that says it is large, and ends."""
    body = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    crc = zlib.crc32(body).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + body + crc


def bad_media(folder, url):
    """Bad files by name; everything that is not bytes is made in place."""
    mp4 = encode(folder / "ok.mp4")
    fast = encode(folder / "fast.mp4", options={"movflags": "faststart"})
    at = fast.index(b"mdat") + 4
    png, jpeg, webp = (picture(kind) for kind in ("PNG", "JPEG", "WEBP"))
    flipped, zeroed = bytearray(fast), bytearray(fast)
    for i in np.random.default_rng(1).integers(at + 8, len(fast), 60):
        flipped[i] ^= 0xFF
    zeroed[at + 40 :] = bytes(len(fast) - at - 40)
    hls = "#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    files = {
        "empty.mp4": b"",
        "random.mp4": np.random.default_rng(0).bytes(2000),
        "page.mp4": b"<!DOCTYPE html><html>404</html>",
        "zeros.mp4": bytes(1000),
        "text.mp4": "只是文字".encode(),
        "cut.mp4": mp4[: len(mp4) // 2],
        "cutfast.mp4": fast[: at + (len(fast) - at) // 2],
        "onebyte.mp4": mp4[:1],
        "header.mp4": mp4[:32],
        "flipped.mp4": bytes(flipped),
        "zeroed.mp4": bytes(zeroed),
        "concat.mp4": f"ffconcat version 1.0\nfile {folder}/ok.mp4\n".encode(),
        "concaturl.mp4": f"ffconcat version 1.0\nfile {url}\n".encode(),
        "playlist.mp4": hls.format("ok.mp4").encode(),
        "playlisturl.mp4": hls.format(url).encode(),
        "dash.mp4": f'<?xml version="1.0"?><MPD><BaseURL>{url}</BaseURL></MPD>'.encode(),
        "session.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "svg.png": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}"/></svg>'.encode(),
        "gif.mp4": b"GIF89a" + bytes(30),
        "elf.mp4": b"\x7fELF" + bytes(100),
        "zip.mp4": b"PK\x03\x04" + bytes(100),
        "pdf.mp4": b"%PDF-1.7\n" + bytes(100),
        "ftyp.mp4": b"\0\0\0\x18ftypisom" + bytes(300),
        "atom.mp4": mp4[:32] + b"\xff\xff\xff\xffmoov" + bytes(100),
        "nested.mp4": b"\0\0\0\x18ftypisom" + bytes(12) + b"\0\0\x40\0moov" * 2000,
        "ebml.mkv": b"\x1a\x45\xdf\xa3" + np.random.default_rng(2).bytes(500),
        "riff.avi": b"RIFF\xff\xff\xff\x7fAVI " + bytes(50),
        "cut.png": png[: len(png) // 2],
        "crc.png": png[:40] + b"\0\0\0\0" + png[44:],
        "huge.png": png_header(60_000, 60_000),
        "tall.png": png_header(1, 5000),
        "cut.jpg": jpeg[:100],
        "soi.jpg": b"\xff\xd8\xff" + bytes(100),
        "cut.webp": webp[: len(webp) // 2],
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    encode(folder / "codec.avi", "huffyuv", pix_fmt="yuv422p")
    encode(folder / "wide.mkv", "mpeg4", frames=np.zeros((1, 16, 4112, 3), np.uint8))
    sound(folder / "sound.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "dangling.mp4").symlink_to(folder / "nothing")
    (folder / "device.mp4").symlink_to("/dev/zero")
    more = ("codec.avi", "wide.mkv", "sound.mp4", "pipe.mp4", "folder.mp4", "dangling.mp4")
    return [*files, *more, "device.mp4", "missing.mp4"]


def describe(folder, canary, good=("ok.mp4",)):
    """A source of good files and of bad ones; the names of these."""
    bad = bad_media(folder, canary)
    kind = lambda name: "image" if name.endswith(("png", "jpg", "webp")) else "video"  # noqa: E731
    rows = [{"file_path": n, "text": n, "type": kind(n)} for n in [*good, *bad, canary]]
    (folder / "metadata.json").write_text(json.dumps(rows))
    return bad


@pytest.mark.reliability  # R10
def test_every_bad_media_file_gets_a_reason(tmp_path, canary):
    """300 clips and over 40 bad ones: each bad one is named, each good one is read whole."""
    good = [f"good{i}.mp4" for i in range(300)]
    bad = describe(tmp_path, canary, good)
    for name in good:
        os.link(tmp_path / "ok.mp4", tmp_path / name)
    clips, problems = read_clips(tmp_path)
    reasons, read = {p.file: p.reason for p in problems}, []
    for clip in clips:  # headers may be whole where frames are not
        began = time.monotonic()
        try:
            if clip.kind == "image":
                decoders().read_still(clip.path, None)
            else:
                frames = decoders().read_clip(clip.path, 0, clip.num_frames, 1, None)
                assert len(frames) == clip.num_frames == 9
            read.append(clip.name)
        except ValueError as error:
            reasons[clip.name] = str(error)
        assert time.monotonic() - began < 15  # ten for a file, and the start of a new decoder
    assert len(bad) >= 40
    assert sorted(reasons) == sorted([*bad, canary])
    assert sorted(read) == sorted(good)
    assert all(len(reason) > 10 for reason in reasons.values())


def test_every_bad_media_file_is_in_the_quarantine(tmp_path, canary, vae, monkeypatch):  # noqa: F811
    (tmp_path / "source").mkdir()
    bad = describe(tmp_path / "source", canary)
    monkeypatch.setattr(quarantine, "MAX_BAD", 1.0)  # else the third would stop it
    source, out = tmp_path / "source", tmp_path / "out"
    prepare_module.prepare(source, out, [SET], vae, FakeText(), (), 0, weights={})
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["file"] for line in lines) == sorted([*bad, canary])
    assert all(len(line["reason"]) > 10 for line in lines)
    assert list(Records(out / SET.name).index["clip"]) == ["ok.mp4"]


@pytest.fixture
def one():
    made = []

    def make(**limits):
        made.append(Decoders(1, **limits))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


@pytest.mark.reliability  # R10
def test_a_decoder_that_hangs_swells_or_dies_costs_one_file(tmp_path, one):
    encode(tmp_path / "ok.mp4")
    Image.new("1", (4000, 4000)).save(tmp_path / "big.png")  # 2 KB on disk, 48 MB decoded
    workers = one(seconds=30.0, memory=600 * 2**20)
    good = workers.read_clip(tmp_path / "ok.mp4", 0, 9, 1, None)
    np.testing.assert_array_equal(good, media.read_clip(tmp_path / "ok.mp4", 0, 9))

    workers.memory = 200 * 2**20  # of the next worker
    workers.close()
    with pytest.raises((ValueError, RuntimeError), match=r"big\.png"):
        workers.read_image(tmp_path / "big.png")

    workers.memory, workers.stuck = 2**31, 0.3
    workers.close()
    workers.probe(tmp_path / "ok.mp4")
    process = workers.free.queue[-1]
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match=r"ok\.mp4: the decoder did nothing for 0.3 s"):
        workers.probe(tmp_path / "ok.mp4")
    assert process.poll() == -signal.SIGKILL

    workers.stuck = 30.0
    workers.probe(tmp_path / "ok.mp4")
    process = workers.free.queue[-1]
    process.kill()
    process.wait()
    assert workers.probe(tmp_path / "ok.mp4").num_frames == 9  # its death was no file's fault


def test_a_worker_leaves_with_its_parent(tmp_path, one):
    encode(tmp_path / "ok.mp4")
    workers = one()
    workers.probe(tmp_path / "ok.mp4")
    process = workers.free.queue[-1]
    process.stdin.close()
    assert process.wait(10) == 0


BAD_ROWS = [
    {"text": "no file"},
    {"file_path": "", "text": "empty"},
    {"file_path": None, "text": "null"},
    {"file_path": 3, "text": "number"},
    {"file_path": ["ok.mp4"], "text": "list"},
    {"file_path": {"a": 1}, "text": "object"},
    {"file_path": True, "text": "bool"},
    {"file_path": "none.mp4", "text": "missing"},
    {"file_path": "\ud800.mp4", "text": "surrogate name"},
    {"file_path": "a\0.mp4", "text": "NUL name"},
    {"file_path": "x" * 5000, "text": "long name"},
    {"file_path": "ok.mp4"},
    {"file_path": "ok.mp4", "text": ""},
    {"file_path": "ok.mp4", "text": "  \n\t "},
    {"file_path": "ok.mp4", "text": None},
    {"file_path": "ok.mp4", "text": 7},
    {"file_path": "ok.mp4", "text": 0},
    {"file_path": "ok.mp4", "text": False},
    {"file_path": "ok.mp4", "text": 1.5},
    {"file_path": "ok.mp4", "text": float("nan")},
    {"file_path": "ok.mp4", "text": float("inf")},
    {"file_path": "ok.mp4", "text": ["a", "b"]},
    {"file_path": "ok.mp4", "text": []},
    {"file_path": "ok.mp4", "text": {"en": "a"}},
    {"file_path": "ok.mp4", "text": "lone \ud83d surrogate"},
    {"file_path": "ok.mp4", "text": "NUL \0 inside"},
    {"file_path": "ok.mp4", "text": "x" * (MAX_CAPTION + 1)},
    {"file_path": "ok.mp4", "text": "界" * 1_000_000},
    {"file_path": "ok.mp4", "text": "a", "type": "sound"},
    {"file_path": "ok.mp4", "text": "a", "type": 3},
    {"file_path": "ok.mp4", "text": "a", "type": ["video"]},
    {"file_path": "ok.mp4", "text": "a", "type": "VIDEO "},
    {"file_path": "ok.mp4", "text": "a", "type": "image"},
    {"file_path": "/etc/passwd", "text": "a"},
    {"file_path": "../ok.mp4", "text": "a"},
    None,
    3,
    "ok.mp4",
    ["ok.mp4", "a"],
    [],
]
BAD_LINES = ["{", "nothing", '{"file_path": "ok.mp4", "text": "a"', "[" * 100_000, "\ufeff?"]
ODD_PROMPTS = [
    "a",
    "👩‍👩‍👧‍👦",
    "‮rtl",
    "Z̷̢a̶l",
    "<|endoftext|>",
    "a\x1b[31mred",
    "'; DROP",
    "x" * MAX_CAPTION,
]


@pytest.mark.reliability  # R14
def test_every_bad_row_gets_a_reason_and_odd_prompts_pass(tmp_path):
    encode(tmp_path / "ok.mp4")
    good = [{"file_path": "ok.mp4", "text": text, "type": "video"} for text in ODD_PROMPTS]
    lines = [json.dumps(row) for row in BAD_ROWS] + BAD_LINES + [json.dumps(row) for row in good]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    (clip,), problems = read_clips(tmp_path)
    assert clip.captions == tuple(ODD_PROMPTS)
    assert len(BAD_ROWS) >= 40
    assert [p.row for p in problems] == list(range(1, len(BAD_ROWS) + len(BAD_LINES) + 1))
    assert all(p.reason for p in problems)

    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.json").write_text(json.dumps(BAD_ROWS + good))
    (clip,), problems = read_clips(tmp_path)
    assert [p.row for p in problems] == list(range(len(BAD_ROWS)))
    (tmp_path / "metadata.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not JSON"):
        read_clips(tmp_path)


def test_bad_lines_of_a_csv_are_named_by_their_line(tmp_path):
    encode(tmp_path / "ok.mp4")
    (tmp_path / "metadata.csv").write_bytes(
        b"file_path,text,type\nok.mp4,fine,video\nok.mp4\nok.mp4,\xff\xfe,video\n"
        b"ok.mp4," + b"x" * 200_000 + b",video\nok.mp4,two,video,more\n,nameless,video\n"
    )
    (clip,), problems = read_clips(tmp_path)
    assert clip.captions == ("fine", "two")
    assert [p.row for p in problems] == [3, 4, 5, 7]


ATTACKS = [
    "../x", "/etc/passwd", "a/../../x", "..", ".", "link/etc/passwd", "chain/etc/passwd",
    "http://h/x", "file:x", "concat:a|b", "subfile,,start,0,end,9,,:x", "data:,x", "C:\\x",
    "\\\\host\\x", "..\\x", "~/x", "a\0b", "", "\ud800",
]  # fmt: skip


@pytest.mark.reliability  # R14
@pytest.mark.parametrize("name", ATTACKS)
def test_no_name_leaves_the_folder(tmp_path, name):
    (tmp_path / "link").symlink_to("/")
    (tmp_path / "chain").symlink_to("link")
    with pytest.raises(ValueError, match="file name"):
        paths.safe_path(tmp_path, name)


def test_what_a_link_became_meanwhile_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    (tmp_path / "secret").write_text("secret")
    path = paths.safe_path(tmp_path, "a")
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to("secret")
    monkeypatch.setattr(os.path, "realpath", str)  # the link comes after the look
    with pytest.raises(ValueError, match="symbolic links"), paths.open_regular(path):
        pass


def add(tar, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.reliability  # R15
def test_a_tar_cannot_reach_outside_itself(tmp_path):
    mp4 = encode(tmp_path / "ok.mp4")
    archives = tmp_path / "archives"
    archives.mkdir()
    with tarfile.open(archives / "a.tar", "w") as tar:
        for stem in ("good", "../up", "/abs", "a/../../b"):
            add(tar, f"{stem}.mp4", mp4)
            add(tar, f"{stem}.txt", b"text")
        add(tar, "link.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.mp4", type=tarfile.LNKTYPE, linkname="../../etc/passwd")
        add(tar, "pipe.mp4", type=tarfile.FIFOTYPE)
        add(tar, "zero.mp4", type=tarfile.CHRTYPE)
        add(tar, "mute.mp4", mp4)
        add(tar, "page.mp4", b"<html>")
        add(tar, "page.txt", b"text")
        add(tar, "words.mp4", mp4)
        add(tar, "words.json", b"[" * 50_000)
        add(tar, "good.webm", mp4)
    before = sorted(tmp_path.rglob("*"))
    (clip,), problems = read_clips(archives)
    assert (clip.name, clip.captions, clip.num_frames) == ("good.mp4", ("text",), 9)
    names = {p.file for p in problems}
    assert {"../up.mp4", "/abs.mp4", "a/../../b.mp4", "link.mp4", "hard.mp4", "pipe.mp4"} < names
    assert {"zero.mp4", "mute.mp4", "page.mp4", "words.mp4", "good.webm"} < names
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["cut", "size", "checksum", "noise", "zip"])
def test_a_damaged_tar_says_where_it_ends(tmp_path, damage):
    mp4 = encode(tmp_path / "ok.mp4")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for stem in ("one", "two"):
            add(tar, f"{stem}.mp4", mp4)
            add(tar, f"{stem}.txt", b"text")
    data = bytearray((tmp_path / "a.tar").read_bytes())
    second = data.index(b"two.mp4")
    if damage == "cut":
        del data[second + 700 :]
    if damage == "size":  # a petabyte
        info = tarfile.TarInfo("two.mp4")
        info.size = 2**50
        data[second : second + 512] = info.tobuf(tarfile.GNU_FORMAT)
    if damage == "checksum":
        data[second + 3] ^= 1
    if damage in ("noise", "zip"):
        data = {"noise": bytes(range(256)) * 40, "zip": b"PK\x03\x04" + bytes(5000)}[damage]
    (tmp_path / "a.tar").write_bytes(data)
    if damage in ("noise", "zip"):
        with pytest.raises(ValueError, match=r"a\.tar"):
            read_clips(tmp_path / "a.tar")
        return
    (clip,), problems = read_clips(tmp_path / "a.tar")
    assert clip.name == "one.mp4"
    assert any(re.search(r"a\.tar is damaged|the tar ends before", p.reason) for p in problems)


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("whole") / "set", np.random.default_rng(0)
    row = {"clip": "a", "kind": "video"}
    records = [{"mean": rng.standard_normal((40, 64)).astype(np.float16)} for _ in range(24)]
    rows = [dict.fromkeys(INDEX_TYPES, 0) | row for _ in records]
    write_set(folder, {}, records, rows, shard_size=8)
    return folder, records


DAMAGES = [f"flip {i}" for i in range(40)]
DAMAGES += [f"cut {i}" for i in (1, 2, 100, 4096, 40_000, 60_000)]
DAMAGES += ["empty", "gone", "html", "zeros", "other", "swap", "folder"]


@pytest.mark.reliability  # R11
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_shard_reads_silently(whole_set, tmp_path, damage):
    folder, records = whole_set
    copy = tmp_path / "set"
    shutil.copytree(folder, copy)
    other, shard, _ = sorted(copy.rglob("*.shard"))
    data = bytearray(shard.read_bytes())
    kind, _, number = damage.partition(" ")
    if kind == "flip":
        at = np.random.default_rng(int(number)).integers(len(data))
        data[at] ^= 1 << int(number) % 8
    if kind == "cut":
        del data[len(data) - int(number) :]
    if kind == "html":
        data = b"<html>" * 20_000
    if kind == "empty":
        data = b""
    if kind == "zeros":
        data[20_000:60_000] = bytes(40_000)
    if kind == "other":
        data = other.read_bytes() + bytes(70_000)
    shard.unlink()
    if kind == "folder":
        shard.mkdir()
    elif kind == "swap":
        shard.write_bytes((folder / "header.json").read_bytes())
    elif kind != "gone":
        shard.write_bytes(data)
    found = None
    try:
        found = Records(copy)
    except ValueError as error:
        assert shard.name in str(error)
        return
    for i, record in enumerate(records):
        try:
            np.testing.assert_array_equal(found[i]["mean"], record["mean"])
        except ValueError as error:
            assert shard.name in str(error)
