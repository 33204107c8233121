"""Films become a table of clips: cut where they are cut, scored, and nothing left out silently."""

import base64
import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, ImageDraw

from easyanimate_jax.commands import curate as command
from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.decode import Decoders
from easyanimate_jax.data.plan.report import choose
from easyanimate_jax.data.records import LatentSet, Records
from easyanimate_jax.data.sources import read
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.prepare import curate as curation
from easyanimate_jax.prepare import films as making
from easyanimate_jax.prepare import scores
from easyanimate_jax.prepare.captions import RewritingServer, Server
from easyanimate_jax.prepare.clip_rows import LARGE, SMALL, film_rows
from easyanimate_jax.prepare.embeddings import AlignmentServer, Embedding
from easyanimate_jax.prepare.film_folder import Film, FilmFolder
from easyanimate_jax.prepare.films import Films, Rules
from easyanimate_jax.prepare.jobs import select
from easyanimate_jax.prepare.judge import Judge
from easyanimate_jax.prepare.model_steps import ORIGINAL, VECTOR, Models, ModelSteps
from easyanimate_jax.prepare.scores import Score
from easyanimate_jax.prepare.shots import Span, Splitting, find_cuts, split

ROOT = Path(__file__).parent.parent
RULES = Rules(Splitting(min_seconds=2.5), min_pixels=64 * 64)
NONE = ModelSteps(Models(), (), 0)


def curate(source, out, *args, **more):
    """The rows of the table that `curate` writes, without what they lack."""
    if curation.curate(source, out, *args, **more) is None:
        return None
    table = pyarrow.parquet.read_table(Path(out) / "clips.parquet").to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in table]


