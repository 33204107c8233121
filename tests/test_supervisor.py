"""The supervisor with small scripts as ranks: deaths, silence, restarts, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from easyanimate_jax.commands import parse
from easyanimate_jax.storage.errors import is_of_jax

ROOT = Path(__file__).parent.parent
# A rank that beats, and whose steps go on from start to start.
RANK = """
import faulthandler, json, os, signal, sys, time
from pathlib import Path

rank, folder = os.environ.get("JAX_PROCESS_ID", "0"), Path(sys.argv[1])
faulthandler.register(signal.SIGUSR1)
starts = folder / f"starts-{rank}"
starts.write_text(str(int(starts.read_text()) + 1 if starts.exists() else 1))
number = int(starts.read_text())

def beat(step):
    file = Path(os.environ["EASYANIMATE_HEARTBEATS"]) / f"{rank}.json"
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"step": step, "section": "step", "time": time.time()}))
    os.replace(new, file)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))

def go_on(seconds):
    for _ in range(int(seconds * 20)):
        time.sleep(0.05)
        beat(10 * number)
"""


def supervise(folder: Path, body: str, ranks: int = 1, silence: float = 30) -> subprocess.Popen:
    (folder / "rank.py").write_text(RANK + body)
    words = ["--ranks", str(ranks), "--silence", str(silence), "--"]
    words += [sys.executable, str(folder / "rank.py"), str(folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "easyanimate_jax", "supervise", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen, code: int) -> str:
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code, output
    return output


def starts(folder: Path, rank: int = 0) -> int:
    return int((folder / f"starts-{rank}").read_text())


def await_pid(folder: Path, rank: int) -> int:
    file, deadline = folder / f"pid-{rank}", time.monotonic() + 60
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < deadline, f"rank {rank} has not started"
        time.sleep(0.02)
    return int(file.read_text())


def gone(pid: int) -> bool:
    """Whether a process has ended, though perhaps nobody asked how."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_an_error_of_the_runtime_is_no_wrong_input(capsys):
    """JAX raises a lost process as a ValueError where it copies an array to the host."""
    for text in ("UNKNOWN: Gloo all-reduce failed: Read error", "INTERNAL: NCCL operation failed"):

        def work(text=text):
            raise ValueError(text)

        with pytest.raises(ValueError, match=text):  # `ending` makes it the code of lost peers
            parse.run(work)
        assert is_of_jax(ValueError(text)) and not is_of_jax(ValueError("UNKNOWN field"))
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 2, 3, 42])
def test_what_a_restart_cannot_change_is_not_restarted(tmp_path, code):
    end(supervise(tmp_path, f"beat(1); sys.exit({code})"), code)
    assert starts(tmp_path) == 1


def test_a_death_ends_all_ranks_within_seconds_with_their_stacks(tmp_path):
    body = """
beat(10 * number)
if number == 1:
    if rank == "1":
        time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""
    process = supervise(tmp_path, body, ranks=2)
    other, victim = (await_pid(tmp_path, rank) for rank in (0, 1))
    while Path(f"/proc/{victim}").exists():
        time.sleep(0.02)
    died = time.monotonic()
    while Path(f"/proc/{other}").exists():
        time.sleep(0.02)
    assert time.monotonic() - died < 3
    output = end(process, 0)
    assert "exit code -9" in output and "rank.py" in output and "most recent call first" in output
    assert starts(tmp_path, 0) == starts(tmp_path, 1) == 2


def test_a_rank_that_failed_because_another_was_killed_is_started_again(tmp_path):
    body = """
beat(10 * number)
if number == 1:
    if rank == "0":
        while not (folder / "killed").exists():
            time.sleep(0.01)
        os._exit(2)
    (folder / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    end(supervise(tmp_path, body, ranks=2), 0)
    assert starts(tmp_path, 0) == starts(tmp_path, 1) == 2


def test_a_stopped_rank_is_noticed_by_its_silence(tmp_path):
    process = supervise(tmp_path, "go_on(60 if number == 1 else 0.2)", ranks=2, silence=1.5)
    pid = await_pid(tmp_path, 1)
    await_pid(tmp_path, 0)
    time.sleep(0.3)
    os.kill(pid, signal.SIGSTOP)
    output = end(process, 0)
    assert "no heartbeat of rank [1]" in output and "exit code 4" in output
    assert starts(tmp_path) == 2


def test_restarts_end_where_they_come_no_further(tmp_path):
    output = end(supervise(tmp_path, "beat(7); sys.exit(5)"), 5)
    assert starts(tmp_path) == 4  # one that came to step 7, three that came no further
    assert "3 restarts have not come further than step 7" in output


def test_a_signal_goes_to_all_ranks_and_nothing_is_restarted(tmp_path):
    body = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
go_on(60)
"""
    process = supervise(tmp_path, body, ranks=2)
    for rank in (0, 1):
        await_pid(tmp_path, rank)
    process.send_signal(signal.SIGTERM)
    end(process, 42)
    assert starts(tmp_path, 0) == starts(tmp_path, 1) == 1


def test_a_request_for_a_trace_is_passed_on_and_ends_nothing(tmp_path):
    body = """
traced = folder / f"traced-{rank}"
signal.signal(signal.SIGUSR2, lambda *_: traced.write_text("yes"))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
go_on(60)
"""
    process = supervise(tmp_path, body, ranks=2)
    for rank in (0, 1):
        await_pid(tmp_path, rank)
    process.send_signal(signal.SIGUSR2)
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"traced-{rank}").is_file() for rank in (0, 1)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    end(process, 42)
    assert starts(tmp_path, 0) == starts(tmp_path, 1) == 1


def test_ranks_die_with_their_supervisor(tmp_path):
    process = supervise(tmp_path, "go_on(60)")
    pid = await_pid(tmp_path, 0)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)


STORAGE = ("clients", "errors", "local", "probe", "ranges", "stores", "whole")


def test_the_command_imports_nothing_heavy():
    code = (
        "import sys, json, easyanimate_jax.commands.supervise; "
        "roots = ('easyanimate_jax', 'jax', 'numpy'); "
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in roots]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    ours = ["", ".commands", ".commands.parse", ".commands.supervise", ".processes", ".training"]
    ours += [".storage", *(f".storage.{name}" for name in STORAGE)]
    ours += [f".training.safety{name}" for name in ("", ".exits", ".supervisor")]
    assert sorted(json.loads(ran.stdout)) == [f"easyanimate_jax{name}" for name in sorted(ours)]
