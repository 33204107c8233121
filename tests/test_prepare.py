"""Files become records: right latents, all captions, honest draws, resumable, nothing silent."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import flax.nnx as nnx
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from disk import files_of_at_most
from PIL import Image
from synthetic_films import X264, encode, make_films, steady
from test_sources import ODD, odd

from easyanimate_jax.commands import parse
from easyanimate_jax.commands import prepare as command
from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget, Shape
from easyanimate_jax.data.records import LatentSet, Records, read_texts
from easyanimate_jax.data.sources import clip_table, places
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.models.mmdit import patchify
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.prepare import clips, device, reader, sets
from easyanimate_jax.prepare import curate as curation
from easyanimate_jax.prepare.encode import Encoder
from easyanimate_jax.prepare.jobs import select
from easyanimate_jax.prepare.prepare import make_sets, plan_sets, prepare
from easyanimate_jax.prepare.sets import SetMaker
from easyanimate_jax.weights.identity import fingerprint

SET = LatentSet("small", Budget(12, (4, 12), (32,), frames=9), condition_draws=3)
PROMPTS = ("a prompt",)


class FakeText:
    """States that tell their prompt's length; counts the prompts it was asked for."""

    def __init__(self):
        self.asked, self.calls = [], []

    def encode(self, prompts):
        self.calls.append(len(prompts))
        self.asked += [p for p in prompts if p]
        size = np.array([len(p) for p in prompts], np.float32)[:, None, None]
        return np.tile(size, (1, 3, 4)), np.tile(size, (1, 5, 2))

    def is_cut(self, prompt):
        return len(prompt) > 100


