"""Every layout becomes clips, and bad rows become a list."""

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import flax.nnx as nnx
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets
from PIL import Image

from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.loader import Loader
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import LatentSet, Records
from easyanimate_jax.data.sources import read, report, tfds
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.prepare.prepare import prepare


@pytest.fixture
def folder(tmp_path):
    media.write_video(tmp_path / "a.mp4", np.zeros((5, 32, 48, 3), np.uint8))
    media.write_png(tmp_path / "b.png", np.zeros((20, 30, 3), np.uint8))
    (tmp_path / "c.mp4").write_bytes(b"<html>")
    return tmp_path


def describe(folder, *rows):
    keys = ("file_path", "text", "type")
    table = [dict(zip(keys, row, strict=False)) for row in rows]
    (folder / "metadata.json").write_text(json.dumps(table))


def test_rows_of_one_file_are_one_clip(folder):
    describe(folder, ("a.mp4", "red", "video"), ("b.png", "blue"), ("a.mp4", "红", "video"))
    (a, b), problems = read.read_clips(folder)
    assert (a.name, a.kind, a.captions) == ("a.mp4", "video", ("red", "红"))
    assert (a.num_frames, a.height, a.width, a.fps) == (5, 32, 48, 8.0)
    assert (b.kind, b.num_frames, b.height, b.width) == ("image", 1, 20, 30)
    assert problems == []


def test_csv_says_the_same_as_json(folder):
    rows = [("a.mp4", "red, fast", "video"), ("b.png", "蓝", "image")]
    describe(folder, *rows)
    from_json = read.read_clips(folder)
    (folder / "metadata.json").unlink()
    table = "file_path,text,type\n" + "".join(f'{f},"{t}",{k}\n' for f, t, k in rows)
    (folder / "metadata.csv").write_text(table, encoding="utf-8-sig")
    assert read.read_clips(folder) == from_json


def test_every_bad_row_is_reported_with_its_reason(folder):
    describe(
        folder,
        ("a.mp4", "fine", "video"),
        ("a.mp4", "wrong type", "image"),
        ("b.png", ""),
        ("c.mp4", "not a video", "video"),
        ("../up.mp4", "outside", "video"),
        ("none.mp4", "missing", "video"),
        ("b.png", "?", "sound"),
        ("", "nameless"),
    )
    clips, problems = read.read_clips(folder)
    assert [clip.name for clip in clips] == ["a.mp4"] and clips[0].captions == ("fine",)
    assert [p.row for p in problems] == [1, 2, 3, 4, 5, 6, 7]
    for problem, reason in zip(
        problems, ("image", "no text", "html", "leaves", "No such", "sound", "no file"), strict=True
    ):
        assert reason in problem.reason


def test_a_folder_without_a_usable_clip_raises(folder):
    describe(folder, ("c.mp4", "not a video", "video"))
    with pytest.raises(ValueError, match=r"no usable clip[\s\S]*c\.mp4"):
        read.read_clips(folder)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]"])
def test_a_broken_metadata_file_is_named(folder, text):
    (folder / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match=r"metadata\.json"):
        read.read_clips(folder)


def test_a_missing_metadata_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither metadata"):
        read.read_clips(tmp_path)


def clips_of(read):
    """What training sees of the clips: everything but where the file lies."""
    return {clip.name: dataclasses.replace(clip, path=Path()) for clip in read[0]}


def rich(folder):
    rng = np.random.default_rng(0)
    for i in range(4):
        frames = np.repeat(rng.integers(20, 255, (9, 5, 5, 3), np.uint8), 8, 1).repeat(8, 2)
        media.write_video(folder / f"{i}.mp4", frames)
    media.write_png(folder / "p.png", rng.integers(0, 255, (40, 40, 3), np.uint8))
    names = [*(f"{i}.mp4" for i in range(4)), "p.png"]
    return {name: [f"clip {name}", "片"] for name in names}


