"""A run folder of an earlier version (3c382df) samples as it did there, and goes on to its losses.

tests/data/run_of_3c382df.tar.xz holds what that version wrote: `train` (stopped by SIGTERM at step
3 of 8, with `whole_metrics.jsonl` of the run that was not stopped), `vae` and `text`.
tests/data/sample_of_3c382df.npy holds the frames that its sample.py made, before they were written
as a video. The latents are random numbers, drawn here again.
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
from latents import random_latents
from test_loop import ROOT

from easyanimate_jax.data import media
from easyanimate_jax.runs.config import from_json, to_json

SAVED = Path(__file__).parent / "data" / "run_of_3c382df.tar.xz"
FRAMES = SAVED.with_name("sample_of_3c382df.npy")
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
    random_latents(root / "latents", {"small": (3, 4, 4), "medium": (3, 8, 8)}, (16, 16))
    (root / "config.py").write_text(CONFIG)
    return root


def run(folder: Path, *words: str) -> str:
    flags = f"--xla_force_host_platform_device_count=1 {FAST_COMPILES}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, text=True, **pipes)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_its_config_is_read(folder):
    text = (folder / "train" / "config.json").read_text()
    config = from_json(text)
    assert from_json(to_json(config)) == config


def test_an_old_run_samples_and_goes_on(folder):
    sample = (str(ROOT / "sample.py"), "train", "--prompt", "a red circle", "--steps", "3")
    run(folder, *sample, "--output", "out")
    media.write_video(folder / "then.mp4", np.load(FRAMES))
    made, then = (
        media.read_clip(folder / path, 0, 5).astype(int)
        for path in ("out/00000001.mp4", "then.mp4")
    )
    assert np.abs(made - then).mean() < 2

    output = run(folder, str(ROOT / "train.py"), "config.py")
    assert "resuming at step 3 (stage 'small_t2v')" in output
    losses = [
        [json.loads(line)["loss"] for line in (folder / "train" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "whole_metrics.jsonl")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


# What Windows lacks: modules, and names in others. Only this package does without them here: other
# libraries have code for both systems, and have been imported before.
WINDOWS = """
import builtins, faulthandler, json, os, signal, sys
import jax, numpy, orbax.checkpoint, tensorstore, tqdm, transformers, tyro
from easyanimate_jax.__main__ import main

modules = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios"}
real = builtins.__import__

def imported(name, globals=None, *more, **named):
    if name in modules and (globals or {}).get("__name__", "").startswith("easyanimate_jax"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return real(name, globals, *more, **named)

builtins.__import__ = imported
for module, names in {
    os: "fork uname readv killpg getuid geteuid posix_fallocate sched_getaffinity "
    "O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_DIRECTORY",
    signal: "SIGKILL SIGSTOP SIGCONT SIGUSR1 SIGALRM SIGPROF setitimer getitimer",
    faulthandler: "register unregister",
}.items():
    for name in names.split():
        delattr(module, name)
from pathlib import Path
is_file = Path.is_file
Path.is_file = lambda path: not str(path).startswith("/proc/") and is_file(path)
sys.exit(max(main(words) for words in json.loads(sys.argv[1])))
"""


def test_windows_can_convert_and_sample(folder):
    media.write_video(folder / "in.mp4", np.full((5, 64, 64, 3), 90, np.uint8))
    convert = ["convert", "train", "converted", "--to", "diffusers", "--only", "transformer"]
    sample = ["sample", "train", "--prompt", "x", "--steps", "2", "--video", "in.mp4"]
    output = run(folder, "-c", WINDOWS, json.dumps([convert, sample]))
    assert " MB/s\n" in output and "peak RSS" not in output  # nobody counts it there
    assert list(folder.glob("converted/*.safetensors")) and list(folder.glob("samples/*.mp4"))
