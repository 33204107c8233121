"""The lock and the small files of a run in a store, and the refusals before a run begins."""
# ruff: noqa: F811 (pytest finds fixtures by name)

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_stores import servers  # noqa: F401
from small_runs import DEMO

from easyanimate_jax.__main__ import main
from easyanimate_jax.runs.doctor import same_run_folder
from easyanimate_jax.storage import lock as locks
from easyanimate_jax.storage import mirror as mirrors
from easyanimate_jax.storage import stores
from easyanimate_jax.storage.errors import AnotherRunError
from easyanimate_jax.storage.lock import StoreLock
from easyanimate_jax.storage.mirror import Mirror
from easyanimate_jax.storage.probe import check_store
from easyanimate_jax.storage.stores import place

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gcs(servers):
    yield servers
    servers.faults.clear()


@pytest.fixture(params=["gs", "s3"])
def run(request, gcs):
    name = "".join(c for c in request.node.name if c.isalnum())
    return place(f"{request.param}://bucket/{name}")


@pytest.fixture
def quick(monkeypatch):
    """Locks that are renewed often, and soon stale."""
    monkeypatch.setattr(locks, "RENEW", 0.1)
    monkeypatch.setattr(locks, "FRESH", 1.0)


def lock(run, **options) -> StoreLock:
    return StoreLock(run, **{"option": "--run", "wait": 0.3} | options)


def test_a_second_process_is_refused_and_told_who_is_there(run, quick):
    who = rf"is in use by process {os.getpid()} on {socket.gethostname()} since 20.*name another"
    with lock(run) as first:
        with pytest.raises(ValueError, match=who), lock(run):
            raise AssertionError
        first.check()
    assert stores.list_names(run) == []
    with lock(run):
        pass


def test_a_lock_that_is_not_renewed_is_taken_over_and_its_holder_learns_it(run, quick):
    silent = lock(run)
    silent.tag = silent._take()
    time.sleep(1.1)
    with lock(run) as other:
        silent.thread = locks.threading.Thread(target=silent._renew, daemon=True)
        silent.thread.start()
        silent.thread.join(5)
        with pytest.raises(AnotherRunError, match=r"was taken over by process .*did not renew"):
            silent.check()
        silent.__exit__()
        other.check()
        assert stores.list_names(run) == ["lock"]  # the holder's stays