def write_tar(path, folder, captions):
    with tarfile.open(path, "w") as tar:
        for name, texts in captions.items():
            tar.add(folder / name, name)
            text = json.dumps({"captions": texts}).encode()
            info = tarfile.TarInfo(name.rpartition(".")[0] + ".json")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The same clips as a folder, a tar and a TFDS data set."""
    place = tmp_path_factory.mktemp("three")
    folder = place / "folder"
    folder.mkdir()
    captions = rich(folder)
    describe(
        folder,
        *[(n, t, "image" if n.endswith("png") else "video") for n in captions for t in captions[n]],
    )
    write_tar(place / "clips.tar", folder, captions)
    built = tfds.write_tfds(read.read_clips(folder)[0], place / "tfds")
    return folder, place / "clips.tar", built


def test_a_folder_a_tar_and_a_tfds_data_set_hold_the_same_clips(three):
    folder, tar, built = (clips_of(read.read_clips(source)) for source in three)
    assert folder == tar == built and len(folder) == 5


def test_all_three_train_on_the_same_batches(three, tmp_path):
    config = VAEConfig(channels=(8, 8, 8), layers=1, groups=4, unshuffle=4, dtype="float32")
    vae = CausalVAE(config, rngs=nnx.Rngs(0))
    latents = LatentSet("small", Budget(12, (4, 12), (32,), frames=9), condition_draws=1)

    def encode(prompts):
        size = np.array([len(p) for p in prompts], np.float32)[:, None, None]
        return (np.tile(size, (1, 3, 4)),)

    batches = []
    for number, source in enumerate(three):
        out = tmp_path / str(number)
        text = types.SimpleNamespace(encode=encode, is_cut=lambda prompt: False)
        prepare(source, out, [latents], vae, text, (), 0, weights={}, shard_size=8)
        records = Records(out / "small")
        plan = Plan(records.index, lengths=(4, 12), batch_size=3, seed=0, name="s")
        loader = Loader(records, plan, task="i2v", microbatch=3, text_drop=0.1)
        batches.append([loader.batch(step) for step in range(4)])
    for others in batches[1:]:
        for (length, ours), (length2, theirs) in zip(batches[0], others, strict=True):
            assert length == length2
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_reading_tfds_imports_no_tensorflow(three):
    code = (
        "import sys; from easyanimate_jax.data.sources.read import read_clips; "
        "print(len(read_clips(sys.argv[1])[0]), 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(three[2])]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["5", "False"]


def test_lists_pairs_and_tables_say_the_same(tmp_path):
    captions = {name: texts[0] for name, texts in rich(tmp_path).items()}
    for name, text in captions.items():
        (tmp_path / name).with_suffix(".txt").write_text(text)
    pairs = read.read_clips(tmp_path)
    assert len(pairs[0]) == 5 and pairs[1] == []

    table = pyarrow.table({"video_path": list(captions), "caption": list(captions.values())})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    rows = "".join(f"{n},{t}\n" for n, t in captions.items())
    (tmp_path / "t.csv").write_text("path,prompt\n" + rows)
    for name in ("t.parquet", "t.csv"):
        assert clips_of(read.read_clips(tmp_path / name)) == clips_of(pairs)
    (tmp_path / "videos.txt").write_text("\n".join(captions))
    (tmp_path / "prompt.txt").write_text("\n".join(captions.values()))
    assert clips_of(read.read_clips(tmp_path)) == clips_of(pairs)
    (tmp_path / "prompt.txt").write_text("\n".join([*captions.values(), "one too many"]))
    assert [p.row for p in read.read_clips(tmp_path)[1]] == [6]


def test_other_data_sets_of_pictures_read_by_their_features(tmp_path):
    class Digits(tensorflow_datasets.core.GeneratorBasedBuilder):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            f = tensorflow_datasets.features
            label = f.ClassLabel(names=["nought", "one"])
            features = f.FeaturesDict({"image": f.Image(shape=(32, 32, 3)), "label": label})
            return tensorflow_datasets.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(2):
                buffer = io.BytesIO()
                Image.new("RGB", (32, 32)).save(buffer, "PNG")
                yield i, {"image": io.BytesIO(buffer.getvalue()), "label": i}

    builder = Digits(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    clips, problems = read.read_clips(builder.data_dir)
    assert problems == [] and sorted(c.captions[0] for c in clips) == ["nought", "one"]
    assert {(c.kind, c.height, c.width) for c in clips} == {("image", 32, 32)}


def test_the_command_shows_sizes_durations_and_problems(folder):
    describe(folder, ("a.mp4", "red", "video"), ("b.png", "blue"), ("c.mp4", "page", "video"))
    shown = report.describe(str(folder))
    for part in ("2 clips, 2 captions", "32x48", "last 0.6", "1 problems", "row 2: 'c.mp4'"):
        assert part in shown


def test_an_unknown_source_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a\.zip is no source"):
        read.read_clips(tmp_path / "a.zip")


def test_a_mixture_names_its_sources(three, tmp_path):
    folder, tar, _ = three
    (tmp_path / "m.toml").write_text(f'films = "{folder}"\nstock = "{tar}"\n')
    clips, problems = read.read_clips(tmp_path / "m.toml")
    assert len(clips) == 10 and problems == []
    assert {c.name: c.source for c in clips if c.name.endswith("p.png")} == {
        "films/p.png": "films",
        "stock/p.png": "stock",
    }
    (tmp_path / "m.toml").write_text("films = 3")
    with pytest.raises(ValueError, match="films must be a source"):
        read.read_clips(tmp_path / "m.toml")


ODD = (
    "12:30 a.png", "a#1.png", "100%41.png", "what?.png", "two\nlines.png", "[x]*{y}.png",
    "~b.png", " c.png", "file:x.png", "C:d.png", "红\u2028.png", "x" * 250 + ".png", "-e.png",
)  # fmt: skip


def odd(folder):
    """A folder of pictures with odd names; one name is in Latin-1."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(ODD):
        media.write_png(folder / name, np.full((20, 20, 3), 10 * number, np.uint8))
        (folder / name).with_suffix(".txt").write_text(f"text {number}")
    latin = os.fsencode(folder) + b"/caf\xe9.png"
    shutil.copy(folder / ODD[0], latin)
    shutil.copy((folder / ODD[0]).with_suffix(".txt"), latin[:-3] + b"txt")
    return folder


