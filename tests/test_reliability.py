"""Faults in train.py itself, on one process: kills, signals, full disks, NaN, hangs.

Every run trains the first stage of the cut in test_loop.py; what counts is how it ends: the exit
code, and the bits of its last checkpoint beside those of a run without faults. The numbers R1 to
R15 are those of docs/reliability.md; `pytest -m reliability` runs them all.
"""
# ruff: noqa: F401, F811 (pytest finds fixtures by name)

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_loop import CUT, ROOT, folder, start

from easyanimate_jax.training import checkpoint
from easyanimate_jax.weights import run_folder

STEPS = 12
STAGE = f"""
stage = replace(stages[0], steps={STEPS}, microbatch=None, batch_size=2)
config = replace(config, stages=(stage,), save_every=4)
"""
SUPERVISED = [sys.executable, "-m", "easyanimate_jax", "supervise"]


def command(folder: Path, run: str, *options: str) -> list[str]:
    config = folder / f"{run}.py"
    config.write_text(CUT.format(folder=folder, run=run) + STAGE)
    return [sys.executable, "train.py", str(config), *options]


def end(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=1200)[0]
    assert process.returncode == code, output
    return output


def prints(folder: Path, run: str, step: int = STEPS) -> dict:
    """The fingerprints of a checkpoint, which its files have, too; nothing else is left there."""
    path = folder / run / "checkpoints" / str(step)
    assert checkpoint.damage(path) == []
    assert run_folder.is_verified(path)
    left = [p.name for p in path.parent.iterdir()]
    assert all(name.isdigit() for name in left), left
    return run_folder.read_step_meta(path)["arrays"]


