"""A run folder of an earlier version (3c382df) samples as it did there, and goes on to its losses.

tests/data/run_of_3c382df.tar.xz holds what that version wrote: `train` (stopped by SIGTERM at step
3 of 8, with `whole_metrics.jsonl` of the run that was not stopped and `sample.mp4` of its
sample.py), `vae` and `text`. Its latents are random numbers, drawn here again.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fast_compiles import FAST_COMPILES
from test_loop import ROOT

from easyanimate_jax.data import media
from easyanimate_jax.data.records import INDEX_TYPES, Writer, write_texts
from easyanimate_jax.runs.config import from_json, to_json

SAVED = Path(__file__).parent / "data" / "run_of_3c382df.tar.xz"
CONFIG = """
from pathlib import Path
from easyanimate_jax.runs.config import from_json
config = from_json(Path("train/config.json").read_text())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("old")
    with tarfile.open(SAVED) as tar:
        tar.extractall(root, filter="data")
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float16)

    for name, (T, gh, gw) in {"small": (3, 4, 4), "medium": (3, 8, 8)}.items():
        draws = 2 * (name == "medium")
        writer = Writer(root / "latents" / name, {"set": {"condition_draws": draws}})
        records, rows = [], []
        for clip in range(5):
            N = T * gh * gw
            record = {"mean": draw(N, 64), "logvar": draw(N, 64) - 4}
            record |= {"text0": draw(2, 4, 16), "text1": draw(2, 3, 16)}
            if draws:
                record |= {
                    "condition_mean": draw(draws, N, 64),
                    "condition_logvar": draw(draws, N, 64) - 4,
                    "condition_mask": draw(draws, N, 4),
                    "condition_flag": np.ones(draws, np.float16),
                }
            records.append(record)
            sizes = (4 * T - 3, 16 * gh, 16 * gw, T, gh, gw, N, 512, 512)
            values = (f"{clip}.mp4", "video", *sizes, 2, "")
            rows.append(dict(zip(INDEX_TYPES, values, strict=True)))
        writer.write(0, records, rows)
        writer.finish(1)
    empty = np.zeros((1, 4, 16)), np.zeros((1, 3, 16))
    write_texts(root / "latents" / "empty.safetensors", empty)
    (root / "config.py").write_text(CONFIG)
    return root


def run(folder: Path, *words: str) -> str:
    flags = f"--xla_force_host_platform_device_count=1 {FAST_COMPILES}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_config_is_read(folder):
    text = (folder / "train" / "config.json").read_text()
    config = from_json(text)
    assert from_json(to_json(config)) == config


def test_an_old_run_samples_and_goes_on(folder):
    sample = (str(ROOT / "sample.py"), "train", "--prompt", "a red circle", "--steps", "3")
    run(folder, *sample, "--output", "out")
    made, then = (
        media.read_clip(path, 0, 5).astype(int)
        for path in (folder / "out" / "00000001.mp4", folder / "train" / "sample.mp4")
    )
    assert np.abs(made - then).mean() < 2

    output = run(folder, str(ROOT / "train.py"), "config.py")
    assert "resuming at step 3 (stage 'small_t2v')" in output
    losses = [
        [json.loads(line)["loss"] for line in (folder / "train" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "whole_metrics.jsonl")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