@pytest.mark.parametrize("layout", ["side by side", "json", "jsonl", "csv", "parquet"])
def test_every_name_that_a_file_can_have_is_read(tmp_path, layout):
    odd(tmp_path)
    rows = [{"file_path": n, "text": f"text {i}", "type": "image"} for i, n in enumerate(ODD)]
    latin = {"file_path": "caf\udce9.png", "text": "a", "type": "image"}
    if layout == "json":
        (tmp_path / "metadata.json").write_text(json.dumps([*rows, latin]))
    if layout == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, latin])))
    if layout == "csv":
        with open(tmp_path / "metadata.csv", "w", errors="surrogateescape") as file:
            table = csv.DictWriter(file, latin)
            table.writeheader()
            table.writerows([*rows, latin])
    source = tmp_path
    if layout == "parquet":
        source = tmp_path / "t.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    clips, problems = read.read_clips(source)
    assert {clip.name: clip.captions for clip in clips} == {
        name: (f"text {i}",) for i, name in enumerate(ODD)
    }
    if layout == "parquet":
        assert problems == []  # its text is always UTF-8
    else:
        (problem,) = problems
        assert problem.file == r"caf\xe9.png" and "is not UTF-8; rename the file" in problem.reason


def test_an_absolute_path_inside_the_folder_is_the_file_in_it(folder, tmp_path_factory):
    alias = tmp_path_factory.mktemp("elsewhere") / "alias"
    alias.symlink_to(folder)
    describe(
        folder,
        (f"{folder}/a.mp4", "one", "video"),
        ("a.mp4", "two", "video"),
        (f"file://{folder}/a.mp4", "three", "video"),
        (f"{alias}/a.mp4", "four", "video"),
        (f"{folder}/../{folder.name}/b.png", "five", "image"),
        (f"{folder}-other/a.mp4", "six", "video"),
        ("/etc/passwd", "seven", "video"),
        ("file:///etc/passwd", "eight", "video"),
        (f"file://elsewhere{folder}/a.mp4", "nine", "video"),
    )
    clips, problems = read.read_clips(folder)
    captions = {clip.name: clip.captions for clip in clips}
    assert captions == {"a.mp4": ("one", "two", "three", "four"), "b.png": ("five",)}
    assert [p.row for p in problems] == [5, 6, 7, 8]
    assert all("file name" in p.reason for p in problems)


