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
        text = types.SimpleNamespace(encode=encode)
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
    (tmp_path / "m.toml").write_text('films = "gs://bucket/films"')
    with pytest.raises(ValueError, match=r"m.toml: films: .*gs:// is not supported"):
        read.read_clips(tmp_path / "m.toml")