def scene(seed, frames, height=64, width=96, speed=2):
    """Smooth coloured noise that moves to the right."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    picture = coarse.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, speed * i, 1) for i in range(frames)])


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    shots = [scene(0, 24), scene(1, 32), scene(2, 16), scene(3, 24)]
    media.write_video(folder / "four.mp4", np.concatenate(shots))
    media.write_video(folder / "again.mp4", scene(0, 20))
    media.write_video(folder / "grey.mp4", np.full((24, 64, 96, 3), 128, np.uint8))
    media.write_video(folder / "tiny.mp4", scene(5, 24, 32, 32))
    media.write_png(folder / "still.png", scene(6, 1)[0])
    (folder / "page.mp4").write_bytes(b"<html>")
    rows = [
        {"file_path": p.name, "text": p.stem, "type": "image" if p.suffix == ".png" else "video"}
        for p in sorted(folder.iterdir())
        if p.name != "page.mp4"
    ]
    return folder, rows


@pytest.fixture(scope="module")
def table(films, tmp_path_factory):
    folder, _ = films
    out = tmp_path_factory.mktemp("out")
    steady = dataclasses.replace(scores.SCORES[0], better=0)  # the clips differ too little in it
    loud = Score("loud", lambda frames, scale: float(frames.mean()), low=1.0)
    rows = curate(
        folder,
        out,
        RULES,
        [steady, scores.SCORES[1], loud],
        Models(lambda stills: ["told"]),
        workers=1,
    )
    return out, rows


def test_a_film_is_cut_where_it_is_cut(films):
    folder, _ = films
    assert find_cuts(media.read_clip(folder / "four.mp4", 0, 96), 8.0) == [24, 56, 72]


@pytest.fixture
def worker():
    decoders = Decoders(1)
    yield decoders
    decoders.close()


def test_a_film_is_scored_frame_by_frame_as_from_all_of_its_frames(films, worker):
    """Cuts, hashes and scores to the bit, also of clips that begin between frames of motion."""
    folder, rules = FilmFolder(films[0], None), Splitting(0.8, 1.1)
    whole = media.read_clip(films[0] / "four.mp4", 0, 96, 1, media.fit_side(64, 96, SMALL))
    spans, short = split(96, find_cuts(whole, 8.0), 8.0, rules)
    rows, _ = film_rows(worker, folder, "four.mp4", rules, scores.SCORES, NONE)
    assert [(r["first"], r["first"] + r["frames"]) for r in rows] == [*short, *spans]
    assert len(short) == 1 and len(spans) == 11 and any(span.first % 4 for span in spans)
    for span, row in zip(spans, rows[1:], strict=True):
        stills = [span.first, (span.first + span.end - 1) // 2, span.end - 1]
        frames = media.read_frames(films[0] / "four.mp4", stills, LARGE)
        assert row["hash"] == scores.picture_hash(frames[1])
        moving = whole[span.first : span.end : 4], 96 / SMALL
        for score in scores.SCORES:
            given = (frames, 1.0) if score.frames == "still" else moving
            assert row[score.name] == score.measure(*given)


def test_a_film_is_never_whole_in_memory(tmp_path, worker):
    frames, score = (
        scene(0, 300, 120, 160),
        Score("mean", lambda frames, _: float(frames.mean()), "motion"),
    )
    media.write_video(tmp_path / "long.mp4", frames)
    folder = FilmFolder(tmp_path, None)
    worker.probe(tmp_path / "long.mp4")
    tracemalloc.start()
    rows, _ = film_rows(worker, folder, "long.mp4", Splitting(1.0, 2.0), [score], NONE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = 300 * 120 * 160 * 3  # bytes of all small frames
    assert len(rows) == 19 and rows[-1]["mean"] > 0 and peak < whole / 2


def test_a_score_that_fails_ends_the_run_and_not_only_its_film(films, tmp_path):
    def measure(frames, scale):
        raise ZeroDivisionError("of the score")

    with pytest.raises(ZeroDivisionError, match="of the score"):
        curate(films[0], tmp_path, RULES, [Score("bad", measure)], workers=1)


def test_a_film_that_breaks_off_has_one_row(films, tmp_path, worker):
    """Its first clips do decode."""
    whole = (films[0] / "four.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    rules, folder = Splitting(0.5, 1.0), FilmFolder(tmp_path, None)
    [row], _ = film_rows(worker, folder, "half.mp4", rules, scores.SCORES, NONE)
    assert row["frames"] == 96 and row["left_out"].startswith("does not decode: ")


def test_spans_follow_the_rules_of_the_reference():
    rules = Splitting()
    kept, short = split(1000, [100, 150, 700], 25.0, rules)
    assert short == [Span(100, 150), Span(650, 700), Span(950, 1000)]
    assert kept == [Span(0, 88), Span(150, 400), Span(400, 650), Span(700, 950)]
    assert split(100, [], 25.0, rules) == ([Span(0, 100)], [])  # a film of one scene is whole
    assert split(50, [], 25.0, rules) == ([], [Span(0, 50)])


def test_every_span_of_every_film_is_a_row_with_its_reason(table):
    _, rows = table
    found = {row["clip"]: row["left_out"] for row in rows}
    assert found.pop("page.mp4").startswith("does not decode: ")
    assert found.pop("four.mp4#56-72") == "shorter than the shortest clip"
    assert found.pop("tiny.mp4#0-24") == "fewer than 4,096 pixels a frame"
    assert found.pop("grey.mp4#0-24") == "colourfulness outside 4 to inf"
    repeated = "near-duplicate of another clip"
    assert [found.pop("again.mp4#0-20"), found.pop("four.mp4#0-20")].count(repeated) == 1
    assert found == {"four.mp4#24-52": "", "four.mp4#72-92": "", "still.png": ""}


def test_the_table_is_a_source_of_clips(table, films):
    out, _ = table
    clips, problems = read_clips(out / "clips.parquet")
    assert problems == []
    by_name = {clip.name: clip for clip in clips}
    clip = by_name["four.mp4#24-52"]
    assert (clip.first, clip.num_frames, clip.captions) == (24, 28, ("told",))
    assert clip.path == (films[0] / "four.mp4").resolve() and len(clips) == 4
    columns = pyarrow.parquet.read_table(out / "clips.parquet")
    assert {"consistency", "colourfulness", "loud", "left_out"} <= set(columns.column_names)


def judged(rows, scored=(), tmp_path=None, embedding=None):
    """The verdict on rows that only tell what the test is about."""
    judge = Judge(0, scored, embedding, tmp_path or Path.cwd())
    base = {"kind": "video", "left_out": "", "captions": ["a"], "height": 1, "width": 1}
    for number, row in enumerate(rows):
        judge.add(base | {"hash": number * 0x9E37_79B9_7F4A_7C15 % 2**64} | row)
    return judge.decide()


def test_the_best_clips_are_those_that_beat_most_others():
    rated = [Score("sharp", max, better=1), Score("text", max, better=-1), Score("motion", max)]
    row = lambda sharp, text, **more: {"sharp": sharp, "text": text, "motion": sharp} | more  # noqa: E731
    rows = [
        row(9.0, 0.0),
        row(1.0, 0.5),
        row(5.0, 0.1),
        row(9.5, 0.0, left_out="why"),
        row(2.0, 0.4),
    ]
    rows += [{"kind": "image", "sharp": 0.1, "text": 0.0}]
    quality = judged(rows, rated).quality
    np.testing.assert_array_equal(quality, [0.75, 0.0, 0.5, np.nan, 0.25, 0.0])


def test_a_set_may_take_the_best_of_a_table(table):
    out, _ = table
    budget = Budget(24, (12, 24), (64,), frames=13, min_fill=0.1)
    clips, _ = read_clips(out / "clips.parquet")
    index = read.table(out / "clips.parquet")
    for least, number in ((0.0, 3), (0.3, 2), (0.6, 1)):
        videos = LatentSet("set", budget, ("video",), min_quality=least)
        names = {job.clip.name for job in select(videos, clips, 0)}
        assert len(names) == number
        chosen, left_out, _ = choose(videos, index)
        assert {name.decode() for name in chosen["clip"]} == names
        assert left_out[f"of quality below {least}"] == 3 - number
    with pytest.raises(ValueError, match="only curation rates clips"):
        select(LatentSet("set", budget, min_quality=0.99), clips, 0)


def test_the_funnel_counts_to_what_is_kept_and_shows_pictures(table):
    out, rows = table
    text = (out / "funnel.txt").read_text()
    assert text.startswith("9 -> 8 -> 7 -> 6 -> 5 -> 4\n") and len(rows) == 9
    assert "4 kept" in text
    page = (out / "funnel.html").read_text()
    assert page.count("<img") >= 8 and "four.mp4#24-52" in page and "<script" not in page


def test_parts_share_the_films_and_a_second_run_does_nothing(films, tmp_path, monkeypatch):
    folder, _ = films
    options = dict(rules=RULES, scores=scores.SCORES[:1], workers=1)
    assert curate(folder, tmp_path, part=(1, 2), **options) is None
    rows = curate(folder, tmp_path, part=(0, 2), **options)
    assert len(rows) == 9 and {row["left_out"] for row in rows} >= {"no caption"}
    monkeypatch.setattr(making, "film_rows", None)  # would fail
    assert curate(folder, tmp_path, part=(0, 2), **options) == rows


def still(path, seed):
    """A picture whose size and date do not depend on the seed."""
    Image.fromarray(scene(seed, 1)[0]).save(path)
    os.utime(path, (1e9, 1e9))


def describe(folder, **captions):
    rows = [{"file_path": f"{name}.tif", "text": text} for name, text in captions.items()]
    (folder / "metadata.json").write_text(json.dumps(rows))


def test_what_changed_is_scored_again_and_nothing_else(tmp_path, monkeypatch):
    """A replaced film, and a bad copy that became good; a new caption alone is no reason."""
    folder, film, scored = tmp_path / "stills", making.film_rows, []
    folder.mkdir()
    for name in "abcd":
        still(folder / f"{name}.tif", ord(name))
    describe(folder, a="a", b="b", c="c", d="d")
    whole = (folder / "b.tif").read_bytes()
    (folder / "b.tif").write_bytes(whole[:300])  # its header is whole
    monkeypatch.setattr(making, "film_rows", lambda *a: scored.append(a[2]) or film(*a))
    options = dict(rules=RULES, scores=scores.SCORES[1:2], workers=1)
    before = {row["clip"]: row for row in curate(folder, tmp_path / "out", **options)}
    still(folder / "a.tif", 99)
    (folder / "b.tif").write_bytes(whole)
    describe(folder, a="a", b="b", c="another", d="d")
    scored.clear()
    after = {row["clip"]: row for row in curate(folder, tmp_path / "out", **options)}
    assert sorted(scored) == ["a.tif", "b.tif"]
    colour = scores.SCORES[1].name
    assert before["a.tif"][colour] != after["a.tif"][colour]
    assert before["b.tif"]["left_out"].startswith("does not decode")
    assert after["b.tif"]["left_out"] == "" and after["c.tif"]["captions"] == ["another"]
    assert before["d.tif"][colour] == after["d.tif"][colour]


def test_another_measure_of_the_same_name_is_another_key(tmp_path):
    (tmp_path / "a.mp4").touch()
    folder = FilmFolder(tmp_path, None)

    def settings(value="1.0", rules=RULES):
        module = tmp_path / f"m{value}.py"
        module.write_text(f"def measure(frames, scale):\n    return {value}\n")
        made = [Score("one", runpy.run_path(str(module))["measure"])]
        return Films(tmp_path, folder, rules, made, NONE).settings

    other = [settings("2.0"), settings(rules=Rules(min_pixels=1))]
    assert settings() == settings() and len({settings(), *other}) == 3


def test_another_model_is_another_key_and_another_address_is_not():
    film = Film(("a",), set())

    def keys(**fields):
        made = {
            kind: dataclasses.replace(
                kind(("http://one",), "model"),
                **{n: v for n, v in fields.items() if n in kind.__dataclass_fields__},
            )
            for kind in (Server, RewritingServer, AlignmentServer)
        }
        score = Score("alignment", made[AlignmentServer], "captioned")
        models = Models(made[Server], made[RewritingServer])
        return ModelSteps(models, [score], 0)._keys(film)

    assert keys() == keys(url=("http://two",), tries=1, seconds=1.0, low=0.5)
    assert not set(keys().values()) & set(keys(model="other").values())
    assert not set(keys().values()) & set(keys(instructions=("Describe it.",)).values())
    written = keys(instruction="Write {caption} anew.")
    assert written["captions"] == keys()["captions"]
    assert not {written["rewritten"], written["alignment"]} & set(keys().values())


MINE = """
from easyanimate_jax.prepare.embeddings import Embedding
from easyanimate_jax.prepare.scores import Score
from more import FACTOR