def hub(place):
    """A cache of a hub: names are links to files with other names, beside the folder."""
    (place / "blobs").mkdir(parents=True)
    (place / "snapshots" / "one").mkdir(parents=True)
    media.write_png(place / "blobs" / "abc", np.zeros((20, 30, 3), np.uint8))
    (place / "blobs" / "def").write_text("a caption")
    for name, blob in (("a.png", "abc"), ("a.txt", "def")):
        (place / "snapshots" / "one" / name).symlink_to(f"../../blobs/{blob}")
    return place / "snapshots" / "one"


def test_links_lead_only_where_the_user_says(tmp_path):
    source, secret = hub(tmp_path / "hub"), tmp_path / "secret.png"
    media.write_png(secret, np.zeros((20, 30, 3), np.uint8))
    (source / "b.png").symlink_to(secret)
    (source / "b.txt").write_text("b")
    (source / "c.png").symlink_to("a.png")
    (source / "c.txt").symlink_to(secret)
    with pytest.raises(ValueError, match=r"leaves the data folder .*blobs/.*\(--links\)"):
        read.read_clips(source)
    for links in (tmp_path / "hub", f"file://{tmp_path}/hub/blobs"):
        (clip,), problems = read.read_clips(source, links)
        assert (clip.name, clip.captions) == ("a.png", ("a caption",))
        assert clip.path == tmp_path / "hub" / "blobs" / "abc"
        assert [p.file for p in problems] == ["b.png", "c.png"]
        assert all("leaves the data folder" in p.reason for p in problems)
    (source / "metadata.json").symlink_to("../../blobs/table")
    (tmp_path / "hub" / "blobs" / "table").write_text('[{"file_path": "a.png", "text": "x"}]')
    assert len(read.read_clips(source, tmp_path / "hub")[0]) == 1
    shown = report.describe(source, tmp_path / "hub")
    assert "1 clips" in shown


def test_a_mixture_names_the_source_that_is_a_url(tmp_path):
    (tmp_path / "m.toml").write_text('films = "hf://bucket/films"')
    with pytest.raises(ValueError, match=r"m.toml: films: .*hf:// is not supported"):
        read.read_clips(tmp_path / "m.toml")


