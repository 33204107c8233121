"""train.py itself, on a cut of configs/demo.py: stages, surgery, stopping, resuming."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from arrays import flat_weights
from fast_compiles import FAST_COMPILES
from latents import random_latents

from easyanimate_jax.commands import train
from easyanimate_jax.runs import programs
from easyanimate_jax.runs.config import from_json
from easyanimate_jax.weights.folder import load_mmdit
from easyanimate_jax.weights.run_folder import read_meta

ROOT = Path(__file__).parent.parent
CUT = """
from dataclasses import replace
from configs.demo import config as demo
from easyanimate_jax.runs.config import SampleConfig

steps = {{"image": 3, "small_t2v": 4, "medium_i2v": 7, "large_i2v": 2}}
stages = tuple(
    replace(s, steps=steps[s.name], batch_size=3, microbatch=2)
    for s in demo.stages
    if s.name in steps
)
config = replace(
    demo,
    prepared="{folder}/latents",
    run="{folder}/{run}",
    text="{folder}/text",
    stages=stages,
    model=replace(demo.model, depth=1, mmdit_depth=1, heads=2, head_width=16, text_widths=(8, 12)),
    optimizer=replace(demo.optimizer, matrices="adam"),  # which compiles faster
    samples=SampleConfig(),
    save_every=4,
    log_every=1,
)
"""
STEPS = 16
PRINT = "of the text encoders"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared latents of random numbers for the demo's four sets."""
    root = tmp_path_factory.mktemp("cut")
    grids = {"image": (1, 6, 8), "small": (3, 4, 4), "medium": (3, 8, 8), "large": (3, 16, 16)}
    random_latents(root / "latents", grids, (8, 12), weights={"text": PRINT})
    return root


def launch(folder: Path, run: str, devices: int = 1, *overrides: str) -> subprocess.Popen:
    config = folder / f"{run}.py"
    config.write_text(CUT.format(folder=folder, run=run))
    return start([sys.executable, "train.py", str(config), *overrides], devices)


def start(words: list[str], devices: int = 1, **variables: str) -> subprocess.Popen:
    """A command with virtual devices; all share one compilation cache."""
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILES}"
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ
        | {
            "XLA_FLAGS": flags,
            "PYTHONPATH": str(ROOT),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def stop_at(process: subprocess.Popen, step: int, how: signal.Signals) -> None:
    """Send a signal as soon as the run reports a step."""
    for line in process.stdout:
        if f"step {step}/" in line:
            process.send_signal(how)
            return
    raise AssertionError("the run ended before that step")


def losses(folder: Path, run: str) -> list[float]:
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(STEPS))
    return [row["loss"] for row in rows]


def weights(folder: Path, run: str) -> dict[str, np.ndarray]:
    """Everything in the last checkpoint."""
    import orbax.checkpoint as ocp

    step, meta = read_meta(folder / run)
    assert (step, meta["in_channels"]) == (STEPS, 33)
    with ocp.PyTreeCheckpointer() as checkpointer:
        items = [
            checkpointer.restore(folder / run / "checkpoints" / str(step) / item)
            for item in ("state", "ema")
        ]
    return {f"{i}.{k}": np.asarray(v) for i, item in enumerate(items) for k, v in item.items()}


@pytest.fixture(scope="module")
def whole(folder):
    return finish(launch(folder, "whole"))


def test_the_schedule_runs_through_every_stage(folder, whole):
    facts = json.loads((folder / "whole" / "summary.json").read_text())
    assert facts["steps"] == STEPS
    assert facts["compiled_train_programs"] == 3  # 48 t2v, 192 i2v, 768 i2v
    assert "input channels 16 -> 33" in whole
    for word in ("image 1/3", "large_i2v 2/2", "tok/s", "data wait", "eta stage"):
        assert word in whole
    steps = {int(p.name) for p in (folder / "whole" / "checkpoints").iterdir() if p.name.isdigit()}
    assert {3, 7, 14, 16} <= steps  # every stage boundary is kept
    assert read_meta(folder / "whole")[1]["weights"] == {"text": PRINT}  # compared by load_pipeline


def test_the_learning_rate_warms_up_in_every_stage(folder, whole):
    lines = (folder / "whole" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    stages = from_json((folder / "whole" / "config.json").read_text()).stages
    expected = [stage.learning_rate_at(step) for stage in stages for step in range(stage.steps)]
    np.testing.assert_allclose(rates, expected)
    first = np.cumsum([stage.steps for stage in stages])[:-1]
    assert all(rates[step] < rates[step - 1] for step in first)


@pytest.mark.parametrize(
    "how, code",
    [pytest.param(signal.SIGTERM, 42, marks=pytest.mark.slow), (signal.SIGKILL, -9)],
)
def test_a_stopped_run_goes_on_to_the_same_bits(folder, whole, how, code):
    run = how.name
    first = launch(folder, run)
    stop_at(first, 6, how)
    finish(first, code)
    second = finish(launch(folder, run))
    assert "resuming at step" in second
    assert losses(folder, run) == losses(folder, "whole")
    ours, theirs = weights(folder, run), weights(folder, "whole")
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.slow
def test_the_schedule_on_eight_devices_gives_the_same_losses(folder, whole):
    mesh = ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.context", "2", "--mesh.tensor", "2")
    finish(launch(folder, "sharded", 8, *mesh))
    np.testing.assert_allclose(losses(folder, "sharded"), losses(folder, "whole"), rtol=1e-4)


def test_changed_data_is_refused(folder, whole):
    output = finish(launch(folder, "whole", 1, "--seed", "7"), code=2)
    assert "error: checkpoint 16 belongs to stage 'large_i2v' and seed 42" in output


@pytest.mark.slow
def test_a_run_starts_from_the_named_step_of_another(folder, whole):
    """At a learning rate of 0 the weights that it saves are those that it was given."""
    options = ["--init", str(folder / "whole"), "--init-step", "7"]
    process = launch(folder, "from_step", 2, *options, "--stages.0.learning-rate", "0")
    stop_at(process, 1, signal.SIGTERM)
    finish(process, 42)
    saved = flat_weights(load_mmdit(folder / "from_step", weights="raw"))
    for name, value in flat_weights(load_mmdit(folder / "whole", step=7)).items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


def test_a_step_larger_than_the_memory_is_refused_before_it_runs(folder, monkeypatch, capsys):
    monkeypatch.setattr(programs, "device_memory", lambda: 1_000_000)
    config = folder / "large.py"
    config.write_text(CUT.format(folder=folder, run="large"))
    assert train.main([str(config)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: stage 'image' at 48 tokens, 8 rows at once, keeping nothing, ")
    assert "activations and temporaries" in error and "Use more devices; `python -m" in error
    assert not (folder / "large").exists()