def measure(frames, scale):
    return FACTOR * frames.mean()

BRIGHT = Score("bright", measure, low={low}, better=1)
TWICE = Score("sharpness", measure)
COLUMN = Score("quality", measure)
TEXT = Score("text", lambda frames, scale: "high")
LOST = Score("lost", lambda frames, scale: float("nan"))
CLIP = Embedding("clip", lambda frames: frames.mean((0, 1, 2)), similarity=0.9)
FLAT = Embedding("flat", lambda frames: 0.5)
WHOLE = Score("whole", lambda frames, captions: 0.5, "captioned")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A function that writes the module of scores `mine`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # and forget what is imported here
    (tmp_path / "more.py").write_text("FACTOR = 1")

    def write(low, end=""):
        sys.modules.pop("mine", None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        (tmp_path / "mine.py").write_text(MINE.format(low=low) + end)

    yield write
    sys.modules.pop("mine", None), sys.modules.pop("more", None)


def records(out):
    """The keys of the films in the store."""
    files = (out / "films").rglob("*.jsonl")
    return [json.loads(line)["film"] for file in files for line in file.read_text().splitlines()]


def test_a_score_of_the_user_has_a_column_and_a_limit(mine, films, tmp_path, monkeypatch):
    mine(1)
    words = [str(films[0]), str(tmp_path / "out"), "--min-seconds", "2.5", "--min-pixels", "0"]
    words += ["--score", "mine:BRIGHT"]
    assert command.main(words) == 0
    made = len(records(tmp_path / "out"))
    table = pyarrow.parquet.read_table(tmp_path / "out" / "clips.parquet").to_pylist()
    by_name = {row["clip"]: row for row in table}
    assert 1 < by_name["four.mp4#24-52"]["bright"] < 255
    mine(300)  # only its limit is another one, but so is its module
    assert command.main(words) == 0
    assert len(records(tmp_path / "out")) == 2 * made
    table = pyarrow.parquet.read_table(tmp_path / "out" / "clips.parquet").to_pylist()
    assert "bright outside 300 to inf" in {row["left_out"] for row in table}


def test_near_duplicates_by_a_vector_of_the_user_are_left_out(mine, films, tmp_path, monkeypatch):
    """All clips of films have similar mean colours; the first of the larger ones stays."""
    mine(1)
    words = [str(films[0]), str(tmp_path / "out"), "--min-seconds", "2.5", "--min-pixels", "0"]
    described = [row | {"text": "told"} for row in films[1]]
    (films[0] / "metadata.json").write_text(json.dumps(described))
    try:
        assert command.main([*words, "--embed", "mine:CLIP"]) == 0
        table = pyarrow.parquet.read_table(tmp_path / "out" / "clips.parquet").to_pylist()
        monkeypatch.setattr(making, "film_rows", None)  # would fail
        assert command.main([*words, "--embed", "mine:CLIP"]) == 0
    finally:
        (films[0] / "metadata.json").unlink()
    kept = [row["kind"] for row in table if not row["left_out"]]
    similar = [row for row in table if row["left_out"] == "similar to another clip by clip"]
    assert sorted(kept) == ["image", "video"] and similar and VECTOR not in table[0]
    text = (tmp_path / "out" / "funnel.txt").read_text()
    assert f"{len(similar)} left out: similar to another clip by clip\n" in text
    server = ["embedder:server", "--embedder.url", "http://u", "--embedder.model", "m"]
    assert command.main([*words, "--embed", "mine:CLIP", *server]) == 2
    assert command.main([*words, "--embed", "mine:FLAT"]) == 2
    assert command.main([*words, "--embed", "mine:BRIGHT"]) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:NONE", "module 'mine' has no attribute 'NONE'"),
        ("mine", "mine is not the MODULE:NAME of a Score; write NAME = Score("),
        ("mine:measure", "mine:measure is not the MODULE:NAME of a Score"),
        ("mine:TWICE", "score sharpness: another score has this name"),
        ("mine:COLUMN", "score quality: a column of the table has this name"),
        ("mine:TEXT", "mine:TEXT returns 'high' for two frames of noise; return a finite number"),
        ("mine:LOST", "mine:LOST returns nan"),
        ("mine:WHOLE", "mine:WHOLE returns 0.5 for two frames of noise; return a list of one fin"),
    ],
)
def test_a_score_that_cannot_be_used_is_refused_before_a_film_is_read(
    mine, films, tmp_path, monkeypatch, capsys, name, message
):
    mine(1)
    monkeypatch.setattr(making, "film_rows", None)  # would fail
    assert command.main([str(films[0]), str(tmp_path / "out"), "--score", name]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "my score"}, "Score.name is 'my score'; use letters"),
        ({"frames": "all"}, "score s: frames is 'all'; use one of 'still', 'motion'"),
        ({"better": 2}, "score s: better is 2; use one of -1, 0, 1"),
        ({"low": 2.0, "high": 1.0}, "score s: low is 2.0 and high is 1.0"),
        ({"low": float("nan")}, "low is nan"),
    ],
)
def test_a_score_has_a_name_a_range_and_known_frames(fields, message):
    with pytest.raises(ValueError, match=message):
        Score(**({"name": "s", "measure": max} | fields))