ROWS = "a.mp4;red, fast\nb.png;blau: \u00fc\n"
LINES = """{"path": "a.mp4", "Text": "red, fast"}

{"path": "b.png", "Text": "blau: ü"}
"""
TABLES = {  # name of the file -> its bytes
    "semicolons.csv": f"path;text\n{ROWS}".encode(),
    "tabs.csv": b"path\ttext\na.mp4\tred, fast\nb.png\tblau: \xc3\xbc\n",
    "spaces.csv": 'path, text\na.mp4, "red, fast"\nb.png , blau: ü \n'.encode(),
    "capitals.csv": 'Video Path,Text\r\na.mp4,"red, fast"\r\nb.png,blau: ü\r\n'.encode("utf-8-sig"),
    "utf16.csv": f"path;Caption\n{ROWS}".encode("utf-16"),
    "utf16 without a mark.csv": f"path;text\n{ROWS}".encode("utf-16-le"),
    "quoted.csv": f'"Video";"PROMPT"\n{ROWS}'.encode(),
    "named by its delimiter.csv": f"sep=;\r\npath;text\r\n{ROWS}".encode("utf-8-sig"),
    "old lines.csv": f"path;text\n{ROWS}".replace("\n", "\r").encode(),
    "empty lines.csv": f"\n \r\npath;text\n\n{ROWS}\n".encode(),
    "tabs.tsv": b"path\ttext\na.mp4\tred, fast\nb.png\tblau: \xc3\xbc\n",
    "lines.ndjson": LINES.encode(),
    "lines.json": LINES.encode(),
    "utf16.json": f"[{LINES.strip()}]".replace("\n\n", ",").encode("utf-16"),
    "utf16.jsonl": LINES.encode("utf-16"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_as_programs_write_them(folder, name):
    (folder / name).write_bytes(TABLES[name])
    clips, problems = read.read_clips(folder / name)
    found = {clip.name: clip.captions for clip in clips}
    assert found == {"a.mp4": ("red, fast",), "b.png": ("blau: ü",)} and problems == []


def test_names_that_windows_wrote_are_those_of_the_files(folder):
    (folder / "sub").mkdir()
    for name in ("sub/c.png", "back\\slash.png"):
        shutil.copy(folder / "b.png", folder / name)
    names = "sub\\c.png,c\nback\\slash.png,d\n..\\up.png,e\n\\a.mp4,f\n"
    (folder / "t.csv").write_text(f"path,text\n{names}")
    clips, problems = read.read_clips(folder / "t.csv")
    assert [clip.name for clip in clips] == ["sub/c.png", "back\\slash.png"]
    assert [p.row for p in problems] == [4, 5]
    assert all("leaves the data folder" in p.reason for p in problems)


def test_a_csv_that_would_lose_text_is_named_by_its_lines(folder):
    rows = 'a.mp4,red, fast\nb.png,"blue\nsky"\na.mp4,fine,\nb.png,"open\na.mp4,lost\n'
    (folder / "t.csv").write_text(f"\npath,text\n{rows}")
    clips, problems = read.read_clips(folder / "t.csv")
    assert {c.name: c.captions for c in clips} == {"a.mp4": ("fine",), "b.png": ("blue\nsky",)}
    (cut, opened) = problems
    assert cut[:2] == (3, "a.mp4") and "1 cells more than the header" in cut.reason
    assert opened[:2] == (7, "") and opened.reason.endswith("close its quotes")
    (folder / "t.csv").write_text("path,Text,text\na.mp4,one,two\n")
    with pytest.raises(ValueError, match="several columns text: its columns are path, text, text"):
        read.read_clips(folder / "t.csv")


def test_a_json_of_one_line_is_a_row(folder):
    (folder / "one.json").write_text('{"path": "a.mp4", "text": "red"}\n')
    ((clip,), problems) = read.read_clips(folder / "one.json")
    assert clip.captions == ("red",) and problems == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"name;words\na.mp4;red\n", "no column of files: its columns are name, words"),
        ("t.csv", b"a.mp4,red\nb.png,blue\n", "its columns are a.mp4, red"),
        ("t.csv", b"", "no column of files"),
        ("t.jsonl", b'{"name": "a.mp4", "words": "red"}\n', "its columns are name, words"),
        ("t.csv", b"\0" * 300_000, "no column of files|no header"),
    ],
)
def test_a_table_without_a_column_of_files_names_its_columns(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read.read_clips(folder / name)


def test_a_table_without_captions_names_its_columns(folder, caplog):
    (folder / "t.csv").write_text("path,words\na.mp4,red\n")
    with pytest.raises(ValueError, match=r"a\.mp4: no text"):
        read.read_clips(folder / "t.csv")
    assert "no column of captions: its columns are path, words" in caplog.text


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            {"video": [{"uri": "a.mp4", "size": 3}], "caption": ["a"]},
            r"column video is of type struct<uri: string, size: int64>; write paths, bytes",
        ),
        ({"image": [["a.png"]], "text": ["a"]}, "column image is of type list<"),
        ({"left": [b"1"], "right": [b"2"], "text": ["a"]}, "columns left, right hold bytes; name"),
        ({"text": ["a"]}, "no column of files: its columns are text"),
        ({"image": pyarrow.array([None], pyarrow.binary()), "text": ["a"]}, "row 0 : no file_path"),
        ({"image": [b"<html>"], "text": ["a"]}, r"row 0 t/00000000: .* starts with b'<html>'"),
        ({"name": ["a.mp4"], "words": ["a"]}, "no column of files: its columns are name, words"),
    ],
)
def test_a_parquet_without_usable_files_is_refused(folder, cells, message):
    pyarrow.parquet.write_table(pyarrow.table(cells), folder / "t.parquet")
    with pytest.raises(ValueError, match=message):
        read.read_clips(folder / "t.parquet")


