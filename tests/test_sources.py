"""The metadata file: rows become clips, bad rows become a list."""

import json

import numpy as np
import pytest

from easyanimate_jax.data import media, sources


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
    (a, b), problems = sources.read_folder(folder)
    assert (a.name, a.kind, a.captions) == ("a.mp4", "video", ("red", "红"))
    assert (a.num_frames, a.height, a.width, a.fps) == (5, 32, 48, 8.0)
    assert (b.kind, b.num_frames, b.height, b.width) == ("image", 1, 20, 30)
    assert problems == []


def test_csv_says_the_same_as_json(folder):
    rows = [("a.mp4", "red, fast", "video"), ("b.png", "蓝", "image")]
    describe(folder, *rows)
    from_json = sources.read_folder(folder)
    (folder / "metadata.json").unlink()
    table = "file_path,text,type\n" + "".join(f'{f},"{t}",{k}\n' for f, t, k in rows)
    (folder / "metadata.csv").write_text(table, encoding="utf-8-sig")
    assert sources.read_folder(folder) == from_json


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
    clips, problems = sources.read_folder(folder)
    assert [clip.name for clip in clips] == ["a.mp4"] and clips[0].captions == ("fine",)
    assert [p.row for p in problems] == [1, 2, 3, 4, 5, 6, 7]
    for problem, reason in zip(
        problems, ("image", "no text", "html", "leaves", "No such", "sound", "no file"), strict=True
    ):
        assert reason in problem.reason


def test_a_folder_without_a_usable_clip_raises(folder):
    describe(folder, ("c.mp4", "not a video", "video"))
    with pytest.raises(ValueError, match=r"no usable clip[\s\S]*c\.mp4"):
        sources.read_folder(folder)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]"])
def test_a_broken_metadata_file_is_named(folder, text):
    (folder / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match=r"metadata\.json"):
        sources.read_folder(folder)


def test_a_missing_metadata_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither metadata"):
        sources.read_folder(tmp_path)