def test_captions_of_a_source_go_to_its_clips(films, tmp_path):
    folder, described = films
    (folder / "metadata.json").write_text(json.dumps(described))
    try:
        rows = curate(folder, tmp_path, RULES, (), workers=1)
    finally:
        (folder / "metadata.json").unlink()
    assert {tuple(r["captions"]) for r in rows if r["file"] == "four.mp4"} == {("four",)}


@pytest.fixture
def small(tmp_path, films):
    """A folder with a good film, a broken one, and a tar of the good one."""
    folder = tmp_path / "small"
    folder.mkdir()
    shutil.copy(films[0] / "again.mp4", folder / "a.mp4")
    (folder / "broken.mp4").write_bytes(b"<html>")
    return folder


def reasons(source, out):
    rows = curate(source, out, RULES, (), workers=1)
    return {row["file"]: row["left_out"] for row in rows}


def test_every_film_that_a_table_names_has_a_row(small, tmp_path):
    table = [
        {"file_path": "lost.mp4", "text": "a", "type": "video"},
        {"file_path": "broken.mp4", "text": "a", "type": "video"},
        {"file_path": "a.mp4", "text": " ", "type": "video"},
        {"file_path": "../b.mp4", "text": "a", "type": "video"},
        {"file_path": "image.mp4", "text": "a", "type": "image"},
        {"file_path": "caf\udce9.mp4", "text": "a", "type": "video"},
        {"text": "no file"},
        "no object",
    ]
    shutil.copy(small / "a.mp4", small / "image.mp4")
    (small / "metadata.json").write_text(json.dumps(table))
    found = reasons(small, tmp_path / "out")
    assert re.match("does not decode: .*No such file", found.pop("lost.mp4"))
    assert re.match("does not decode: .*html", found.pop("broken.mp4"))
    assert re.match("not used: .*leaves the data folder", found.pop("../b.mp4"))
    assert re.match("not used: .*is not UTF-8; rename the file", found.pop(r"caf\xe9.mp4"))
    assert found.pop("image.mp4") == "not used: type is 'image', but the file holds video"
    assert found.pop("a.mp4") == "no caption" and {*found} == {""}
    text = (tmp_path / "out" / "funnel.txt").read_text()
    assert "5 left out: not used" in text and "2 left out: does not decode" in text


