"""A config may name the model of the package in `vae`, `text` and `init`: prepare, train, load."""

import numpy as np
import pytest
from test_export import MODEL, exported, random_module
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer

from easyanimate_jax import (
    Budget,
    LatentSet,
    LoRAConfig,
    SampleConfig,
    Stage,
    TrainConfig,
    load_pipeline,
)
from easyanimate_jax.commands.prepare import main as prepare
from easyanimate_jax.data.media import write_video
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.runs import doctor
from easyanimate_jax.runs.batches import make_loaders
from easyanimate_jax.runs.loop import train
from easyanimate_jax.runs.meshes import stage_meshes
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.storage.stores import place
from easyanimate_jax.weights import pretrained

NAMED = {"vae": "emoji", "text": "emoji", "init": "emoji"}
CONFIG = TrainConfig(
    **NAMED,
    source="clips",
    prepared="latents",
    run="run",
    model=MODEL,
    process=Flow(),
    lora=LoRAConfig(rank=2),
    sets=(LatentSet("all", Budget(8, lengths=(8,), sizes=(32,), frames=5)),),
    stages=(Stage("lora", "all", batch_size=8, steps=1, learning_rate=1e-2, warmup=0),),
    samples=SampleConfig(("a square",), every=0, frames=5, height=32, width=32, steps=2),
    mesh=MeshConfig(data=8, fsdp=1),
)


@pytest.fixture
def folder(tmp_path, parts, monkeypatch):
    """A working folder with eight clips; the package's model is a small random one elsewhere."""
    packaged = exported(tmp_path / "package", parts, random_module(MMDiT, MODEL))
    packaged.rename(tmp_path / "package" / "emoji")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "package")
    work = tmp_path / "work"
    (work / "clips").mkdir(parents=True)
    for i in range(8):
        frames = np.full((20, 32, 32, 3), 30 * i, np.uint8)
        write_video(work / "clips" / f"{i}.mp4", frames, 8)
        (work / "clips" / f"{i}.txt").write_text(f"a square {i}")
    (work / "config.py").write_text("from test_named_models import CONFIG as config\n")
    monkeypatch.chdir(work)
    return work


@pytest.mark.slow
def test_a_lora_of_the_packages_model_is_prepared_trained_and_loaded_by_its_name(
    folder, tmp_path, monkeypatch
):
    assert prepare(["config.py"]) == 0
    assert train(CONFIG) == 0
    assert '"vae": "emoji"' in (folder / "run" / "config.json").read_text()  # no path of a machine

    (folder / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert load_pipeline("moved")("a square", steps=2).shape == (5, 32, 32, 3)


def test_the_doctor_and_the_loop_look_at_the_model_of_that_name(folder, tmp_path):
    model = tmp_path / "package" / "emoji"
    assert {model} == set(doctor._inputs(CONFIG)) - {place("latents") / "all"}
    assert prepare(["config.py"]) == 0
    (model / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="prepared with another vae than emoji now holds"):
        make_loaders(CONFIG, stage_meshes(CONFIG))