def tiny_vae():
    config = VAEConfig(
        channels=(8, 8, 8),
        layers=1,
        groups=4,
        unshuffle=4,
        latent_mean=(0.1,) * 16,
        latent_scale=tuple(0.5 + 0.1 * i for i in range(16)),
        dtype="float32",
    )
    return CausalVAE(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture
def source(tmp_path):
    folder, rng = tmp_path / "source", np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for i in range(5):
        frames = np.repeat(rng.integers(20, 255, (9, 5, 5, 3), np.uint8), 8, 1).repeat(8, 2)
        media.write_video(folder / f"{i}.mp4", frames)
        rows += [{"file_path": f"{i}.mp4", "text": t, "type": "video"} for t in (f"clip {i}", "片")]
    media.write_png(folder / "p.png", rng.integers(0, 255, (40, 40, 3), np.uint8))
    rows.append({"file_path": "p.png", "text": "picture"})
    (folder / "broken.mp4").write_bytes(b"<html>")
    rows.append({"file_path": "broken.mp4", "text": "broken", "type": "video"})
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder


def run(source, vae, text=None, sets=(SET,), **changes):
    options = {"weights": {"vae": "v", "text": "t"}, "shard_size": 2} | changes
    text = text or FakeText()
    prepare(source, source.parent / "out", sets, vae, text, PROMPTS, 0, **options)
    return Records(source.parent / "out" / "small")


def test_records_hold_normalised_latents_of_the_file(source, vae):
    records = run(source, vae)
    assert sorted(records.index["clip"]) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4", "p.png"]
    i = list(records.index["clip"]).index("3.mp4")
    video = media.read_clip(source / "3.mp4", 0, 9, 1, (32, 32))[None] / 127.5 - 1
    mean, logvar = jax.jit(lambda vae, x: vae.encode(x))(vae, video.astype(np.float32))
    latents = patchify(vae.normalize(mean))[0]
    np.testing.assert_allclose(records[i]["mean"], latents, atol=5e-3)
    scale = jax.numpy.array(vae.config.latent_scale).reshape(1, 1, 1, 1, 16)
    np.testing.assert_allclose(
        np.exp(records[i]["logvar"].astype(np.float32) / 2),
        patchify(jax.numpy.exp(logvar / 2) * scale)[0],
        rtol=1e-2,
    )
    assert records.index["tokens"][i] == len(latents) == 12
    assert records.index["num_captions"][i] == 2 and records.index["source_height"][i] == 40


def test_a_picture_is_one_latent_frame(source, vae):
    records = run(source, vae)
    i = list(records.index["kind"]).index("image")
    assert (records.index["frames"][i], records.index["T"][i]) == (1, 1)
    assert records[i]["mean"].shape == (4, 64)


def test_every_caption_is_kept_and_encoded_once(source, vae):
    text = FakeText()
    records = run(source, vae, text, shard_size=8)
    i = list(records.index["clip"]).index("2.mp4")
    assert records[i]["text0"].shape == (2, 3, 4) and records[i]["text1"].shape == (2, 5, 2)
    np.testing.assert_array_equal(records[i]["text0"][:, 0, 0], [len("clip 2"), len("片")])
    assert sorted(text.asked) == sorted(
        [*PROMPTS, "片", "picture", *(f"clip {i}" for i in range(5))]
    )
    assert text.calls == [1, 1, 7]  # the empty prompt, PROMPTS, all captions of the only shard
    out = source.parent / "out"
    assert [t.shape for t in read_texts(out / "empty.safetensors")] == [(1, 3, 4), (1, 5, 2)]
    assert read_texts(out / "prompts.safetensors")[0][0, 0, 0] == len(PROMPTS[0])


def test_conditions_are_the_encoded_given_pixels(source, vae, monkeypatch):
    monkeypatch.setattr(clips, "random_mask", lambda rng, *s: np.ones((*s, 1), np.float32))
    records = run(source, vae)
    record = records[list(records.index["clip"]).index("0.mp4")]
    black = np.full((1, 9, 32, 32, 3), -1, np.float32)
    mean, _ = jax.jit(lambda vae, x: vae.encode(x))(vae, black)
    unknown = patchify(vae.normalize(mean))[0]
    assert record["condition_mean"].shape == (3, 12, 64)
    np.testing.assert_allclose(record["condition_mean"][1], unknown, atol=5e-3)
    assert record["condition_mask"].shape == (3, 12, 4) and not record["condition_mask"].any()
    flags = np.concatenate([records[i]["condition_flag"] for i in range(len(records))])
    assert set(flags) <= {0, 1} and flags.mean() < 0.5  # 10 % stay


def test_a_given_first_frame_is_marked_and_noised(source, vae, monkeypatch):
    def first_given(rng, frames, height, width):
        mask = np.ones((frames, height, width, 1), np.float32)
        mask[0] = 0
        return mask

    monkeypatch.setattr(clips, "random_mask", first_given)
    records = run(source, vae)
    record = records[list(records.index["clip"]).index("0.mp4")]
    mask = record["condition_mask"][0].reshape(3, 4, 4)
    np.testing.assert_allclose(mask[0], 0.7125, atol=1e-3)
    assert not mask[1:].any()
    assert record["condition_flag"].all()
    first, second = record["condition_mean"][:2]
    assert not np.array_equal(first, second)  # the noise differs between draws


def test_on_a_cpu_a_large_clip_is_encoded_alone(vae):
    encoder = Encoder(vae, jax.local_devices()[:1], most=16, announce=print)
    assert encoder.rows(Shape(9, 256, 256)) == 1
    assert encoder.rows(Shape(1, 64, 64)) == 16


def test_a_second_run_encodes_nothing_and_a_lost_shard_comes_back_equal(source, vae):
    before = run(source, vae)
    kept = [before[i] for i in range(len(before))]
    text = FakeText()
    run(source, vae, text)
    assert text.asked == list(PROMPTS)
    shards = sorted((source.parent / "out" / "small").rglob("*.shard"))
    assert len(shards) == 3
    shards[1].unlink()
    after = run(source, vae)
    for i, record in enumerate(kept):
        for name in record:
            np.testing.assert_array_equal(record[name], after[i][name])


def test_parts_of_the_work_make_the_same_set_in_any_order(source, vae):
    run(source, vae)
    shutil.move(source.parent / "out", source.parent / "alone")
    alone = Records(source.parent / "alone" / "small")
    options = {"weights": {"vae": "v", "text": "t"}, "shard_size": 2}

    def work(part):
        text = FakeText()
        out = source.parent / "out"
        whole = prepare(source, out, (SET,), vae, text, PROMPTS, 0, part=(part, 3), **options)
        return whole, text.asked

    (first, _), (second, _), (last, asked) = work(2), work(0), work(1)
    assert (first, second, last) == (False, False, True)
    assert len([prompt for prompt in asked if prompt not in PROMPTS]) <= 3  # its own shard's
    together = Records(source.parent / "out" / "small")
    assert together.header == alone.header
    shards = [sorted(p.name for p in r.folder.rglob("*.shard")) for r in (alone, together)]
    assert shards[0] == shards[1] and len(shards[0]) == 3
    for i in range(len(alone)):
        for name, value in alone[i].items():
            np.testing.assert_array_equal(together[i][name], value)
    assert len((source.parent / "out" / "quarantine.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("part", ["", "3", "3/3", "a/b", "-1/2"])
def test_a_part_that_is_none_is_refused(part, capsys):
    assert command.main(["configs/demo.py", "--part", part]) == 2
    assert "as in 0/8 to 7/8" in capsys.readouterr().err


def test_other_weights_or_sources_are_not_mixed_in(source, vae):
    run(source, vae)
    with pytest.raises(ValueError, match="another weights"):
        run(source, vae, weights={"vae": "other", "text": "t"})


def test_unreadable_files_are_skipped_with_a_reason(source, vae):
    data = (source / "4.mp4").read_bytes()
    (source / "4.mp4").write_bytes(data[:-200])  # the header stays, the last frames go
    at = data.index(b"mdat")
    (source / "4.mp4").write_bytes(data[: at + 600] + bytes(len(data) - at - 600 - 1))
    records = run(source, vae)
    left_out = (source.parent / "out" / "quarantine.jsonl").read_text()
    assert "broken.mp4" in left_out and "4.mp4" in left_out
    assert "4.mp4" not in records.index["clip"]


def test_a_shard_may_lose_all_its_clips(source, vae, monkeypatch):
    read = reader.read_pixels

    def bad(job, *rngs):
        if job.clip.name == "1.mp4":
            raise ValueError("bad")
        return read(job, *rngs)

    monkeypatch.setattr(reader, "read_pixels", bad)
    records = run(source, vae, shard_size=1)
    assert sorted(records.index["clip"]) == ["0.mp4", "2.mp4", "3.mp4", "4.mp4", "p.png"]
    assert records[4]["text0"].shape[1:] == (3, 4)


def test_too_many_unreadable_clips_stop_the_run(source, vae, monkeypatch):
    def bad(job, *rngs):
        raise ValueError(f"{job.clip.name} is bad")

    monkeypatch.setattr(reader, "read_pixels", bad)
    with pytest.raises(ValueError, match=r"2 of 6 clips cannot be read"):
        run(source, vae)


def test_fast_films_are_read_at_eight_frames_a_second(source, vae):
    media.write_video(source / "film.mp4", np.zeros((40, 40, 40, 3), np.uint8), fps=24)
    rows = [{"file_path": "film.mp4", "text": "film", "type": "video"}]
    (source / "metadata.json").write_text(json.dumps(rows))
    (clip,), _ = read_clips(source)
    (job,) = select(SET, [clip], seed=0)
    assert job.stride == 0 and job.shape.frames == 9
    assert 0 <= job.start <= (40 - 1) / 24 - 8 / 8


def test_clips_that_a_set_leaves_out_are_counted_by_reason(source, caplog):
    clips, _ = read_clips(source)
    clips = [dataclasses.replace(c, quality=1.0) for c in clips if c.kind == "video"]
    caplog.set_level("INFO")
    select(SET, clips, seed=0)
    assert not caplog.records
    clip = clips[0]
    odd = [
        dataclasses.replace(clip, num_frames=6),
        dataclasses.replace(clip, height=4, width=4),
    ]
    wanted = dataclasses.replace(SET, min_quality=0.5, kinds=("video",))
    given = [
        *clips,
        *odd,
        dataclasses.replace(clip, kind="image"),
        dataclasses.replace(clip, quality=0.1),
    ]
    jobs = select(wanted, given, seed=0)
    assert [record.message for record in caplog.records] == [
        f"set 'small': {len(jobs)} of {len(given)} clips; left out: "
        "1 that fills no token length to 0.8 (min_fill); "
        "1 that is smaller than every size of the stage, even enlarged by 1.25; "
        "1 of kind image; 1 of quality below 0.5"
    ]


def test_captions_that_are_cut_are_counted_and_named_once(source, vae, caplog):
    rows = json.loads((source / "metadata.json").read_text())
    long = "a long caption " * 20
    rows[0]["text"] = rows[4]["text"] = long  # of 0.mp4 and 2.mp4
    (source / "metadata.json").write_text(json.dumps(rows))
    run(source, vae)
    told = [record.message for record in caplog.records if "too long" in record.message]
    assert len(told) == 1 and told[0].startswith("2 of 12 captions are too long for a text encod")
    assert "read their end: 0.mp4, 2.mp4. " in told[0]
    lines = (source.parent / "out" / "cut.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": name, "caption": long} for name in ("0.mp4", "2.mp4")
    ]
    caplog.clear()
    run(source, vae)  # nothing is encoded again
    assert "too long" not in caplog.text
    assert len((source.parent / "out" / "cut.jsonl").read_text().splitlines()) == 2
    rows[0]["text"] = "short"
    (source / "metadata.json").write_text(json.dumps(rows))
    run(source, vae)
    (line,) = (source.parent / "out" / "cut.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "2.mp4"


def test_sample_prompts_and_clips_of_pixel_sets_may_be_cut_too(source, vae, caplog, monkeypatch):
    monkeypatch.setattr(FakeText, "is_cut", lambda self, prompt: len(prompt) > 5)
    run(source, vae, sets=(dataclasses.replace(SET, pixels=True, condition_draws=0),))
    assert "7 of 12 captions are too long" in caplog.text  # a prompt, five clips, a picture
    assert ": sample prompt, " in caplog.text and "p.png" in caplog.text


def test_a_set_that_no_clip_fits_is_named(source, vae):
    with pytest.raises(ValueError, match=r"'small'.*none of 6"):
        run(source, vae, sets=(LatentSet("small", SET.budget, min_side=1000),))


def test_a_fingerprint_follows_names_and_contents(tmp_path):
    (tmp_path / "config.json").write_text("1")
    one = fingerprint(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("what training leaves does not count")
    assert fingerprint(tmp_path) == one
    (tmp_path / "config.json").write_text("2")
    assert fingerprint(tmp_path) != one


ONE = {"kind": "image", "first": 0, "frames": 1, "fps": 0.0, "height": 40, "width": 40}
ONE |= {"captions": ["text"]}
PICTURES = LatentSet("small", Budget(4, (4,), (32,), frames=1), kinds=("image",))


def picture(path, seed):
    """Of the same bytes in number whatever the seed, and of the same date."""
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    os.utime(path, (1e9, 1e9))


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A source of six pictures; the names that are decoded are noted."""
    folder, read = tmp_path / "source", reader.read_pixels
    folder.mkdir()
    for i in range(6):
        picture(folder / f"{i}.tif", i)
    describe_pictures(folder, range(6))
    decoded = []
    monkeypatch.setattr(
        reader,
        "read_pixels",
        lambda job, *r: decoded.append(job.clip.name) or read(job, *r),
    )
    return folder, decoded


def describe_pictures(folder, numbers, **captions):
    rows = [{"file_path": f"{i}.tif", "text": captions.get(f"p{i}", f"text {i}")} for i in numbers]
    (folder / "metadata.json").write_text(json.dumps(rows))


def contents(records):
    return {records.index["clip"][i]: records[i] for i in range(len(records))}


def check_change(source, vae, decoded, change, made, told=(), **options):
    """Prepare, change the source, and prepare again: what was decoded, and which texts encoded.

    What is kept has its bits; the whole is what a new folder gets.
    """
    before = contents(run(source, vae, **options))
    change()
    decoded.clear()
    text = FakeText()
    after = run(source, vae, text, **options)
    assert sorted(decoded) == sorted(made) and set(text.asked) == {*PROMPTS, *told}
    header, after = after.header, contents(after)
    for name, record in after.items():
        if name not in made and name in before:
            for field in ("mean", "logvar"):
                np.testing.assert_array_equal(record[field], before[name][field])
    shutil.rmtree(source.parent / "out")
    fresh = run(source, vae, **options)
    assert fresh.header == header
    for clip, record in contents(fresh).items():
        assert record.keys() == after[clip].keys()
        for name, value in record.items():
            np.testing.assert_array_equal(after[clip][name], value)
    return before, after


def test_a_film_of_the_same_size_and_date_is_made_again_and_no_other(source, vae, monkeypatch):
    """The example: found by its content, not by its name, size or date."""
    decoded, read = [], reader.read_pixels
    monkeypatch.setattr(
        reader,
        "read_pixels",
        lambda job, *r: decoded.append(job.clip.name) or read(job, *r),
    )
    films = dataclasses.replace(SET, kinds=("video",), condition_draws=0)
    run(source, vae, sets=(films,))
    film, other = source / "2.mp4", (source / "3.mp4").read_bytes()
    size, date = film.stat().st_size, film.stat().st_mtime_ns
    room = size - len(other)
    if room < 8:  # the larger file stays, and a "free" box fills the smaller one
        film, other, room = source / "3.mp4", film.read_bytes(), -room
        date = film.stat().st_mtime_ns
    film.write_bytes(other + room.to_bytes(4, "big") + b"free" + bytes(max(0, room - 8)))
    os.utime(film, ns=(date, date))
    decoded.clear()
    records = contents(run(source, vae, sets=(films,)))
    assert decoded == [film.name]
    mine, twin = (records[name]["mean"].astype(np.float32) for name in ("2.mp4", "3.mp4"))
    np.testing.assert_allclose(mine, twin, atol=5e-3)  # both hold the same frames now


def test_the_next_shard_is_decoded_while_one_is_encoded_and_no_later_one(
    pictures, vae, monkeypatch
):
    begun, at_writing = [], []
    ask, write = reader.Threads.__call__, sets.write_shard
    monkeypatch.setattr(reader, "AHEAD", 0)
    monkeypatch.setattr(device.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(
        reader.Threads, "__call__", lambda *asked: begun.extend(asked[-1]) or ask(*asked)
    )
    monkeypatch.setattr(
        sets, "write_shard", lambda *shard: at_writing.append(len(begun)) or write(*shard)
    )
    run(pictures[0], vae, sets=(PICTURES,))
    assert at_writing == [4, 6, 6]


def test_a_picture_that_changed_is_made_again(pictures, vae):
    folder, decoded = pictures
    change = lambda: picture(folder / "1.tif", 99)  # noqa: E731
    before, after = check_change(folder, vae, decoded, change, ["1.tif"], sets=(PICTURES,))
    assert not np.array_equal(before["1.tif"]["mean"], after["1.tif"]["mean"])


def test_captions_that_changed_are_encoded_again_and_no_pixel(pictures, vae):
    folder, decoded = pictures
    change = lambda: describe_pictures(folder, range(6), p4="a longer text")  # noqa: E731
    _, after = check_change(folder, vae, decoded, change, [], ["a longer text"], sets=(PICTURES,))
    assert after["4.tif"]["text0"][0, 0, 0] == len("a longer text")


def test_clips_come_and_go_and_the_others_are_copied(pictures, vae):
    folder, decoded = pictures
    picture(folder / "00.tif", 7)

    def change():
        rows = json.loads((folder / "metadata.json").read_text())
        rows = [{"file_path": "00.tif", "text": "first"}, *rows[:3], *rows[4:]]
        (folder / "metadata.json").write_text(json.dumps(rows))

    _, after = check_change(folder, vae, decoded, change, ["00.tif"], ["first"], sets=(PICTURES,))
    assert sorted(after) == ["0.tif", "00.tif", "1.tif", "2.tif", "4.tif", "5.tif"]


def test_a_shard_of_an_earlier_plan_that_is_lost_is_made_again(pictures, vae):
    folder, decoded = pictures
    describe_pictures(folder, range(3))
    before = contents(run(folder, vae, sets=(PICTURES,)))
    first = set((folder.parent / "out" / "small").rglob("*.shard"))
    describe_pictures(folder, range(6))
    run(folder, vae, sets=(PICTURES,))
    for shard in first:
        shard.unlink()
    decoded.clear()
    records = run(folder, vae, sets=(PICTURES,))
    assert sorted(decoded) == ["0.tif", "1.tif", "2.tif"] and len(records) == 6
    for name, record in before.items():
        np.testing.assert_array_equal(contents(records)[name]["mean"], record["mean"])


def test_a_plan_moves_with_its_source(source, vae, tmp_path):
    weights = {"vae": "v", "text": "t"}
    plan_sets(source, source.parent / "out", (SET,), 0, weights=weights, shard_size=2)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("source", "out"):
        shutil.move(source.parent / name, moved / name)
    assert make_sets(moved / "out", (SET,), vae, FakeText(), PROMPTS, 0, weights=weights)
    assert len(Records(moved / "out" / "small")) == 6


def test_a_clip_keeps_its_name_when_it_is_the_path_of_its_file(pictures, tmp_path):
    """A table of another tool: absolute paths in the column of names."""
    folder, _ = pictures
    columns = {name: [value] * 6 for name, value in ONE.items()}
    columns |= {"clip": [str(folder / f"{i}.tif") for i in range(6)]}
    columns |= {"file": [f"source/{i}.tif" for i in range(6)]}
    schema = pyarrow.schema(clip_table.COLUMNS, metadata={"root": "."})
    table = pyarrow.table(columns, schema)
    pyarrow.parquet.write_table(table, tmp_path / "clips.parquet")
    weights = {"vae": "v", "text": "t"}
    plan_sets(tmp_path / "clips.parquet", tmp_path / "out", (PICTURES,), 0, weights=weights)
    maker = SetMaker(tmp_path / "out" / "small", PICTURES, {"weights": weights, "seed": 0})
    jobs = maker.todo(maker.open(), 0).jobs
    assert [job.clip.name for job in jobs] == columns["clip"]
    assert all(job.clip.path.is_file() for job in jobs)


def test_a_bad_copy_that_became_good_is_tried_again(pictures, vae):
    folder, decoded = pictures
    whole = (folder / "5.tif").read_bytes()
    (folder / "5.tif").write_bytes(whole[:300])  # its header is whole
    quarantine = folder.parent / "out" / "quarantine.jsonl"

    def change():
        assert "5.tif" in quarantine.read_text()
        (folder / "5.tif").write_bytes(whole)

    _, after = check_change(folder, vae, decoded, change, ["5.tif"], sets=(PICTURES,))
    assert "5.tif" in after and not quarantine.exists()


def test_a_control_file_that_changed_is_encoded_again(pictures, vae):
    folder, decoded = pictures
    rows = json.loads((folder / "metadata.json").read_text())
    for i, row in enumerate(rows):
        row["control_file_path"] = f"c{i}.tif"
        picture(folder / f"c{i}.tif", 50 + i)
    (folder / "metadata.json").write_text(json.dumps(rows))

    def change():
        picture(folder / "c2.tif", 99)

    led = dataclasses.replace(PICTURES, control="file")
    before, after = check_change(folder, vae, decoded, change, ["2.tif"], sets=(led,))
    assert not np.array_equal(before["2.tif"]["control_mean"], after["2.tif"]["control_mean"])


def test_a_set_of_an_earlier_version_is_kept_and_named(source, vae):
    run(source, vae, sets=(PICTURES,))
    path = source.parent / "out" / "small" / "identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"jobs": "0"}))
    before = sorted(file.name for file in path.parent.iterdir())
    with pytest.raises(ValueError, match=r"earlier version.*--prepared"):
        run(source, vae, sets=(PICTURES,))
    assert sorted(file.name for file in path.parent.iterdir()) == before


def test_a_refused_set_leaves_the_other_files_as_they_were(source, vae):
    run(source, vae, sets=(PICTURES,))
    out = source.parent / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    others = {"vae": "other", "text": "other"}
    with pytest.raises(ValueError, match="another weights"):
        run(source, vae, sets=(PICTURES,), weights=others)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_odd_names_are_prepared_and_one_that_is_no_text_is_left_out_by_name(tmp_path, vae, capsys):
    """Through the index, the records, the quarantine and the table of `curate`."""
    folder = odd(tmp_path / "source #1 [a] 100%")
    out = tmp_path / "out: a%41?[b]#c"
    sets = PICTURES, dataclasses.replace(PICTURES, name="places: #2 [x]", pixels=True)
    sets = tuple(dataclasses.replace(s, budget=Budget(1, (1,), (16,), frames=1)) for s in sets)
    assert prepare(folder, out, sets, vae, FakeText(), PROMPTS, 0, weights={})
    latents, located = (Records(out / s.name) for s in sets)
    assert set(latents.index["clip"]) == set(located.index["clip"]) == set(ODD)
    for i, name in enumerate(located.index["clip"]):
        clip = places.from_bytes(located[i]["place"], located.folder / located.header["root"])
        assert (clip.name, clip.path) == (name, folder / name)
    (line,) = (out / "quarantine.jsonl").read_text("utf-8").split("\n")[:-1]
    assert json.loads(line)["file"] == r"caf\xe9.png"

    rules = curation.Rules(min_pixels=0)
    made = out / "a: b" / "table" / "clips.parquet"
    curation.curate(folder, made.parent, rules, (), workers=1)
    rows = pyarrow.parquet.read_table(made.open("rb")).to_pylist()
    left_out = {row["clip"]: row["left_out"] for row in rows}
    assert set(ODD) <= set(left_out)
    kept, _ = read_clips(made)
    assert {clip.name for clip in kept} == {n for n, why in left_out.items() if not why}


def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(source, vae, capsys):
    out = source.parent / "out"
    for size in (200, 12_000):  # for the texts, for a shard
        with files_of_at_most(size):
            assert parse.run(lambda: bool(run(source, vae))) == 5
        *_, error = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: {out}") and error.endswith("run the same command again")
        assert not list(out.rglob("*.new")) and not (out / "small" / "header.json").exists()
    records = run(source, vae)
    shutil.rmtree(out)
    for i, whole in enumerate(run(source, vae)):
        for name, value in whole.items():
            np.testing.assert_array_equal(records[i][name], value)


@pytest.mark.slow
def test_a_busy_machine_makes_the_same_records_to_the_byte(tmp_path, vae):
    """Of 20 films, four of which take seconds to decode."""
    source, made_in, rng = tmp_path / "source", tmp_path / "made", np.random.default_rng(0)
    source.mkdir(), made_in.mkdir()
    films = make_films(made_in)
    for path in list(films.values())[::4][:16]:
        shutil.copy(path, source)
    noise = rng.integers(0, 255, (135, 240, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for number in range(4):
        moved = [np.ascontiguousarray(np.roll(noise, 16 * i, axis=1)) for i in range(25)]
        frames, options = [moved[i % 25] for i in range(200)], X264 | {"g": "250"}
        encode(source / f"large{number}.mp4", steady(200, 24), frames=frames, options=options)
    for path in list(source.iterdir()):
        path.with_suffix(".txt").write_text(path.name)
    latents = LatentSet("small", Budget(24, (24,), (48,), frames=9), condition_draws=3)
    made = []
    for load in (0, 8):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
        out = tmp_path / f"load{load}"
        try:
            weights = {"vae": "v", "text": "t"}
            prepare(source, out, (latents,), vae, FakeText(), PROMPTS, 0, weights=weights)
        finally:
            for process in busy:
                process.kill()
        files = sorted(path for path in (out / "small").rglob("*") if path.is_file())
        assert len(Records(out / "small")) == 20
        made.append({path.relative_to(out): path.read_bytes() for path in files})
    assert made[0].keys() == made[1].keys() and any("shard" in path.name for path in made[0])
    assert [str(name) for name in made[0] if made[0][name] != made[1][name]] == []