def test_a_film_whose_type_is_corrected_is_scored(small, tmp_path):
    """The type is part of a film's key; its name is relative, however the table gives it."""
    row = {"file_path": str(small / "a.mp4"), "text": "a", "type": "image"}
    (small / "metadata.json").write_text(json.dumps([row]))
    wrong = "not used: type is 'image', but the file holds video"
    assert reasons(small, tmp_path / "out") == {"a.mp4": wrong}
    (small / "metadata.json").write_text(json.dumps([row | {"type": "video"}]))
    assert reasons(small, tmp_path / "out") == {"a.mp4": ""}


def test_every_film_of_a_folder_has_a_row(small, films, tmp_path):
    """Also those without a caption, beside one that has one, and files that are not read."""
    shutil.copy(films[0] / "grey.mp4", small / "b.mp4")
    (small / "a.txt").write_text("red")
    (small / "c.wmv").write_bytes(b"film")
    (small / "d.txt").write_text("lost")
    found = reasons(small, tmp_path / "out")
    assert found.pop("a.mp4") == "" and found.pop("b.mp4") == "no caption"
    assert found.pop("broken.mp4").startswith("does not decode")
    assert found.pop("c.wmv") == "not used: files of this kind are not read here"
    assert found == {"d.txt": "not used: no film or picture has its name"}