def test_the_lock_of_a_process_that_was_killed_here_is_free_at_once(run):
    code = f"""
import os
from easyanimate_jax.storage.lock import StoreLock
from easyanimate_jax.storage.stores import place
StoreLock(place("{run}"), option="--run").__enter__()
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert killed.returncode == -9 and stores.list_names(run) == ["lock"]
    began = time.monotonic()
    with lock(run):
        assert time.monotonic() - began < 5


def test_of_many_that_take_a_stale_lock_one_holds_it(run, quick):
    silent = lock(run)
    silent._take()
    time.sleep(1.1)
    others = [lock(run) for _ in range(8)]
    tags = []
    threads = [locks.threading.Thread(target=lambda o=o: tags.append(o._take())) for o in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([tag for tag in tags if tag is not None]) == 1


def everything(name: str) -> bool:
    return True


def test_files_that_changed_are_uploaded_whole(run, tmp_path, monkeypatch, gcs):
    mirror = Mirror(tmp_path, run, everything)
    with (tmp_path / "metrics.jsonl").open("a", buffering=1) as file:
        file.write("one\n")
        for name in ("samples/a.png", "heartbeats/0.json", "lock", "x.json.1.host-9.new"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        assert mirror.upload() == []
        assert sorted(f.name for f in stores.list_files(run)) == ["metrics.jsonl", "samples/a.png"]
        before = gcs.counts["put"]
        assert mirror.upload() == [] and gcs.counts["put"] == before
        file.write("two\n")
    monkeypatch.setattr(mirrors, "MINUTE", 0.05)
    mirror.start()
    end = time.monotonic() + 10
    while (run / "metrics.jsonl").read_text() != "one\ntwo\n":
        assert time.monotonic() < end
    (tmp_path / "summary.json").write_text("{}")
    mirror.close()
    assert (run / "summary.json").read_text() == "{}"


def test_the_store_decides_what_a_new_process_goes_on_with(run, tmp_path):
    stores.replace_text(run / "metrics.jsonl", "of another host\n")
    stores.replace_text(run / "samples" / "new.png", "new")
    stores.replace_text(run / "checkpoints" / "commits" / "000000001.json", "{}")
    (tmp_path / "samples").mkdir()
    for name in ("metrics.jsonl", "left.json", "samples/new.png"):
        (tmp_path / name).write_text("older")
    mirror = Mirror(tmp_path, run, everything)
    mirror.fetch(lambda name: name.endswith(".jsonl"))
    assert (tmp_path / "metrics.jsonl").read_text() == "of another host\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "samples"]
    assert mirror.upload() == [] and (run / "samples" / "new.png").read_text() == "new"


def test_an_upload_that_fails_is_logged_and_tried_again(gcs, tmp_path, caplog):
    run = place("gs://bucket/tried")
    mirror = Mirror(tmp_path, run, everything)
    (tmp_path / "metrics.jsonl").write_text("rows")
    gcs.faults.append(lambda method, path: "503" if method == "PUT" else None)
    assert mirror.upload() == ["metrics.jsonl"]
    assert "was not uploaded, and is tried again" in caplog.text
    gcs.faults.clear()
    mirror.close()
    assert (run / "metrics.jsonl").read_text() == "rows"


def test_a_run_whose_lock_was_taken_over_uploads_nothing(run, tmp_path, monkeypatch, quick):
    from easyanimate_jax.runs.home import StoreHome

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with StoreHome(run, 0) as home:
        home.begun = True
        (home.mirror.folder / "metrics.jsonl").write_text("one\n")
        home.keep()
        stores.replace_text(run / "lock", json.dumps(locks._myself() | {"id": "other"}))
        home.lock.thread.join(5)
        (home.mirror.folder / "metrics.jsonl").write_text("two\n")
        with pytest.raises(AnotherRunError):
            home.keep()
    assert (run / "metrics.jsonl").read_text() == "one\n"
    assert stores.list_names(run) == ["lock", "metrics.jsonl"]


def test_a_run_on_another_machine_has_its_files_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, two = (mirrors.work_folder(place(f"gs://bucket/{n}/run")) for n in "ab")
    assert one != two and one.name == two.name == "run"
    assert one.is_relative_to(tmp_path / "easyanimate_jax" / "runs")


def test_a_store_that_takes_everything_is_left_as_it_was(run):
    check_store("--run", run)
    assert stores.list_names(run) == []


def test_the_doctor_sees_one_run_folder_in_a_store(run, gcs):
    found = same_run_folder(run)
    assert found.good and found.name == f"run {run}" and stores.list_names(run) == []


REFUSED = {
    "403": "the store refuses these credentials.*check the network, and the credentials",
    "503": "the store did not answer.*check the network",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_store_that_refuses_is_named_in_one_line(gcs, fault):
    gcs.faults.append(lambda method, path: fault)
    with pytest.raises(ValueError, match=rf"^--run gs://bucket/x: {REFUSED[fault]}") as caught:
        check_store("--run", place("gs://bucket/x"))
    assert "\n" not in str(caught.value)


def test_a_store_that_creates_twice_is_refused(gcs, monkeypatch):
    monkeypatch.setattr(
        "easyanimate_jax.storage.probe.create",
        lambda target, content: stores.replace_bytes(target, content) or True,
    )
    with pytest.raises(ValueError, match="replaces an object that it was asked to create"):
        check_store("--run", place("gs://bucket/x"))


def test_training_and_doctor_refuse_a_bucket_that_does_not_exist(servers, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("from configs.demo import config\n")
    for verb in ("train", "doctor"):
        assert main([verb, str(config), "--run", "s3://nowhere/run"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: --run s3://nowhere/run") and "no bucket nowhere" in line
    assert main(["train", str(config), "--run", "hf://x/run"]) == 2
    assert "hf:// is not supported" in capsys.readouterr().err
    assert not Path("s3:").exists() and not list(tmp_path.glob("*:"))


def test_a_config_keeps_the_url_of_its_run(servers, tmp_path, monkeypatch):
    from dataclasses import replace

    from easyanimate_jax.runs.config import from_json, to_json

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = replace(DEMO, run="gs://bucket/runs/mine/")
    assert config.run == "gs://bucket/runs/mine"
    assert from_json(to_json(config)) == config
    assert str(config.checkpoints) == "gs://bucket/runs/mine/checkpoints"
    assert config.folder.is_relative_to(tmp_path)
    assert json.loads(to_json(config))["run"] == config.run
    assert DEMO.folder == Path(DEMO.run)