@pytest.fixture(scope="module")
def cells(three):
    """The clips of `three` in the cells of a parquet table, two rows a group."""
    folder, captions = three[0], {c.name: c.captions for c in read.read_clips(three[0])[0]}
    films = [{"bytes": (folder / n).read_bytes(), "path": f"films/{n}"} for n in captions]
    table = pyarrow.table({"video": films, "caption": [list(c) for c in captions.values()]})
    (folder.parent / "cells").mkdir()
    path = folder.parent / "cells" / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def test_files_in_the_cells_of_a_parquet_are_the_same_clips(three, cells):
    clips, problems = read.read_clips(cells)
    names = [
        f"{cells.stem}/{row:08d}/{c.name}" for row, c in enumerate(read.read_clips(three[0])[0])
    ]
    assert [clip.name for clip in clips] == names and problems == []
    same = {name.rpartition("/")[2]: clip for name, clip in clips_of((clips, [])).items()}
    folder = clips_of(read.read_clips(three[0]))
    assert {n: dataclasses.replace(c, name=n) for n, c in same.items()} == folder
    for clip in clips:
        assert clip.path.read() == (three[0] / clip.name.rpartition("/")[2]).read_bytes()
    (cells.parent / "README.md").write_text("cards lie beside the tables of a hub")
    of_folder = read.read_clips(cells.parent)
    assert of_folder[0] == clips and [p.file for p in of_folder[1]] == ["README.md"]


@pytest.mark.parametrize(
    "kind",
    ["bytes", "large", "another name", "categories", "odd", "among paths", "small", "big"],
)
def test_cells_are_read_as_programs_write_them(folder, kind, monkeypatch):
    film, picture = (folder / "a.mp4").read_bytes(), (folder / "b.png").read_bytes()
    made = {
        "bytes": {"image": [picture, film], "text": ["blue", "red"]},
        "large": {"Video": pyarrow.array([picture, film], pyarrow.large_binary())},
        "another name": {"mp4": [picture, film], "id": ["one", "two"]},
        "categories": {"image": pyarrow.array([picture, film]).dictionary_encode()},
        "odd": {"image": [{"bytes": x, "path": "../a\0b"} for x in (picture, film)]},
        "among paths": {"file_name": ["b", "a.mp4"], "image": [{"bytes": picture}, None]},
        "small": {"file": [{"bytes": picture, "path": None}, {"bytes": None, "path": "a.mp4"}]},
        "big": {"video": [{"path": "x/b.png", "bytes": picture}, {"bytes": film}]},
    }[kind]
    if kind == "big":
        monkeypatch.setattr("easyanimate_jax.data.cells.KEPT_BYTES", 1)
    table = pyarrow.table({"txt" if kind == "another name" else "text": ["blue", "red"]} | made)
    pyarrow.parquet.write_table(table, folder / "t.parquet", compression="zstd")
    (b, a), problems = read.read_clips(folder / "t.parquet")
    assert (b.captions, a.captions, problems) == (("blue",), ("red",), [])
    assert (b.kind, b.height, b.width, a.kind, a.num_frames) == ("image", 20, 30, "video", 5)
    assert a.name == ("a.mp4" if kind in ("among paths", "small") else "t/00000001")
    assert b.name == "t/00000000" + {"among paths": "/b", "big": "/b.png"}.get(kind, "")


def test_a_table_whose_cells_changed_is_named(folder, monkeypatch):
    def write(*files):
        table = pyarrow.table({"image": list(files), "text": ["a"] * len(files)})
        pyarrow.parquet.write_table(table, folder / "t.parquet")

    picture = (folder / "b.png").read_bytes()
    write(picture, picture)
    clip = read.read_clips(folder / "t.parquet")[0][1]
    write(picture)
    with pytest.raises(ValueError, match=r"t\.parquet: row 1 of group 0 does not read"):
        media.probe(clip.path)
    write(picture, None)
    with pytest.raises(ValueError, match="row 1 of group 0 is empty; the table was changed"):
        clip.path.read()
    (folder / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="does not read"):
        clip.path.read()
    write(picture, picture)
    monkeypatch.setattr("easyanimate_jax.data.cells.MOST_BYTES", 9)
    with pytest.raises(ValueError, match=r"row group 0 holds .* smaller row_group_size"):
        read.read_clips(folder / "t.parquet")


