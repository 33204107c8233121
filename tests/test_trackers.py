"""Trackers beside the metrics file, with their real packages where these are installed."""

import json
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


def install(site: Path, *words: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), *words]
    subprocess.run(command, check=True, capture_output=True)


def play(name: str, folder: Path, site: Path) -> None:
    folder.mkdir()
    code = [sys.executable, "-c", PLAY, name, str(folder)]
    path = {"PYTHONPATH": f"{ROOT}:{site}", "PATH": "/usr/bin:/bin", "HOME": str(site)}
    done = subprocess.run(code, env=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


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


@pytest.mark.slow
def test_wandb_keeps_an_offline_run_that_its_own_reader_reads(tmp_path):
    install(tmp_path / "site", "wandb")
    play("wandb", tmp_path / "run", tmp_path / "site")
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({path.name.split("-")[-1] for path in folders}) == 1  # one id
    (films,) = (folders[1].rglob("*.mp4"),)
    assert len(list(films)) == 1 and list(folders[1].rglob("*.png"))


@pytest.mark.slow
def test_trackio_keeps_a_run_in_the_runs_folder(tmp_path):
    install(tmp_path / "site", "trackio")
    play("trackio", tmp_path / "run", tmp_path / "site")
    assert list((tmp_path / "run" / "trackio").rglob("*.db"))
    assert list((tmp_path / "run" / "trackio").rglob("*.mp4"))
