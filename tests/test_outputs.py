"""Samples beside what others put into the folder: nothing is replaced, nothing half written."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from easyanimate_jax.data import media
from easyanimate_jax.generation import outputs
from easyanimate_jax.generation.outputs import Origin, finished, record, write
from easyanimate_jax.generation.request import Asked, SampleRequest

FILM = np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), np.uint8)
TRAINING = {"seed": 7, "versions": {"jax": "0"}, "config": {"seed": 7}}


@pytest.mark.parametrize(
    "names",
    [
        ("00000003.mp4",),
        ("00000003.mov", "00000001.txt"),
        ("00000003_sheet.png",),
        ("00000003.tar.gz", "readme.md", "video_00000009.mp4"),
        ("00000003",),
    ],
)
def test_a_number_is_free_when_no_name_begins_with_it(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("another program's")
    assert write(tmp_path, FILM, {}, gif=True).name == "00000004.mp4"
    assert write(tmp_path, FILM[:1], {}).name == "00000005.png"
    assert all((tmp_path / name).read_text() == "another program's" for name in names)
    made = {path.name for path in tmp_path.iterdir()} - set(names)
    endings = (".mp4", "_sheet.png", ".gif", ".json")
    assert made == {f"00000004{e}" for e in endings} | {"00000005.png", "00000005.json"}


def test_a_folder_takes_a_number_too(tmp_path):
    (tmp_path / "00000002").mkdir()
    assert write(tmp_path, FILM[:1], {}).name == "00000003.png"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("00000001.json", b"[1, 2]"),
        ("00000001.json", b""),
        ("00000001.json", b"\xff\xfe\x00\x81"),
        ("00000001.json", b"[" * 100_000),
        ("00000001.json", b'{"identity": ["a", "list"]}'),
        ("00000001.json", None),
        ("²³.json", b'{"identity": "x"}'),
        ("notes.json", b'{"identity": "x"}'),
    ],
)
def test_a_foreign_json_neither_crashes_nor_counts(tmp_path, name, content):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    assert finished(tmp_path) == set()
    path = write(tmp_path, FILM[:1], {"identity": "mine"})
    assert path.name == ("00000002.png" if name[0] == "0" else "00000001.png")
    assert finished(tmp_path) == {"mine"}


def test_a_video_is_whole_or_not_there_and_its_sidecar_is_last(tmp_path, monkeypatch):
    seen = []

    def failing(path: Path, frames, **options):
        path.write_bytes(b"half")
        seen.extend(p.name for p in tmp_path.iterdir())
        raise OSError("no space left")

    with monkeypatch.context() as full:
        full.setattr(media, "write_gif", failing)
        with pytest.raises(OSError, match="no space"):
            write(tmp_path, FILM, {}, gif=True)
    assert set(seen) == {f"00000001{end}" for end in (".mp4", "_sheet.png")} | {
        ".00000001.part",
        ".00000001.lock",
    }
    assert {p.name for p in tmp_path.iterdir()} == {"00000001.mp4", "00000001_sheet.png"}
    assert media.probe(tmp_path / "00000001.mp4").num_frames == 5
    assert write(tmp_path, FILM, {}).name == "00000002.mp4"


def test_commands_at_once_take_numbers_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: write(tmp_path, FILM[:1], {"i": i}), range(40)))
    assert sorted(path.name for path in made) == [f"{n:08d}.png" for n in range(1, 41)]
    sidecars = [json.loads(path.with_suffix(".json").read_text()) for path in made]
    assert [sidecar["i"] for sidecar in sidecars] == list(range(40))
    assert len(list(tmp_path.iterdir())) == 80


def test_a_sidecar_holds_the_samples_own_seed_options_and_versions(tmp_path):
    asked = Asked(SampleRequest(prompt="x", seed=5, height=16, width=32, frames=5))
    origin = Origin(tmp_path / "run", {"step": 9, "lora": ["a", "b:0.5"]}, training=TRAINING)
    sidecar = record(asked, origin, tmp_path, 1.0)
    assert sidecar["seed"] == sidecar["options"]["seed"] == 5
    assert set(sidecar["versions"]) == set(outputs.VERSIONS)
    assert sidecar["training"] == TRAINING and "config" not in sidecar
    assert "--step=9 --lora=a --lora=b:0.5" in sidecar["command"]


def test_a_sample_is_another_with_another_lora_or_the_same_one_of_other_content():
    asked = Asked(SampleRequest(prompt="x"), line=1)

    def of(loras):
        return outputs.identity(asked, Origin(Path("run"), {"step": 9}, loras))

    every = [{}, {"a:0.5": "1"}, {"a:0.5": "2"}, {"a:0.7": "1"}, {"a:0.5": "1", "b": "1"}]
    assert len({of(loras) for loras in every}) == len(every) and of(every[1]) == of({"a:0.5": "1"})


@pytest.mark.parametrize("name", ["image", "video", "camera"])
def test_a_sample_is_another_when_a_file_of_its_request_has_other_content(tmp_path, name):
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_text("one")
    other.write_text("one")
    origin = Origin(tmp_path / "run", {"step": 9})
    asked = Asked(SampleRequest(prompt="x", **{name: str(file)}), line=1)
    before = outputs.identity(asked, origin)
    assert before == outputs.identity(asked, origin)
    date = file.stat().st_mtime_ns
    file.write_text("two")  # of the same size and date
    os.utime(file, ns=(date, date))
    assert outputs.identity(asked, origin) != before
