"""One process at a time in a run folder: the second is told who is there; a dead one is not."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from easyanimate_jax.disk.lock import FolderLock

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys, time
from pathlib import Path
from easyanimate_jax.disk.lock import FolderLock
with FolderLock(Path(sys.argv[1]), option="--run"):
    print("held", flush=True)
    time.sleep(60)
"""


def lock(folder, **options):
    return FolderLock(folder / "run", option="--run", **options)


@pytest.fixture
def holder(tmp_path):
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


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