def rows(folder: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def await_section(folder: Path, run: str, section: str, process: subprocess.Popen, rank=0) -> None:
    """Until a rank's heartbeat says that it is in a section."""
    file = folder / f"beats-{run}" / f"{rank}.json"
    while not (file.is_file() and f'"{section}"' in file.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(folder):
    end(start(command(folder, "whole1")))
    return prints(folder, "whole1")


@pytest.mark.slow
@pytest.mark.reliability
def test_r3_a_run_goes_on_from_any_step_to_the_same_bits(folder, whole):
    """Weights, moments, average, schedule, dropped captions and batches all follow the step."""
    steps = sorted(random.sample(range(1, STEPS), 3))
    faults = ",".join(f"step@{step}" for step in steps)
    once = {"EASYANIMATE_FAULTS": faults, "EASYANIMATE_FAULTS_ONCE": str(folder / "r3")}
    output = end(start([*SUPERVISED, "--", *command(folder, "resumed")], **once))
    assert output.count("starting again") == 3, faults
    assert prints(folder, "resumed") == whole, faults
    made, expected = rows(folder, "resumed"), rows(folder, "whole1")
    same = ("step", "loss", "grad_norm", "learning_rate", "real_tokens")
    assert [[row[k] for k in same] for row in made] == [[row[k] for k in same] for row in expected]


@pytest.mark.slow
@pytest.mark.reliability
def test_r5_a_signal_saves_and_no_step_is_lost(folder, whole):
    beats = {"EASYANIMATE_HEARTBEATS": str(folder / "beats-asked")}
    process = start(command(folder, "asked"), **beats)
    await_section(folder, "asked", "compile", process)
    process.send_signal(signal.SIGTERM)
    output = end(process, 42)
    step = int(output.split("asked to stop: saved at step ")[1].split()[0])
    assert f"resuming at step {step}" in end(start(command(folder, "asked")))
    assert prints(folder, "asked") == whole


@pytest.mark.slow
@pytest.mark.reliability
def test_r7_a_full_disk_costs_two_checkpoints_and_nothing_else(folder, whole):
    """The kernel refuses to write for two saves in a row, and then no more."""
    words = command(folder, "full", "--save-every", "2")
    output = end(start(words, EASYANIMATE_FAULTS="full@6-8"))
    for step in (6, 8):
        assert f"checkpoint {step} was not saved" in output
    assert run_folder.complete_steps(folder / "full" / "checkpoints") == [10, 12]
    assert prints(folder, "full") == whole


@pytest.mark.slow
@pytest.mark.reliability
def test_r12_a_batch_that_is_not_finite_changes_nothing_but_two_counters(folder):
    more = ("--save-every", "1", "--keep-every", "1", "--stages.0.steps", "8")
    for value in ("nan", "inf"):
        end(start(command(folder, value, *more), EASYANIMATE_FAULTS=f"{value}@5"))
        assert [row["skipped"] for row in rows(folder, value)] == [0] * 5 + [1] * 3
        before, after = (prints(folder, value, step) for step in (5, 6))
        assert before["ema"] == after["ema"]
        differ = {k for k in before["state"] if before["state"][k] != after["state"][k]}
        assert differ == {"step", "skipped"}
    assert prints(folder, "nan", 8) == prints(folder, "inf", 8)


@pytest.mark.slow
@pytest.mark.reliability
def test_r12_many_nans_bring_the_run_back_and_past_them(folder):
    output = end(start(command(folder, "back"), EASYANIMATE_FAULTS="nan@1-12"))
    assert "10 updates in a row were not finite at step 10: back to step" in output
    (event,) = map(json.loads, (folder / "back" / "divergence.jsonl").read_text().splitlines())
    assert event["offset"] == 200 and len(event["batches"]) == 10
    assert [row["step"] for row in rows(folder, "back")] == list(range(STEPS))
    assert rows(folder, "back")[-1]["skipped"] == 0
    assert prints(folder, "back")


@pytest.mark.slow
@pytest.mark.reliability
def test_r12_a_loss_that_jumps_brings_the_run_back(folder):
    words = command(folder, "spiked", "--stages.0.steps", "30")
    output = end(start(words, EASYANIMATE_FAULTS="spike@22-29"))
    assert "the loss was above 10 times its median 3 times in a row at step 24" in output
    losses = [row["loss"] for row in rows(folder, "spiked")]
    assert len(losses) == 30 and max(losses) < 10
    assert prints(folder, "spiked", 30)


@pytest.mark.slow
@pytest.mark.reliability
def test_r12_a_run_that_cannot_be_mended_leaves_with_its_own_code(folder):
    output = end(start(command(folder, "lost"), EASYANIMATE_FAULTS="nan"), 3)
    assert "after 3 returns to earlier checkpoints" in output


@pytest.mark.slow
@pytest.mark.reliability
def test_r8_a_hang_prints_the_stacks_and_leaves(folder, whole):
    words = command(folder, "hang", "--hang-seconds", "4")
    output = end(start(words, EASYANIMATE_FAULTS="hang@3"), 4)
    assert "loop.py" in output and "in before_step" in output
    lasted, limit = (float(output.split(word)[1].split()[0]) for word in ("hang: ", "limit "))
    assert lasted < limit + 3


@pytest.mark.slow
def test_goodput_adds_up_over_a_kill(folder, whole):
    end(start(command(folder, "killed"), EASYANIMATE_FAULTS="step@7"), -9)
    end(start(command(folder, "killed")))
    lines = (folder / "killed" / "goodput.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == STEPS and 0 < last["goodput"] < 1
    assert last["seconds"]["step"] > 0 and last["seconds"]["compile"] > 0
    assert prints(folder, "killed") == whole


@pytest.mark.slow
def test_a_replayed_step_has_the_same_bits(folder, whole):
    output = end(start(command(folder, "whole1", "--replay", "8")))
    assert "step 8 made twice: nothing differs" in output
    assert len(rows(folder, "whole1")) == STEPS
    error = end(start(command(folder, "whole1", "--replay", "9")), 2)
    assert "has no good checkpoint 9" in error
