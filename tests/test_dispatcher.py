"""The thread between queue and engine, with an engine that follows orders written in prompts."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer
from test_load import folder as folder  # a fixture: a run
from test_lora import random_lora

from easyanimate_jax.data import media
from easyanimate_jax.generation.request import Asked
from easyanimate_jax.runs.sample import examine
from easyanimate_jax.serving import dispatcher
from easyanimate_jax.serving.dispatcher import Dispatcher
from easyanimate_jax.serving.engine import Engine, Settings, likeness, open_model, request_of
from easyanimate_jax.serving.store import Store
from easyanimate_jax.weights import lora

FAKE = """
import json, os, select, signal, sys, time
from pathlib import Path

videos = Path(sys.argv[1]) / "videos"
tell = lambda **event: print(json.dumps(event), flush=True)
tell(event="started")
cancelled, pending = set(), []

def read():
    order = json.loads(sys.stdin.readline() or os._exit(0))
    cancelled.add(order["cancel"]) if "cancel" in order else pending.append(order)

while True:
    while not pending:
        read()
    order = pending.pop(0)
    if "load" in order:
        if order["load"] == "dies":
            sys.exit(3)
        if order["load"] == "broken":
            tell(event="unusable", model="broken", message="no header")
        tell(event="idle")
        continue
    ids = [job["id"] for job in order["jobs"]]
    prompts = [job["request"]["prompt"] for job in order["jobs"]]
    with open(videos.parent / "batches.txt", "a") as file:
        print(json.dumps(prompts), file=file)
    for number in range(20):
        if select.select([sys.stdin], [], [], 0)[0]:
            read()
        if cancelled.issuperset(ids):
            break
        if "slow" in prompts:
            time.sleep(0.05)
        if number == 10 and "die" in prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 10 and "sleep" in prompts:
            time.sleep(600)
        tell(event="progress", ids=ids, done=number + 1, of=20)
    for id, prompt in zip(ids, prompts):
        if id in cancelled:
            tell(event="failed", id=id, code="cancelled", message="")
        elif prompt == "refuse":
            place = videos.parent / "uploads" / id
            message = f"--mask: {place}/mask, /srv/model"
            tell(event="failed", id=id, code="invalid_input", message=message)
        else:
            (videos / f"{id}.mp4").write_bytes(b"film")
            tell(event="made", id=id, file=f"{id}.mp4", seconds=0.1, notes=[])
    tell(event="idle")
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a dispatcher; all end with the test."""
    script = tmp_path / "engine.py"
    script.write_text(FAKE)
    monkeypatch.setattr(dispatcher, "ENGINE", (sys.executable, str(script)))
    monkeypatch.setattr(dispatcher, "IDLE", 0.05)
    monkeypatch.setattr(dispatcher, "OFTEN", 0.0)
    started = []

    def start(model="demo", **options):
        store = Store(tmp_path / "served")
        started.append(Dispatcher(store, Settings({model: "/srv/model"}), **options))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.close()


def add(thread, *prompts, alike="a"):
    ids = [f"video_{len(list_of(thread)) + n:032x}" for n, _ in enumerate(prompts)]
    for id, prompt in zip(ids, prompts, strict=True):
        thread.store.add(id, "demo", {"prompt": prompt}, alike, most=1000)
    thread.wake()
    return ids


def list_of(thread):
    return thread.store.page(None, 1000, "asc")[0]


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ends(thread, *ids):
    until(lambda: all(thread.store.get(id).status in ("completed", "failed") for id in ids))
    return [thread.store.get(id).code for id in ids]


def test_an_error_that_stays_is_told_once(start, monkeypatch, caplog):
    thread, rounds = start(), []

    def claim(count):
        rounds.append(count)
        raise OSError("gone")

    until(thread.ready.is_set)
    with monkeypatch.context() as broken:
        broken.setattr(thread.store, "claim", claim)
        until(lambda: len(rounds) > 4)
    (job,) = add(thread, "one")
    assert ends(thread, job) == [None]
    assert sum("the dispatcher failed" in text for text in caplog.messages) == 1


def test_like_jobs_are_made_as_one_batch(start, tmp_path):
    store = Store(tmp_path / "served")
    for number in range(5):
        store.add(f"video_{number:032x}", "demo", {"prompt": str(number)}, "a", most=9)
    thread = start(batch=3)
    assert ends(thread, *(job.id for job in list_of(thread))) == [None] * 5
    batches = (tmp_path / "served" / "batches.txt").read_text().splitlines()
    assert batches == ['["0", "1", "2"]', '["3", "4"]']
    assert thread.ready.is_set()


def test_a_running_job_is_cancelled_at_its_next_step(start):
    thread = start()
    (id,) = add(thread, "slow")
    until(lambda: thread.store.get(id).progress > 1)
    assert thread.cancel(id).status == "in_progress"
    assert ends(thread, id) == ["cancelled"] and thread.store.get(id).progress < 90
    assert ends(thread, *add(thread, "next")) == [None]


def test_of_a_batch_only_the_cancelled_job_fails(start, tmp_path):
    store = Store(tmp_path / "served")
    for number in range(2):
        store.add(f"video_{number:032x}", "demo", {"prompt": "slow"}, "a", most=9)
    thread = start()
    first, second = (job.id for job in list_of(thread))
    until(lambda: thread.store.get(first).progress > 1)
    thread.cancel(second)
    assert ends(thread, first, second) == [None, "cancelled"]


def test_a_job_that_kills_the_engine_fails_and_takes_no_other_with_it(start, tmp_path):
    store = Store(tmp_path / "served")
    for number, prompt in enumerate(("one", "die", "two")):
        store.add(f"video_{number:032x}", "demo", {"prompt": prompt}, "a", most=9)
    thread = start()
    assert ends(thread, *(job.id for job in list_of(thread))) == [None, "interrupted", None]


def test_a_job_that_never_ends_is_ended(start):
    thread = start(limit=1.0)
    assert ends(thread, *add(thread, "sleep")) == ["timeout"]
    assert ends(thread, *add(thread, "next")) == [None]


def test_messages_name_no_path_of_the_server(start):
    thread = start()
    (id,) = add(thread, "refuse")
    assert ends(thread, id) == ["invalid_input"]
    assert thread.store.get(id).message == "mask: mask, demo"


def test_a_server_that_is_stopped_leaves_its_jobs_to_the_next_one(start):
    thread = start()
    (id,) = add(thread, "slow")
    until(lambda: thread.store.get(id).progress > 1)
    thread.close()
    assert thread.store.get(id).status == "queued" and thread.store.get(id).deaths == 0
    assert ends(start(), id) == [None]


@pytest.mark.parametrize(
    "model, says",
    [
        ("dies", "the engine ended (exit code 3) while it loaded dies; it is started again"),
        ("broken", "broken cannot be loaded: no header"),
    ],
)
def test_a_model_that_cannot_be_loaded_makes_nothing_ready(model, says, start, caplog):
    thread = start(model)
    assert thread.broken.wait(20)
    until(lambda: says in caplog.messages)
    time.sleep(0.2)
    assert not thread.ready.is_set() and thread.is_alive()
    if model == "broken":  # what its own jobs say is the engine's, and others are served
        assert ends(thread, *add(thread, "another model")) == [None]


def test_a_queue_that_fails_while_a_batch_begins_loses_nothing(start, monkeypatch):
    thread = start()
    until(thread.ready.is_set)
    get, times = Store.get, []

    def fails(self, id):
        times.append(1)
        if len(times) == 1:
            raise OSError(5, "Input/output error")
        return get(self, id)

    monkeypatch.setattr(Store, "get", fails)
    (id,) = add(thread, "one")
    until(lambda: times)
    thread.cancel("video_of_another")  # while no engine lives
    assert ends(thread, id) == [None]


def test_a_full_disk_of_the_queue_delays_and_loses_nothing(start, monkeypatch):
    thread = start()
    until(thread.ready.is_set)
    complete, times = Store.complete, []

    def full(self, *arguments):
        times.append(1)
        if len(times) < 3:
            raise OSError(28, "No space left on device")
        return complete(self, *arguments)

    monkeypatch.setattr(Store, "complete", full)
    assert ends(thread, *add(thread, "one")) == [None] and len(times) == 3


@pytest.fixture(scope="module")
def engine(folder, tmp_path_factory):
    """(an engine on a small model, its store, the list of its events)"""
    store, events = Store(tmp_path_factory.mktemp("engine")), []
    return Engine(store.folder, Settings({"tiny": str(folder)}), events.append), store, events


def make(engine, *requests, cancelled=()):
    working, store, events = engine
    events.clear()
    working.cancelled = set(cancelled)
    size = {"frames": 5, "height": 16, "width": 32, "steps": 2}
    jobs = [
        {"id": f"video_{number:032x}", "request": {"prompt": "x"} | size | request}
        for number, request in enumerate(requests)
    ]
    for path in store.videos.iterdir():
        path.unlink()
    working.work("tiny", jobs)
    return [job["id"] for job in jobs]


def test_the_engine_tells_why_a_model_cannot_be_loaded_and_loads_another(folder, tmp_path):
    events, models = [], {"gone": str(tmp_path / "gone"), "tiny": str(folder)}
    engine = Engine(tmp_path, Settings(models, low_memory=True), events.append)
    engine.load("gone")
    (told,) = events
    assert (told["event"], told["model"]) == ("unusable", "gone") and "is no run" in told["message"]
    engine.load("tiny")
    assert len(events) == 1 and engine.name == "tiny"


def test_the_engine_makes_the_files_of_a_batch(engine):
    ids = make(engine, {"seed": 1}, {"seed": 2})
    _, store, events = engine
    assert [event["event"] for event in events] == ["progress"] * 2 + ["made"] * 2
    assert [event.get("done") for event in events[:2]] == [1, 2] and events[0]["of"] == 2
    names = {
        f"{id}{suffix}" for id in ids for suffix in (".mp4", ".json", "_sheet.png", "_first.png")
    }
    assert {path.name for path in store.videos.iterdir()} == names
    assert media.probe(store.videos / f"{ids[0]}.mp4")[:4] == ("video", 5, 16, 32)
    alone = make(engine, {"seed": 2})  # a video does not depend on its batch
    assert media.read_clip(store.videos / f"{alone[0]}.mp4", 0, 5).shape == (5, 16, 32, 3)


def test_a_cancelled_batch_ends_at_a_step_and_a_row_at_the_end(engine):
    all_of_them = [f"video_{number:032x}" for number in range(2)]
    make(engine, {}, {}, cancelled=all_of_them)
    _, store, events = engine
    assert [event["event"] for event in events] == ["failed", "failed"]
    make(engine, {}, {}, cancelled=all_of_them[:1])
    assert {event["event"] for event in events[-2:]} == {"failed", "made"}
    assert {path.name[:38] for path in store.videos.iterdir()} == {all_of_them[1]}


def test_a_wrong_file_and_a_full_disk_fail_the_job_and_not_the_engine(engine, monkeypatch):
    make(engine, {"camera": "camera"})
    _, store, events = engine
    assert events[-1]["code"] == "invalid_input" and "--camera" in events[-1]["message"]

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media, "write_video", full)
    make(engine, {})
    assert events[-1]["code"] == "disk_full" and not list(store.videos.iterdir())
    monkeypatch.undo()
    usage = shutil.disk_usage(store.folder)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    make(engine, {})  # the room is kept for the queue
    assert events[-1]["code"] == "disk_full" and not list(store.videos.iterdir())


def test_a_lora_is_in_its_own_videos_alone(engine, folder, tmp_path):
    working, store, _ = engine
    config = open_model(working.settings, "tiny").config
    lora.write(tmp_path / "style.safetensors", random_lora(config), "original")
    working.settings = working.settings._replace(
        loras={"style": str(tmp_path / "style.safetensors")}
    )

    def frames(**fields):
        (id,) = make(engine, fields)
        sidecar = json.loads((store.videos / f"{id}.json").read_text())
        return media.read_clip(store.videos / f"{id}.mp4", 0, 5), sidecar["options"].get("lora")

    before, none = frames()
    changed, named = frames(lora=[["style", 1.0]])
    again, _ = frames()
    assert none is None and named == [f"{tmp_path}/style.safetensors:1.0"]
    assert not np.array_equal(before, changed) and np.array_equal(before, again)


def test_a_job_of_a_model_or_lora_that_is_gone_says_so(engine):
    working, _, events = engine
    for model, request in (("gone", {}), ("tiny", {"lora": [["gone", 1.0]]})):
        events.clear()
        working.work(model, [{"id": "video_1", "request": {"prompt": "x"} | request}])
        assert events[-1]["code"] == "invalid_input"
        assert events[-1]["message"] == "gone: not served any more; ask for what is"


def test_a_fault_of_ours_ends_the_engine(engine, monkeypatch):
    monkeypatch.setattr("easyanimate_jax.serving.engine.generate", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(engine, {}, {})
    assert engine[2] == []  # each will be tried alone
    with pytest.raises(ZeroDivisionError):
        make(engine, {})
    assert [(event["event"], event["code"]) for event in engine[2]] == [("failed", "internal")]


def test_teacache_shares_no_batch(folder):
    settings = Settings({"tiny": str(folder)})
    opened, found = open_model(settings, "tiny"), []
    for id, fields in (
        ("a", {}),
        ("b", {"seed": 3}),
        ("c", {"teacache": 0.1}),
        ("d", {"teacache": 0.1}),
        ("e", {"taylorseer": 2}),
        ("f", {"taylorseer": 2}),
    ):
        request = request_of({"prompt": "x"} | fields, Path("."), id)
        found.append(likeness("tiny", [], examine([Asked(request)], opened)[0].request, id))
    assert found[0] == found[1] and found[4] == found[5] and len(set(found)) == 4
