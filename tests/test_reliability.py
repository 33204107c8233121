"""Faults in train.py itself, small: kills, hangs, full disks, numbers that are not numbers.

Every run trains the first stage of the cut in test_trainer.py; what counts is how it ends: the exit
code, and the bits of its last checkpoint beside those of a run without faults.
"""
# ruff: noqa: F401, F811 (pytest finds fixtures by name)

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_trainer import CUT, ROOT, folder, start

from easyanimate_jax.training import checkpoint

STEPS = 12
STAGE = f"""
config = replace(config, stages=(replace(stages[0], steps={STEPS}, microbatch=None, batch_size=2),))
"""
SUPERVISED = [sys.executable, "-m", "easyanimate_jax.training.supervisor"]


def command(folder: Path, run: str, *options: str) -> list[str]:
    config = folder / f"{run}.py"
    config.write_text(CUT.format(folder=folder, run=run) + STAGE)
    return [sys.executable, "train.py", str(config), *options]


def end(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=1200)[0]
    assert process.returncode == code, output
    return output


def prints(folder: Path, run: str) -> dict:
    """The fingerprints of a finished run, which its files have, too."""
    path = folder / run / "checkpoints" / str(STEPS)
    assert checkpoint.damage(path) == []
    assert checkpoint.is_verified(path)
    return checkpoint.read_step_meta(path)["arrays"]


def rows(folder: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def await_step(folder: Path, run: str, step: int, process: subprocess.Popen) -> None:
    """Until the run's heartbeats or metrics have seen a step."""
    file = folder / run / "metrics.jsonl"
    while not (file.is_file() and f'"step": {step}' in file.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(folder):
    end(start(folder, command(folder, "whole1")))
    return prints(folder, "whole1")


def test_one_batch_of_nan_is_skipped_and_counted(folder, whole):
    end(start(folder, command(folder, "nan1"), EASYANIMATE_FAULTS="nan@5"))
    assert [row["skipped"] for row in rows(folder, "nan1")] == [0] * 5 + [1] * 7
    assert prints(folder, "nan1").keys() == whole.keys()
    assert prints(folder, "nan1") != whole


def test_many_nans_bring_the_run_back_and_past_them(folder):
    output = end(start(folder, command(folder, "back"), EASYANIMATE_FAULTS="nan@1-11"))
    assert "10 updates in a row were not finite at step 10: back to step" in output
    (event,) = map(json.loads, (folder / "back" / "divergence.jsonl").read_text().splitlines())
    assert event["offset"] == 200 and len(event["batches"]) == 10
    assert [row["step"] for row in rows(folder, "back")] == list(range(STEPS))
    assert prints(folder, "back")


def test_a_run_that_cannot_be_mended_leaves_with_its_own_code(folder):
    output = end(start(folder, command(folder, "lost"), EASYANIMATE_FAULTS="nan"), 3)
    assert "after 3 returns to earlier checkpoints" in output


def test_a_hang_prints_the_stacks_and_leaves(folder, whole):
    words = command(folder, "hang", "--hang-seconds", "4")
    output = end(start(folder, words, EASYANIMATE_FAULTS="hang@3"), 4)
    assert "hang: 4." in output and "trainer.py" in output and "in _update" in output


def test_goodput_adds_up_over_a_kill(folder, whole):
    end(start(folder, command(folder, "killed"), EASYANIMATE_FAULTS="step@7"), -9)
    end(start(folder, command(folder, "killed")))
    lines = (folder / "killed" / "goodput.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == STEPS and 0 < last["goodput"] < 1
    assert last["seconds"]["step"] > 0 and last["seconds"]["compile"] > 0
    assert prints(folder, "killed") == whole


def test_a_replayed_step_has_the_same_bits(folder, whole):
    output = end(start(folder, command(folder, "whole1", "--replay", "10")))
    assert "step 10 made twice: nothing differs" in output
    assert len(rows(folder, "whole1")) == STEPS
    error = end(start(folder, command(folder, "whole1", "--replay", "9")), 2)
    assert "has no good checkpoint 9" in error


def test_two_processes_survive_kills_anywhere_and_end_in_the_same_bits(folder):
    """A signal to one of two stops both at one step; then they die in turn, in the worst places."""
    ranks = [*SUPERVISED, "--ranks", "2", "--"]
    end(start(folder, [*ranks, *command(folder, "pair")]))
    process = start(folder, [*ranks, *command(folder, "faulty")])
    await_step(folder, "faulty", 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    assert "asked to stop: saved at step" in end(process, 42)
    output = end(
        start(
            folder,
            [*ranks, *command(folder, "faulty")],
            EASYANIMATE_FAULTS="step@7/1,writing@8/0,written@8/1,deleting@4/0",
            EASYANIMATE_FAULTS_ONCE=str(folder / "once"),
        )
    )
    assert output.count("starting again") >= 3
    assert prints(folder, "faulty") == prints(folder, "pair")
    left = [p.name for p in (folder / "faulty" / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in left), left
