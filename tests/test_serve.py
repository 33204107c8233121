"""A server with its engine, as a process: jobs are made, cancelled, and outlive kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import openai
import pytest
import requests
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer
from test_load import folder as folder  # a fixture: a run

from easyanimate_jax.data import media
from easyanimate_jax.serving.store import Store

ROOT = Path(__file__).parent.parent
SMALL = {"size": "32x16", "num_frames": 5, "steps": 2, "seed": 1}


class Server:
    """`python -m easyanimate_jax serve` in a folder; `say` talks to it."""

    def __init__(self, model, served, *options):
        command = [sys.executable, "-m", "easyanimate_jax", "serve", f"tiny={model}", *options]
        command += ["--folder", str(served), "--port", "0", "--most-pixels", "1000000"]
        self.served = served
        self.log = open(served.parent / "log.txt", "a+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=ROOT
        )
        line = self.process.stdout.readline()
        assert line.startswith("serving at "), self.output()
        self.url = line.split()[-1]
        self.token = (served / "token").read_text()
        self.session = requests.Session()
        self.session.headers["authorization"] = f"Bearer {self.token}"

    def output(self):
        self.log.seek(0)
        return self.log.read()

    def say(self, method, path="", **options):
        return self.session.request(method, f"{self.url}/v1/videos{path}", timeout=60, **options)

    def create(self, **fields):
        answer = self.say("post", json={"prompt": "a red circle"} | SMALL | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def status(self, id):
        return self.say("get", f"/{id}").json()

    def wait(self, id, *wanted, seconds=120):
        end = time.monotonic() + seconds
        while (shown := self.status(id))["status"] not in wanted:
            assert time.monotonic() < end, (shown, self.output()[-3000:])
            time.sleep(0.05)
        return shown

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait(30)
        self.session.close()
        self.process.stdout.close()
        self.log.close()


def assert_same_frames(content, film):
    other = film.with_name("other.mp4")
    other.write_bytes(content)
    np.testing.assert_array_equal(*(media.read_clip(path, 0, 5) for path in (other, film)))


@pytest.fixture
def served(tmp_path):
    return tmp_path / "served"


@pytest.mark.slow
def test_jobs_are_made_and_cancelled_and_outlive_kills(folder, served):
    """One server for all: a start costs ten seconds."""
    server = Server(folder, served)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.token, max_retries=0)
    with pytest.warns(DeprecationWarning):
        made = client.videos.create_and_poll(prompt="a red circle", extra_body=SMALL)
        content = client.videos.download_content(made.id).read()
    assert made.status == "completed" and made.inference_time_s > 0
    film = served.parent / "film.mp4"
    film.write_bytes(content)
    assert media.probe(film)[:4] == ("video", 5, 16, 32)
    sidecar = json.loads((served / "videos" / f"{made.id}.json").read_text())
    assert sidecar["options"]["prompt"] == "a red circle" and sidecar["seed"] == 1
    assert sidecar["options"]["step"] == 7
    for variant in ("thumbnail", "spritesheet"):
        answer = server.say("get", f"/{made.id}/content?variant={variant}")
        assert answer.content.startswith(b"\x89PNG")

    long = server.create(steps=100, guidance_every=1)
    while not 0 < server.wait(long, "in_progress")["progress"] < 99:
        time.sleep(0.02)
    began = time.monotonic()
    server.say("delete", f"/{long}")
    assert server.wait(long, "failed")["error"]["code"] == "cancelled"
    assert time.monotonic() - began < 5  # of 100 steps; a step takes 50 ms here

    waiting = [server.create(seed=seed, steps=60) for seed in range(3)]
    server.wait(waiting[0], "in_progress")
    server.end(signal.SIGKILL)
    server = Server(folder, served)
    assert [server.wait(id, "completed")["status"] for id in waiting] == ["completed"] * 3
    again = server.create()
    server.wait(again, "completed")
    assert_same_frames(server.say("get", f"/{again}/content").content, film)  # of the same seed

    engine = subprocess.run(
        ["pgrep", "-P", str(server.process.pid), "-f", "serving.engine"],
        capture_output=True,
        text=True,
    )
    hard = server.create(steps=100)
    server.wait(hard, "in_progress")
    os.kill(int(engine.stdout), signal.SIGKILL)
    assert server.wait(hard, "completed")["status"] == "completed"
    assert "the engine ended (exit code -9 (SIGKILL" in server.output()
    second = subprocess.run(
        [sys.executable, "-m", "easyanimate_jax", "serve", str(folder), "--folder", str(served)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert second.returncode == 2 and re.fullmatch(
        "error: .* is in use by process .*\n", second.stderr
    )
    stopped = server.create(steps=100)
    server.wait(stopped, "in_progress")
    server.end()
    assert server.process.returncode == 0
    job = Store(served).get(stopped)
    assert (job.status, job.stops) == ("queued", 0)  # it was put back, and is no fault of its own
    left = subprocess.run(["pgrep", "-f", f"serving.engine {served}"], capture_output=True)
    assert not left.stdout


@pytest.mark.slow
def test_two_hundred_jobs_outlive_fifty_kills(folder, served):
    """Kills in the queue, in denoising and in writing; of the server, and of its engine alone."""
    rng, ids, kills = np.random.default_rng(0), [], {"server": 0, "engine": 0}
    server = Server(folder, served, "--batch", "2", "--most-jobs", "1000")
    while sum(kills.values()) < 50:
        ids += [server.create(seed=int(rng.integers(5)), steps=10) for _ in range(4)]
        where = rng.integers(4)
        if where == 1:  # while one is denoised
            server.wait(ids[-4], "in_progress", "completed")
        elif where == 2:  # while a file is written, if the moment is hit
            end = time.monotonic() + 20
            while not list((served / "videos").glob(".*.part")) and time.monotonic() < end:
                pass
        elif where == 3:
            time.sleep(rng.uniform(0, 12))
        if kills["engine"] < 10 and rng.random() < 0.3:
            engine = subprocess.run(
                ["pgrep", "-P", str(server.process.pid), "-f", "serving.engine"],
                capture_output=True,
                text=True,
            )
            if engine.stdout:
                os.kill(int(engine.stdout), signal.SIGKILL)
                kills["engine"] += 1
                continue
        server.end(signal.SIGKILL)
        kills["server"] += 1
        server = Server(folder, served, "--batch", "2", "--most-jobs", "1000")
    ends = [server.wait(id, "completed", "failed", seconds=600) for id in ids]
    failed = [shown for shown in ends if shown["status"] == "failed"]
    assert all(shown["error"]["code"] == "interrupted" for shown in failed)
    assert len(failed) <= 2, failed  # two engines were killed during one job
    films = {}
    for shown in ends:
        film = served / "videos" / f"{shown['id']}.mp4"
        if shown["status"] == "completed":
            frames = media.read_clip(film, 0, 5)
            np.testing.assert_array_equal(frames, films.setdefault(shown["seed"], frames))
    counts = Counter(path.name[:38] for path in (served / "videos").iterdir())
    assert all(counts[shown["id"]] == 4 for shown in ends if shown["status"] == "completed")
    assert not list((served / "videos").glob(".*"))
    print(f"{len(ids)} jobs, {kills} kills, {len(failed)} interrupted")
    assert len(ids) == 200
    server.end()