def test_a_source_that_holds_no_files_of_films_is_refused(small, table, tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(small / "a.mp4", "a.mp4")
    (tmp_path / "mix.toml").write_text('films = "small"')
    (tmp_path / "empty.json").write_text('[{"text": "a"}]')
    shutil.copy(table[0] / "clips.parquet", tmp_path / "clips.parquet")
    for name, message in (
        ("a.tar", "holds its films inside other files; extract them"),
        ("mix.toml", "is a mixture; curate its sources one by one"),
        ("clips.parquet", "is a table of clips; curate"),
        ("empty.json", "names no film (1 bad rows)"),
    ):
        assert command.main([str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_clip_that_was_moved_after_the_end_of_its_film_is_refused(table, tmp_path):
    rows = pyarrow.parquet.read_table(table[0] / "clips.parquet")
    first = pyarrow.array([10_000, *rows["first"].to_pylist()[1:]])
    kept = pyarrow.array([""] * len(rows))
    for name, column in (("first", first), ("left_out", kept)):
        rows = rows.set_column(rows.column_names.index(name), name, column)
    pyarrow.parquet.write_table(rows, tmp_path / "clips.parquet")
    _, problems = read_clips(tmp_path / "clips.parquet")
    assert problems[0].row == 0 and "first and frames end at 1" in problems[0].reason


def test_the_command_is_typed_by_the_rules(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(curation, "curate", lambda *args, **more: seen.append((args, more)))
    words = [str(tmp_path), "out", "--min-seconds", "1", "--min-pixels", "0"]
    for name, model in (("captioner", "m"), ("rewriter", "r"), ("aligner", "a")):
        words += [f"{name}:server", f"--{name}.url", "http://u", f"--{name}.model", model]
    assert command.main([*words, "--aligner.low", "0.3"]) == 0
    (source, out, rules, used, models), _ = seen[0]
    *built_in, alignment = used
    assert tuple(built_in) == scores.SCORES and alignment.of_captions
    assert (alignment.name, alignment.low, alignment.measure.model) == ("alignment", 0.3, "a")
    assert (source, str(out)) == (tmp_path, "out")
    assert (models.captioner.model, models.rewriter.model) == ("m", "r")
    assert rules == Rules(Splitting(min_seconds=1.0), min_pixels=0)
    monkeypatch.undo()
    assert command.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_of_near_duplicates_of_a_kind_the_largest_stays_then_the_first(tmp_path):
    row = lambda kind, bits, side: {  # noqa: E731
        "kind": kind, "hash": bits, "height": side, "width": side
    }  # fmt: skip
    base = 0x0123_4567_89AB_CDEF
    rows = {
        "small": row("video", base, 1),
        "picture": row("image", base, 1),
        "large": row("video", base ^ 0b11111, 9),
        "as large": row("video", base ^ 0b11, 9),
        "far": row("video", base ^ 0b111111 << 20, 5),
    }
    verdict = judged(rows.values())
    found = [name for name, reason in zip(rows, verdict.reason, strict=True) if reason]
    assert found == ["small", "as large"]
    assert {verdict.reasons[r] for r in verdict.reason} == {"", "near-duplicate of another clip"}
    # By vectors, in the same order; a clip that has none is kept.
    angles = {"small": 0, "picture": 0, "large": 0.2, "as large": 0.3, "far": 2.0}
    for number, (name, angle) in enumerate(angles.items()):
        vector = np.array([np.cos(angle), np.sin(angle)], np.float16)
        other = (number + 9) * 0x9E37_79B9_7F4A_7C15 % 2**64
        rows[name] |= {VECTOR: base64.b64encode(vector.tobytes()).decode(), "hash": other}
    rows["none"] = row("video", 2**63, 9)
    verdict = judged(rows.values(), (), tmp_path, Embedding("turn", max, 0.97))
    found = [name for name, reason in zip(rows, verdict.reason, strict=True) if reason]
    assert found == ["small", "as large"]
    assert verdict.reasons[verdict.reason[0]] == "similar to another clip by turn"
    rows["large"]["left_out"] = "bright"  # a clip that is left out drops no other
    assert not judged(rows.values(), (), tmp_path, Embedding("turn", max, 0.97)).reason.any()
    rows["large"][VECTOR] = base64.b64encode(np.zeros(3, np.float16).tobytes()).decode()
    with pytest.raises(ValueError, match=r"turn gives vectors of 2 and of 3 numbers; return eq"):
        judged(rows.values(), (), tmp_path, Embedding("turn", max))


def test_scores_tell_what_they_are_named_for():
    still, fast = scene(0, 5, speed=0), scene(0, 5, speed=3)
    assert scores.motion(still, 1.0) < 0.05 and 1.5 < scores.motion(fast, 1.0) < 4.5
    assert abs(scores.motion(fast, 2.0) / scores.motion(fast, 1.0) - 2) < 1e-6
    assert scores.consistency(fast, 1.0) > 0.95
    assert scores.consistency(np.concatenate([still[:1], scene(9, 1) // 4]), 1.0) < 0.8
    flat = np.full((1, 64, 96, 3), 90, np.uint8)
    assert scores.colourfulness(flat, 1.0) == 0 < scores.colourfulness(still, 1.0)
    assert scores.sharpness(flat, 1.0) == 0 < scores.sharpness(still, 1.0)
    assert scores.text_area(flat, 1.0) == 0
    assert scores.text_area(written(), 1.0) > 0.05
    same = scores.picture_hash(still[0]) ^ scores.picture_hash((still[0] * 0.9).astype(np.uint8))
    assert same.bit_count() <= 3
    assert (scores.picture_hash(still[0]) ^ scores.picture_hash(scene(9, 1)[0])).bit_count() > 12


def written():
    image = Image.new("RGB", (320, 180), (40, 60, 80))
    draw = ImageDraw.Draw(image)
    for line in range(4):
        draw.text((20, 30 + 30 * line), "THE QUICK BROWN FOX JUMPS", (255, 255, 255), font_size=20)
    return np.array(image)[None]


@pytest.mark.slow
def test_real_films_are_cut_scored_encoded_and_trained_on(tmp_path):
    """`make demo-films`, in another folder, with the environment that runs this."""
    for name in ("train.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["make", "-f", ROOT / "Makefile", "-o", "setup", "demo-films"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(
        [*command, f"BIN={Path(sys.executable).parent}"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    run = tmp_path / "runs" / "demo_films"
    print((run / "table" / "funnel.txt").read_text())

    rows = pyarrow.parquet.read_table(run / "table" / "clips.parquet").to_pylist()
    starts = sorted(row["first"] for row in rows if row["file"] == "bikes.mp4")
    assert np.abs(np.array(starts) - (0, 30, 76, 137, 187, 242)).max() <= 2
    kept = [row for row in rows if not row["left_out"]]
    assert len(rows) == 8 and len(kept) >= 3
    assert all(np.isfinite(row[score.name]) for row in kept for score in scores.SCORES)
    page = (run / "table" / "funnel.html").read_text()
    assert page.count("<img") == len(rows) and all(row["clip"] in page for row in rows)

    prepared = Records(run / "latents" / "films")
    assert sorted(prepared.index["clip"]) == sorted(row["clip"] for row in kept)
    metrics = [json.loads(m) for m in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(30))
    assert all(np.isfinite(m["loss"]) and m["bad_records"] == 0 for m in metrics)


def test_a_film_whose_captioner_is_down_is_not_finished(films, tmp_path):
    """The films before it are, and the same call goes on there."""
    folder, _ = films
    asked, down = [], True

    def captioner(stills):
        asked.append(stills)
        if down and len(asked) > 2:
            raise ConnectionError("http://h/v1 did not serve 5 requests: refused")
        return ["told"]

    options = {"rules": RULES, "scores": scores.SCORES[:1], "models": Models(captioner)}
    with pytest.raises(ConnectionError, match=r"5 requests: refused; [345] of 6 films are not"):
        curate(folder, tmp_path, workers=1, **options)
    assert not (tmp_path / "clips.parquet").exists() and len(asked) == 3
    down = False
    rows = curate(folder, tmp_path, workers=1, **options)
    assert not any("no caption" in row["left_out"] for row in rows) and len(rows) == 9
    told = sum(row["captions"] == ["told"] for row in rows)
    assert len(asked) == 1 + told  # nobody is asked again for what the first two clips have


def test_the_command_says_that_films_are_left(tmp_path, monkeypatch, capsys):
    def down(*_, **__):
        raise ConnectionError("http://h did not serve 5 requests; 3 of 9 films are not finished")

    monkeypatch.setattr(curation, "curate", down)
    assert command.main([str(tmp_path), str(tmp_path)]) == 42
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and "3 of 9 films are not finished" in error and not out


class Asked:
    """A captioner, a rewriter and a score of captions that note what they get, and may be down."""

    def __init__(self):
        self.captioned, self.rewritten, self.compared, self.down = [], [], [], False

    def caption(self, stills):
        self.captioned.append(stills.shape)
        return [f"clip of {stills.mean():.0f}", "clip"]

    def rewrite(self, caption, kind):
        if self.down and len(self.rewritten) == 2:
            raise ConnectionError("no answer for 600 s from http://h/v1: refused")
        if caption == "clip":
            self.rewritten.append((caption, kind))
            return "rewritten clip"
        if caption == "clip of 0":
            raise ValueError("http://h/v1 gave no rewritten caption in 5 requests: no text")
        self.rewritten.append((caption, kind))
        return f"rewritten {caption}"

    def other(self, caption, kind):
        return self.rewrite(caption, kind).replace("rewritten", "new")

    def compare(self, frames, captions):
        self.compared.append((frames.shape, tuple(captions)))
        return [frames.mean() / 255, 1.0]

    def counts(self):
        found = len(self.captioned), len(self.rewritten), len(self.compared)
        self.captioned, self.rewritten, self.compared = [], [], []
        return found


def by_name(rows):
    return {row["clip"]: row for row in rows}


def test_captions_are_rewritten_and_the_filter_sees_the_rewritten_ones(
    films, tmp_path, monkeypatch
):
    folder, asked = films[0], Asked()
    colour = scores.SCORES[1]  # leaves out grey.mp4

    def run(rewriter=asked.rewrite, low=0.0, colour=colour):
        aligned = Score("alignment", asked.compare, "captioned", low=low)
        found = curate(
            folder, tmp_path, RULES, (colour, aligned), Models(asked.caption, rewriter), workers=1
        )
        return by_name(found)

    rows = run()
    told = {name: row for name, row in rows.items() if "alignment" in row}
    # The others are left out by their frames, and no model is asked for them.
    assert {name.partition("#")[0] for name in told} == {"again.mp4", "four.mp4", "still.png"}
    assert asked.captioned == [(1 if "png" in name else 3, 64, 96, 3) for name in told]
    shape = {"image": (1, 64, 96, 3), "video": (8, 64, 96, 3)}
    assert asked.compared == [(shape[r["kind"]], tuple(r["captions"])) for r in told.values()]
    for row in told.values():
        assert row["captions"] == [f"rewritten {text}" for text in row[ORIGINAL]]
        assert row["alignment"] < 1.0  # the worst of both captions
    assert asked.rewritten.count(("clip", "video")) == 1  # equal captions are asked for once
    assert "4 of them with rewritten captions" in (tmp_path / "funnel.txt").read_text()
    page = (tmp_path / "funnel.html").read_text()
    assert "rewritten clip; (before: clip of" in page
    columns = pyarrow.parquet.read_table(tmp_path / "clips.parquet").to_pylist()
    assert by_name(columns)["still.png"][ORIGINAL] == rows["still.png"][ORIGINAL]
    assert {c.captions[1] for c in read_clips(tmp_path / "clips.parquet")[0]} == {"rewritten clip"}

    asked.counts()
    assert run() == rows and asked.counts() == (0, 0, 0)
    kept = {n: r["alignment"] for n, r in rows.items() if not r["left_out"]}
    worst, least = min(kept, key=kept.get), sorted(kept.values())[1]
    reasons = {n: r["left_out"] for n, r in run(low=least).items() if n in kept and r["left_out"]}
    assert reasons == {worst: f"alignment outside {least:g} to inf"}
    assert asked.counts() == (0, 0, 0)  # a limit is free

    monkeypatch.setattr(making, "film_rows", None)  # would fail: no film is scored again
    again = run(asked.other)
    assert [shape for shape, _ in asked.compared] == [shape[r["kind"]] for r in told.values()]
    assert asked.counts()[0] == 0 and again["still.png"]["captions"][1] == "new clip"
    assert {n: again[n]["alignment"] for n in told} == {n: told[n]["alignment"] for n in told}
    run(asked.other, colour=dataclasses.replace(colour, low=0.0))
    assert asked.counts() == (1, 2, 1)  # grey.mp4 alone, now that its colours are allowed
    plain = by_name(curate(folder, tmp_path, RULES, (colour,), Models(asked.caption), workers=1))
    assert plain["still.png"]["captions"][1] == "clip" and ORIGINAL not in plain["still.png"]
    assert asked.counts() == (0, 0, 0)


def test_what_a_rewriter_that_dies_has_not_done_is_done_later(films, tmp_path):
    asked = Asked()
    asked.down = True
    options = {"rules": RULES, "scores": scores.SCORES[1:2], "workers": 1}
    models = Models(asked.caption, asked.rewrite)
    with pytest.raises(ConnectionError, match=r"http://h/v1: refused; \d of 6 films are not fin"):
        curate(films[0], tmp_path, models=models, **options)
    assert len(asked.rewritten) == 2 and not (tmp_path / "clips.parquet").exists()
    asked.down = False
    rows = curate(films[0], tmp_path, models=models, **options)
    alone = curate(films[0], tmp_path / "alone", models=models, **options)
    assert rows == alone and all("no rewritten" not in row["left_out"] for row in rows)


def test_a_caption_that_a_model_refuses_leaves_its_clip_out_with_the_reason(tmp_path):
    folder = tmp_path / "stills"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(folder / "black.png")
    still(folder / "a.png", 1)
    asked = Asked()
    rows = by_name(
        curate(folder, tmp_path / "out", RULES, (), Models(asked.caption, asked.rewrite), workers=1)
    )
    assert rows["a.png"]["left_out"] == "" and rows["a.png"]["captions"][1] == "rewritten clip"
    assert re.match("no rewritten caption: http://h/v1 gave no", rows["black.png"]["left_out"])
    assert "1 left out: no rewritten caption\n" in (tmp_path / "out" / "funnel.txt").read_text()