def test_a_folder_of_tables_says_which_it_cannot_take(folder, tmp_path_factory):
    place, out = tmp_path_factory.mktemp("tables"), tmp_path_factory.mktemp("blobs")
    table = pyarrow.table({"image": [(folder / "b.png").read_bytes()], "text": ["a"]})
    for name in ("one", "two"):
        pyarrow.parquet.write_table(table, out / name)
        (place / f"{name}.parquet").symlink_to(out / name)
    with pytest.raises(ValueError, match=r"one.parquet' leaves the data folder .*\(--links\)"):
        read.read_clips(place)
    clips, _ = read.read_clips(place, out)
    assert [clip.name for clip in clips] == ["one/00000000", "two/00000000"]
    with pytest.raises(ValueError, match=r"holds the table of clips clips\.parquet; name that"):
        write_clips(place, CLIP)
        read.read_clips(place, out)


def test_capital_columns_of_a_parquet_are_read(folder):
    table = pyarrow.table({"Video Path": ["a.mp4"], "Caption": [["red", "rot"]]})
    pyarrow.parquet.write_table(table, folder / "t.parquet")
    ((clip,), problems) = read.read_clips(folder / "t.parquet")
    assert clip.captions == ("red", "rot") and problems == []


def test_every_file_of_a_folder_is_a_clip_or_a_problem(folder):
    """c.mp4 is a page, d.wmv and e.mpg are not read, b.png has no text, f.txt has no film."""
    (folder / "a.txt").write_text("red", encoding="utf-16")
    for name in ("c.txt", "d.txt", "d.wmv", "e.mpg", "f.txt", ".hidden"):
        (folder / name).write_text("x")
    (folder / "deep").mkdir()
    for i in range(30):
        (folder / "deep" / f"{i}.srt").write_text("x")
    ((clip,), problems) = read.read_clips(folder)
    assert (clip.name, clip.captions) == ("a.mp4", ("red",))
    found = {p.file: p.reason for p in problems}
    assert found.pop("b.png") == "no text" and "html" in found.pop("c.mp4")
    assert found.pop("f.txt") == "no film or picture has its name"
    assert found.pop("*.srt") == "30 files: files of this kind are not read here"
    assert found == dict.fromkeys(("d.wmv", "e.mpg"), "files of this kind are not read here")


def test_every_member_of_a_tar_and_file_beside_it_is_a_clip_or_a_problem(folder):
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name in ("a.mp4", "b.wmv", "lost.txt", "a.txt", *(f"{i}.npy" for i in range(30))):
            if not (folder / name).exists():
                (folder / name).write_text("x")
            tar.add(folder / name, name)
            if name != "a.mp4":
                (folder / name).unlink()
    ((clip,), problems) = read.read_clips(folder)
    assert (clip.name, clip.captions) == ("a.mp4", ("x",))
    found = {p.file: p.reason for p in problems}
    assert found["*.npy"].startswith("30 files: ") and "no film" in found["lost.*"]
    assert {*found} == {"*.npy", "lost.*", "b.wmv", "a.mp4", "b.png", "c.mp4"}  # three lie beside


CLIP = {
    "clip": "a.mp4#1-4",
    "file": "a.mp4",
    "kind": "video",
    "first": 1,
    "frames": 3,
    "fps": 8.0,
    "height": 32,
    "width": 48,
    "captions": ["red"],
    "left_out": "",
    "quality": 0.5,
    "film_frames": 5,
}


