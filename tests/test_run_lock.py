"""One process at a time in a folder: the second is told who is there; a dead one is not."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from easyanimate_jax.__main__ import main
from easyanimate_jax.storage import lock as locks
from easyanimate_jax.storage import whole
from easyanimate_jax.storage.lock import FolderLock

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys, time
from pathlib import Path
from easyanimate_jax.storage.lock import FolderLock
part = tuple(map(int, sys.argv[2:4])) or (0, 1)
with FolderLock(Path(sys.argv[1]), option="--run", part=part):
    print("held", flush=True)
    time.sleep(60)
"""


def lock(folder, **options):
    return FolderLock(folder / "run", option="--run", **options)


@pytest.fixture
def hold(tmp_path):
    """A process that holds tmp_path/run, or part k of n of it."""
    started = []

    def start(*part):
        words = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), *map(str, part)]
        started.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def holder(hold):
    return hold()


def test_a_second_process_is_refused_and_told_who_is_there(holder, tmp_path):
    who = rf"run is in use by process {holder.pid} on {socket.gethostname()} since 20.*--run"
    with pytest.raises(ValueError, match=who), lock(tmp_path, wait=0.0):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_the_lock_of_a_killed_process_is_free(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    with lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / "run" / "lock").read_text()
    with lock(tmp_path, wait=0.0):
        pass


def test_a_refused_run_leaves_no_new_folder_and_keeps_an_old_one(tmp_path):
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError
    assert not (tmp_path / "run").exists()
    with pytest.raises(RuntimeError), lock(tmp_path) as held:
        held.begun = True
        raise RuntimeError
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError
    assert (tmp_path / "run" / "mine").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ((0, 2), "part 0 of 2 of .*run is in use by process"),
        ((0, 1), r"shared in another number of parts \(lock-0-of-2\), is in use by process"),
        ((3, 4), r"shared in another number of parts \(lock-0-of-2\), is in use by process"),
        ((1, 2), None),
    ],
)
def test_parts_of_one_work_run_together_and_no_others(hold, tmp_path, part, message):
    holder = hold(0, 2)
    if message is None:
        with lock(tmp_path, part=part, wait=0.0):
            pass
    else:
        who = f"{message} {holder.pid} on {socket.gethostname()} since 20"
        with pytest.raises(ValueError, match=who), lock(tmp_path, part=part, wait=0.0):
            pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock-0-of-2"]


@pytest.mark.parametrize("verb", ["prepare", "curate", "control"])
def test_a_second_command_is_refused_before_it_works(holder, tmp_path, verb, monkeypatch, capsys):
    run = tmp_path / "run"
    (run / "metadata.json").write_text('[{"file_path": "a.mp4", "text": "a"}]')
    words = {
        "prepare": ["configs/demo.py", "--prepared", str(run)],
        "curate": [str(run), str(run)],
        "control": [str(run), "canny"],
    }
    before = sorted(run.iterdir())
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    assert main([verb, *words[verb]]) == 2
    error = capsys.readouterr().err
    assert f"run is in use by process {holder.pid} on {socket.gethostname()} since 20" in error
    assert sorted(run.iterdir()) == before


def test_a_folder_that_is_new_or_shared_is_not_removed_with_the_work_of_others(hold, tmp_path):
    with pytest.raises(RuntimeError), lock(tmp_path, part=(1, 2)):
        hold(0, 2)  # the folder did not exist before, and now another part has begun
        raise RuntimeError
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock-0-of-2"]


def test_without_kernel_locks_the_holder_touches_the_file(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(locks, "BEAT", 0.01)
    path = tmp_path / "run" / "lock"
    with lock(tmp_path):
        os.utime(path, (0, 0))
        for _ in range(500):
            if path.stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert path.stat().st_mtime > 0
    path.write_text(json.dumps({"host": "other", "pid": 7, "since": "2026-01-01 00:00:00"}))
    with pytest.raises(ValueError, match="process 7 on other since 2026"), lock(tmp_path, wait=0.0):
        pass
    os.utime(path, (0, 0))  # it died long ago
    with lock(tmp_path, wait=0.0):
        pass


def test_temporary_files_of_living_processes_stay(tmp_path):
    host, dead = socket.gethostname(), subprocess.Popen(["true"])
    dead.wait()
    names = [
        f"a.npz.{host}-{os.getpid()}.new",
        "a.npz.elsewhere-1.new",
        f"{host}-{dead.pid}.new",
        "somebody's.new",
    ]
    old = [f"a.npz.{host}-{dead.pid}.new", "a.npz.elsewhere-2.new"]
    for name in (*names, *old):
        (tmp_path / name).touch()
    os.utime(tmp_path / old[1], (0, 0))
    whole.remove_left(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    whole.replace_text(tmp_path / "a", "old")

    def fail(new):
        new.write_text("half")
        raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match="no space"):
        whole.replace(tmp_path / "a", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
