"""Where the time goes, over restarts, and how a hang ends."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from easyanimate_jax.training.monitor import PATIENCE, Monitor

ROOT = Path(__file__).parent.parent


def spend(monitor: Monitor, section: str, seconds: float, step: int) -> None:
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
from easyanimate_jax.training.monitor import Monitor

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