def write_clips(folder, *rows, schema=None, root=b"."):
    """A table of clips as other programs write it: types follow from the values."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    table = pyarrow.table({n: pyarrow.array(v, from_pandas=True) for n, v in columns.items()})
    table = table.replace_schema_metadata({b"root": root} if root else None)
    pyarrow.parquet.write_table(table, folder / "clips.parquet")
    return folder / "clips.parquet"


NAN = float("nan")
EDITS = [  # of the second of three rows
    ({"first": None}, "first is None; use a whole number of 0 or more"),
    ({"first": -1}, "first is -1; use a whole number of 0 or more"),
    ({"first": 1.5}, "first is 1.5; use a whole"),
    ({"frames": 0}, "frames is 0; use a whole number of 1 or more"),
    ({"fps": NAN}, "fps is None; use a number of 0 or more"),
    ({"fps": 0.0}, "fps is 0; give the rate"),
    ({"fps": float("inf")}, "fps is inf"),
    ({"height": None}, "height is None"),
    ({"clip": None}, "clip is None; write a text"),
    ({"clip": "a.mp4#1-4"}, "clip has the name of row 0; give it a name of its own"),
    ({"kind": "Video"}, "kind is 'Video'; use one of image, video"),
    ({"file": "../a.mp4"}, "file: file name '../a.mp4' leaves the data folder"),
    ({"quality": 7.0}, "quality is 7.0; use 0 to 1"),
    ({"first": 3}, "first and frames end at 6; the film has 5 frames"),
    ({"captions": [None]}, "captions: no text"),
    ({"captions": ["a", " "]}, "captions: no text"),
]


@pytest.mark.parametrize(("edit", "reason"), EDITS)
def test_a_clip_that_was_edited_badly_is_named_by_row_and_column(folder, edit, reason):
    rows = [CLIP, CLIP | {"clip": "second"} | edit, CLIP | {"clip": "third"}]
    path = write_clips(folder, *rows)
    found, problems = read.read_clips(path)
    assert [clip.name for clip in found] == ["a.mp4#1-4", "third"]
    assert found[1].first == 1 and type(found[1].first) is int
    ((row, _, told),) = problems
    assert row == 1 and type(row) is int and told.startswith(reason)  # it is written as JSON
    if not {"file", "captions"} & {*edit}:  # nor does the plan read `first`
        kept = [b"a.mp4#1-4", *([b"second"] if "first" in edit else []), b"third"]
        assert read.table(path)["clip"].tolist() == kept


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"frames": "3"}, "frames is '3'; write a number, not string"),
        ({"fps": True}, "fps is True; write a number, not bool"),
        ({"captions": [1]}, "captions is .*; write a list of texts, not list<"),
        ({"kind": 1}, "kind is 1; write a text, not int64"),
    ],
)
def test_a_column_of_another_type_is_named(folder, edit, reason):
    with pytest.raises(ValueError, match=f"no clip that is captioned[^$]*row 0 .*{reason}"):
        read.read_clips(write_clips(folder, CLIP | edit))


def test_what_pandas_makes_of_a_table_is_read_right(folder):
    """Whole numbers as floats, one text as the captions, categories, a reason that is NaN."""
    added = {"clip": "b", "captions": "blau", "first": 2.0, "quality": NAN, "left_out": None}
    whole = CLIP | {"captions": "red", "first": 1.0}
    path = write_clips(folder, whole, CLIP | added, whole | {"clip": "c", "left_out": "dark"})
    table = pyarrow.parquet.read_table(path)
    kinds = table["kind"].dictionary_encode()
    table = table.set_column(table.column_names.index("kind"), "kind", kinds)
    pyarrow.parquet.write_table(table, path)
    (a, b), problems = read.read_clips(path)
    assert problems == [] and (a.first, b.first, a.captions, b.captions) == (
        1,
        2,
        ("red",),
        ("blau",),
    )
    assert (a.kind, a.quality, b.quality) == ("video", 0.5, 0.0)
    nothing = CLIP | {"left_out": NAN}
    assert len(read.read_clips(write_clips(folder, nothing))[0]) == 1


def test_a_table_that_lost_its_columns_or_its_root_is_refused(folder):
    lacking = {name: value for name, value in CLIP.items() if name != "fps"}
    with pytest.raises(ValueError, match="a table of clips without the columns fps"):
        read.read_clips(write_clips(folder, lacking))
    with pytest.raises(ValueError, match="left_out is of type int64; write the reason"):
        read.read_clips(write_clips(folder, CLIP | {"left_out": 1}))
    (folder / "table").mkdir()
    with pytest.raises(ValueError, match=r"has lost its metadata `root`.* move the table"):
        read.read_clips(write_clips(folder / "table", CLIP, root=None))
    assert len(read.read_clips(write_clips(folder, CLIP, root=None))[0]) == 1
    assert len(read.read_clips(write_clips(folder / "table", CLIP, root=b".."))[0]) == 1
