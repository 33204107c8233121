"""docs/generate.md shows what its commands make, on the demos' checkpoints."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demos.score import attributes
from easyanimate_jax.commands import parse, sample
from easyanimate_jax.data import media
from easyanimate_jax.generation.guard import suspicion
from easyanimate_jax.generation.request import FILES

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
RUNS = {"runs/demo/train", "runs/demo_control/train"}


@pytest.fixture(scope="module")
def commands():
    found = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["commands"]()
    return {
        name: parse.options(sample.Options, words, "sample", "") for name, words in found.items()
    }


def test_every_picture_of_the_guide_is_there_and_all_are_small(commands):
    text = (ROOT / "docs" / "generate.md").read_text()
    shown = re.findall(r"\(pictures/(\w+\.png)\)", text)
    assert len(commands) == text.count("python sample.py runs/") == len(shown) - 4
    assert all((PICTURES / name).is_file() for name in shown)
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < 1e6


def test_the_commands_of_the_guide_name_files_that_come_with_it(commands):
    assert {str(a.model) for a in commands.values()} == RUNS
    requests = [a.request for a in commands.values()]
    files = [getattr(r, name) for r in requests for name in FILES if getattr(r, name)]
    assert len(files) >= 8 and all((ROOT / file).is_file() for file in files)


@pytest.mark.slow
def test_the_commands_of_the_guide_make_what_they_ask_for(commands, tmp_path):
    made = {run for run in RUNS if (ROOT / run / "summary.json").is_file()}
    if not made:
        pytest.skip(f"{' and '.join(RUNS)} are missing or unfinished: make demo, make demo-control")
    ran = subprocess.run(
        [sys.executable, "docs/pictures.py", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name, a in commands.items():
        if str(a.model) not in made:
            continue
        sheet = media.read_image(tmp_path / f"{name}.png")
        frames = np.stack(np.split(sheet, sheet.shape[1] // sheet.shape[0], axis=1))
        assert not suspicion(frames), name
        shown = attributes(frames)
        assert (
            f"a {shown.colour} " in a.request.prompt
            and f"a {shown.background} " in a.request.prompt
        ), name
