"""docs/weights.md from its first command to its last, on small weights in the released layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EasyAnimatePipeline
from test_export import MODEL, exported, parts, random_module  # noqa: F401

from easyanimate_jax.data import media
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.weights import files

ROOT = Path(__file__).parent.parent
CONFIG = """
from dataclasses import replace

from configs.v51_12b_finetune import config as released
from easyanimate_jax.runs.config import SampleConfig
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.sharding import MeshConfig

small = Budget(12, lengths=(12,), sizes=(32,), frames=9, min_fill=0.5)
config = replace(
    released,
    model={model},
    mesh=MeshConfig(),
    sets=(LatentSet("13312", small),),
    stages=(replace(released.stages[0], batch_size=2),),
    samples=SampleConfig(every=1000),
)
"""


def tensors_of(folder):
    problems = []
    tensors = files.open_weights(folder, problems)
    assert not problems
    return {name: tensor.read() for name, tensor in tensors.items()}


@pytest.mark.slow
def test_released_weights_are_fine_tuned_and_handed_back(tmp_path, parts):  # noqa: F811
    released = exported(tmp_path / "released", parts, random_module(MMDiT, MODEL))
    clips = tmp_path / "data" / "clips"
    clips.mkdir(parents=True)
    rows = []
    for i in range(6):
        frames = np.zeros((20, 48, 64, 3), np.uint8)
        frames[:, 10:30, 8 * i : 8 * i + 16] = 40 * i
        media.write_video(clips / f"{i}.mp4", frames, 8)
        rows.append({"file_path": f"{i}.mp4", "text": f"square {i}", "type": "video"})
    (clips / "metadata.json").write_text(json.dumps(rows))
    (tmp_path / "finetune.py").write_text(CONFIG.format(model=MODEL))

    def run(*command):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}", "XLA_FLAGS": ""}
        ran = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    convert = ("-m", "easyanimate_jax", "convert")
    run(*convert, str(released), "weights", "--to", "jax")
    run("-m", "easyanimate_jax", "prepare", "finetune.py", "--source", "data/clips")
    train = (str(ROOT / "train.py"), "finetune.py", "--stages.0.learning-rate", "1e-2")
    said = run(*train, "--stages.0.steps", "4", "--stages.0.warmup", "1")
    assert "starting from the weights of weights/transformer" in said
    back = (*convert, "runs/v51_12b_finetune", "mine", "--to", "diffusers", "--dtype", "bfloat16")
    run(*back, "--weights", "raw")  # an average over thousands of steps has not moved yet

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "mine", torch_dtype=torch.bfloat16)
    assert type(pipe) is EasyAnimatePipeline
    before, after = tensors_of(released / "transformer"), tensors_of(tmp_path / "mine/transformer")
    assert before.keys() == after.keys()
    moved = {n: np.abs(before[n] - after[n].astype(np.float32)).max() for n in before}
    rounding = {n: np.abs(before[n]).max() / 128 for n in before}
    assert any(moved[n] > 2 * rounding[n] for n in before)  # it was trained,
    assert all(moved[n] < 0.1 + rounding[n] for n in before)  # from the weights it was given
    vae = tensors_of(released / "vae")
    for name, value in tensors_of(tmp_path / "mine/vae").items():
        np.testing.assert_array_equal(value, vae[name].astype(value.dtype), err_msg=name)
