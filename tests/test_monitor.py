"""Where the time goes, over restarts, and how a hang ends."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from easyanimate_jax.training.safety.cloud_goodput import CloudGoodput, open_sink
from easyanimate_jax.training.safety.monitor import PATIENCE, Monitor

ROOT = Path(__file__).parent.parent


def spend(monitor: Monitor, section: str, seconds: float, step: int | None) -> None:
    monitor.enter(section, step)
    time.sleep(seconds)


def test_seconds_add_up_and_go_on_after_a_restart(tmp_path):
    first = Monitor(tmp_path, process=0, hang_seconds=60.0)
    for step in range(3):
        spend(first, "data", 0.01, step)
        spend(first, "step", 0.05, step)
    spend(first, "save", 0.02, 3)
    first.close()
    time.sleep(0.2)
    second = Monitor(tmp_path, process=0, hang_seconds=60.0)
    spend(second, "step", 0.03, 2)  # made before: no progress
    spend(second, "step", 0.03, 3)
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "goodput.jsonl").read_text().splitlines()]
    seconds = rows[-1]["seconds"]
    assert seconds["step"] == pytest.approx(3 * 0.05 + 0.03, abs=0.1)
    assert 0.03 <= seconds["rework"] < 0.15 and seconds["down"] >= 0.2
    assert rows[-1]["goodput"] == pytest.approx(seconds["step"] / sum(seconds.values()), abs=1e-4)
    assert [row["step"] for row in rows] == [3, 3]


def test_what_this_process_spent_leaves_earlier_ones_out(tmp_path):
    first = Monitor(tmp_path, process=0, hang_seconds=60.0)
    spend(first, "compile", 0.3, None)
    first.close()
    second = Monitor(tmp_path, process=0, hang_seconds=60.0)
    spend(second, "restore", 0.05, None)
    spend(second, "compile", 0.02, None)
    spent = second.spent()
    assert set(spent) == {"start", "restore", "compile"}  # no section that was not entered
    assert 0.05 <= spent["restore"] < 0.2 and 0.02 <= spent["compile"] < 0.2
    second.close()


def test_only_process_0_writes_goodput_and_each_has_a_heartbeat(tmp_path):
    monitor = Monitor(tmp_path, process=1, hang_seconds=60.0)
    monitor.enter("step", 7)
    time.sleep(1.2)
    monitor.close()
    beat = json.loads((tmp_path / "heartbeats" / "1.json").read_text())
    assert beat["step"] == 7 and time.time() - beat["time"] < 30
    assert not (tmp_path / "goodput.jsonl").exists()


def test_a_step_may_last_as_long_as_steps_do(tmp_path):
    monitor = Monitor(tmp_path, process=0, hang_seconds=60.0)
    assert monitor.limit() == PATIENCE
    monitor.enter("step", 0)
    assert monitor.limit() == 60
    monitor.recent_steps.append(100.0)
    assert monitor.limit() == 500
    monitor.enter("save", 1)
    assert monitor.limit() == PATIENCE
    monitor.close()


@pytest.mark.parametrize("closed", [False, True])
def test_a_hang_leaves_with_stacks_and_its_code_whoever_reads(tmp_path, closed):
    code = f"""
import sys, time
from pathlib import Path
from easyanimate_jax.training.safety.monitor import Monitor

def stuck():
    time.sleep(60)

monitor = Monitor(Path({str(tmp_path)!r}), process=0, hang_seconds=0.3)
monitor.enter("step", 5)
if {closed}:
    sys.stderr.close()
stuck()
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 4
    if not closed:
        assert "in 'step' at step 5" in ran.stderr and "in stuck" in ran.stderr


class Calls:
    """In place of Google's recorder: notes what it is told, without `record_` and `_time`."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        short = name.removeprefix("record_").removesuffix("_time")
        return lambda *values, **named: self.told.append((short, *values, *named.values()))


def test_google_cloud_is_told_the_same_sections(tmp_path):
    calls = Calls()
    monitor = Monitor(tmp_path, process=0, hang_seconds=60.0, sink=CloudGoodput(calls))
    for section, step in [("restore", None), ("compile", None), ("start", None), ("data", 0)]:
        monitor.enter(section, step)
    assert calls.told == [
        ("job_start",),
        ("training_preparation_start",),
        ("training_preparation_end",),
        ("data_loading_start",),
    ]
    calls.told.clear()
    for section, step in [("compile", None), ("compile", 0), ("save", 1), ("data", 1), ("step", 1)]:
        monitor.enter(section, step)
    monitor.close()
    assert calls.told == [
        ("data_loading_end",),
        ("custom_badput_event_start", "compile"),
        ("custom_badput_event_end", "compile"),
        ("step_start", 0),
        ("custom_badput_event_start", "save"),
        ("custom_badput_event_end", "save"),
        ("data_loading_start",),
        ("data_loading_end",),
        ("step_start", 1),
        ("job_end",),
        ("flush",),
    ]


class MemoryLog:
    """Where Google's recorder writes and its calculator reads, instead of Cloud Logging."""

    def __init__(self):
        self.entries = []

    def write_cloud_logging_entry(self, entry):
        self.entries.append(entry)

    def read_cloud_logging_entries(self, *_, **__):
        new, self.entries = self.entries, []
        return new, (None, None)

    def flush(self):
        pass


def test_googles_own_sum_of_a_run_is_ours(tmp_path):
    """With the real package, which is no part of the tests' environment."""
    goodput = pytest.importorskip("ml_goodput_measurement").goodput
    log = MemoryLog()
    for steps, stop in (range(8), "save"), (range(6, 20), "sample"):  # two steps again
        sink = CloudGoodput(goodput.GoodputRecorder("job", "log", True, log))
        monitor = Monitor(tmp_path, process=0, hang_seconds=60.0, sink=sink)
        spend(monitor, "restore", 0.3, None)
        for step in steps:
            spend(monitor, "data", 0.01, step)
            spend(monitor, "step", 0.1, step)
            if step in (3, 15):
                spend(monitor, stop, 0.3, None)
        monitor.enter("data", steps[-1] + 1)
        monitor.close()
        if steps[0] == 0:
            log.entries.pop()  # a process that is killed says no good-bye
        time.sleep(0.3)
    calculator = goodput.GoodputCalculator("job", "log", log, cache_dir=str(tmp_path))
    theirs, _, last = calculator.get_job_goodput()
    seconds = json.loads((tmp_path / "goodput.jsonl").read_text().splitlines()[-1])["seconds"]
    # A step includes the wait for its data there.
    ours = (seconds["step"] + seconds["data"]) / sum(seconds.values())
    assert last == 19 and theirs == pytest.approx(100 * ours, abs=3)


def test_a_sink_that_cannot_be_is_refused_and_other_ranks_have_none(monkeypatch):
    assert open_sink("", process=0) is None and open_sink("pod-7", process=1) is None
    monkeypatch.setitem(sys.modules, "ml_goodput_measurement", None)
    with pytest.raises(ValueError, match=r"goodput_job is 'pod-7'.*pip install 'easyanimate_jax"):
        open_sink("pod-7", process=0)
