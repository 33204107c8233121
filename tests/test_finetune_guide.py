"""docs/finetune.md: its commands in their order, on small weights in the released layout."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline, EasyAnimatePipeline
from test_export import MODEL, exported, random_module
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer
from test_lora import random_lora

from easyanimate_jax.data import media
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.weights import lora

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "finetune.md").read_text()
COMMAND = re.compile(r"^(?:\d\. .*?`)?\s*((?:python|pip|wandb) [^`\n]+)", re.M)
CONFIG = f"""
import runpy
from dataclasses import replace

from easyanimate_jax import Budget, LatentSet, LoRAConfig, MMDiTConfig, SampleConfig

shipped = runpy.run_path("{ROOT}/configs/lora_12b.py")["config"]
small = Budget(12, lengths=(12,), sizes=(32,), frames=9, min_fill=0.5)
config = replace(
    shipped,
    model={{model}},
    sets=(LatentSet("3328", small),),
    stages=(replace(shipped.stages[0], steps=3, learning_rate=1e-2, warmup=0),),
    samples=SampleConfig(every=1000, frames=5, height=32, width=32),
)
"""
# Commands that need a network, or a pod's compiler for the released size, and what each is.
LEFT_OUT = {
    "pip install -e '.[wandb]'": "an installation",
    "wandb sync runs/lora_12b/wandb/offline-run-*": "a network",
    "python -m easyanimate_jax aot configs/lora_12b.py --topology h100:1": "tests/test_pods.py",
}
INSTEAD = {name: str(ROOT / name) for name in ("train.py", "sample.py")}
INSTEAD["OTHER_RUN"] = "weights"
SHORTER = {  # fewer steps and pixels
    "sample": ["--steps", "2", "--frames", "5", "--height", "32", "--width", "32"],
    "--validation.share": ["--run", "runs/validated", "--validation.clips", "2"],
    "--trackers": ["--run", "runs/tracked"],
}


def commands():
    found = [re.sub(r"\s+#.*", "", line).strip() for line in COMMAND.findall(GUIDE)]
    return [line.replace('"..."', '"a square"') for line in found]


def test_the_guide_has_the_commands_from_clips_to_other_tools():
    found = commands()
    verbs = [word for line in found for word in ("convert", "prepare", "train.py") if word in line]
    assert verbs[:3] == ["convert", "prepare", "train.py"] and len(found) >= 11
    assert set(LEFT_OUT) <= set(found)


@pytest.mark.slow
def test_the_commands_of_the_guide_run(tmp_path, parts):
    released = exported(tmp_path / "export", parts, random_module(MMDiT, MODEL))
    released.rename(tmp_path / "EasyAnimateV5.1-12b-zh")
    clips = tmp_path / "data" / "clips"
    clips.mkdir(parents=True)
    for i in range(20):
        frames = np.zeros((20, 48, 64, 3), np.uint8)
        frames[:, 10:30, 2 * i : 2 * i + 16] = 12 * i
        media.write_video(clips / f"{i}.mp4", frames, 8)
        (clips / f"{i}.txt").write_text(f"a square {i}")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "lora_12b.py").write_text(CONFIG.format(model=MODEL))
    lora.write(tmp_path / "style.safetensors", random_lora(MODEL), "original")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "WANDB_MODE": "offline",
    }
    for command in commands():
        if command in LEFT_OUT or ("wandb" in command and find_spec("wandb") is None):
            continue
        words = [INSTEAD.get(word, word) for word in shlex.split(command)[1:]]
        for name, more in SHORTER.items():
            words += more if name in command else []
        ran = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(merged) is EasyAnimatePipeline
    found = lora.read(tmp_path / "mine.safetensors")
    assert json.loads(found.metadata["easyanimate_jax"])["lora"]["rank"] == 64
