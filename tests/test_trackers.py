"""Trackers beside the metrics file, with their real packages where these are installed."""

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import DEMO

from easyanimate_jax.runs import loop
from easyanimate_jax.training import trackers
from easyanimate_jax.training.metrics import MetricsWriter

ROOT = Path(__file__).parent.parent
FRAMES = np.random.default_rng(0).integers(0, 255, (5, 16, 32, 3), np.uint8)
# Two starts of one run: the second repeats step 2.
PLAY = f"""
import sys
from pathlib import Path
import numpy as np
from easyanimate_jax.training.metrics import MetricsWriter
from easyanimate_jax.training.trackers import open_trackers

name, folder = sys.argv[1], Path(sys.argv[2])
frames = np.random.default_rng(0).integers(0, 255, {FRAMES.shape}, np.uint8)
for first, last in ((0, 3), (2, 5)):
    writer = MetricsWriter(folder, first, open_trackers([name], folder, first, {{"seed": 42}}))
    for step in range(first, last):
        writer.write({{"step": step, "loss": 1.5 - step, "stage": "one"}})
    writer.numbers(last, {{"validation/loss": 0.25}})
    writer.picture("held out", last, frames[0])
    writer.film("held-out i2v/0", last, frames, 8)
    writer.close()
"""


# The records of a .wandb file, by its own messages: a log of LevelDB's form after 7 bytes.
READ_WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record

for path in sorted(Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record, part = Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in items}
                print(json.dumps(row))
"""


def install(site: Path, *words: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), *words]
    subprocess.run(command, check=True, capture_output=True)


def start(code: str, site: Path, *words: str) -> str:
    """What a program prints that finds the packages of `site`."""
    path = {"PYTHONPATH": f"{ROOT}:{site}", "PATH": "/usr/bin:/bin", "HOME": str(site)}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Noted:
    """A tracker that notes what it is given."""

    def __init__(self, *given):
        self.given, self.seen = given, []

    def numbers(self, step, values):
        self.seen.append((step, dict(values)))

    def picture(self, name, step, picture):
        self.seen.append((step, name, picture.shape))

    def film(self, name, step, frames, fps):
        self.seen.append((step, name, frames.shape, fps))

    def close(self):
        self.seen.append("closed")


def test_every_tracker_gets_numbers_pictures_and_films(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Noted)
    (noted,) = trackers.open_trackers(["wandb"], tmp_path, 7, {"seed": 1})
    assert noted.given == (tmp_path, 7, {"seed": 1})
    writer = MetricsWriter(tmp_path, 7, [noted])
    writer.write({"step": 7, "loss": 0.5, "stage": "one"})
    writer.film("a", 7, FRAMES, 8)
    writer.picture("b", 7, FRAMES[0])
    writer.close()
    films = [(7, "a", (5, 16, 32, 3), 8), (7, "b", (16, 32, 3))]
    assert noted.seen == [(7, {"loss": 0.5}), *films, "closed"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["stage"] == "one"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    config = replace(DEMO, run=str(tmp_path / "run"), trackers=(name,))
    with pytest.raises(ValueError, match=rf"pip install 'easyanimate_jax\[{name}\]'"):
        loop.train(config)
    assert not (tmp_path / "run").exists()


# What `PLAY` logs, step by step; the second start repeats step 2.
LOSSES = [(0, 1.5), (1, 0.5), (2, -0.5), (2, -0.5), (3, -1.5), (4, -2.5)]


@pytest.mark.slow
def test_wandb_keeps_an_offline_run_that_its_own_messages_read(tmp_path):
    site, run = tmp_path / "site", tmp_path / "run"
    install(site, "wandb")
    run.mkdir()
    start(PLAY, site, "wandb", str(run))
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({path.name.split("-")[-1] for path in folders}) == 1  # one id
    rows = [json.loads(line) for line in start(READ_WANDB, site, str(run)).splitlines()]
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == LOSSES
    assert [row["step"] for row in rows if row.get("validation/loss") == 0.25] == [3, 5]
    for row in rows:
        for name in ("held out/path", "held-out i2v/0/path"):
            assert name not in row or any((f / "files" / row[name]).is_file() for f in folders)
    assert sum("held-out i2v/0/path" in row for row in rows) == 2


@pytest.mark.slow
def test_trackio_keeps_a_run_in_the_runs_folder(tmp_path):
    site, run = tmp_path / "site", tmp_path / "run"
    install(site, "trackio")
    run.mkdir()
    start(PLAY, site, "trackio", str(run))
    (store,) = (run / "trackio").glob("*.db")
    with sqlite3.connect(store) as connection:
        found = connection.execute("select step, metrics, run_name from metrics order by id")
        rows = [(step, json.loads(text), name) for step, text, name in found]
    assert len({name for *_, name in rows}) == 1
    assert [(step, row["loss"]) for step, row, _ in rows if "loss" in row] == LOSSES
    films = [row["held-out i2v/0"] for _, row, _ in rows if "held-out i2v/0" in row]
    assert len(films) == 2
    assert all((run / "trackio" / "media" / film["file_path"]).is_file() for film in films)
