import dataclasses
import math
import re
import sys

import pytest

from easyanimate_jax.commands.parse import load_config
from easyanimate_jax.runs import config as configs
from easyanimate_jax.runs.describe import describe_run
from easyanimate_jax.sharding import MeshConfig

TRAIN_CONFIGS = ("v5_12b", "v5_12b_control", "v51_12b", "v5_7b", "v51_7b", "tpu_12b", "demo")


def load(name, *overrides):
    return load_config(f"configs/{name}.py", overrides)


@pytest.mark.parametrize("name", (*TRAIN_CONFIGS, "demo_vae"))
def test_a_config_survives_json(name):
    config = load(name)
    assert configs.from_json(configs.to_json(config)) == config


def test_the_12b_runs_the_schedule_of_the_report():
    stages = load("v5_12b").stages + load("v5_12b_control").stages
    assert [(s.name, s.batch_size, s.steps) for s in stages[1:]] == [
        ("3328_t2v", 1536, 66_500),
        ("13312_t2v", 768, 30_000),
        ("13312_i2v", 384, 5_000),
        ("53248_i2v", 196, 5_000),
        ("13312_control", 128, 5_000),
        ("53248_control", 96, 2_000),
    ]
    assert (stages[0].name, stages[0].steps) == ("image", 120_000)


def test_the_12b_takes_the_clips_that_the_report_took_and_draws_as_often_as_they_are_seen():
    """About 0.5 million of 26.6 million clips; a draw that no visit uses is work for nothing."""
    config = load("v5_12b")
    best = [s for s in config.stages if config.set(s.data).min_quality]
    assert [stage.name for stage in best] == ["13312_i2v", "53248_i2v"]
    for stage in best:
        latents = config.set(stage.data)
        assert 26.6e6 * (1 - latents.min_quality) == pytest.approx(0.5e6, rel=0.02)
        assert latents.condition_draws == math.ceil(stage.batch_size * stage.steps / 0.5e6)


@pytest.mark.parametrize("name", TRAIN_CONFIGS)
def test_every_config_describes_itself(name):
    text = describe_run(load(name))
    for stage in load(name).stages:
        assert stage.name in text


def test_the_12b_describes_its_parameters_bytes_and_sizes():
    text = describe_run(load("v5_12b"))
    assert "11,797,692,480 parameters" in text  # spec 1.1
    assert "128 devices" in text
    # 93.7 M weights a device; Muon keeps one moment of the 92 % that are projections of blocks.
    assert (
        "1.50 GB a device: weights 0.37, their average 0.37, the optimizer's moments 0.75" in text
    )
    muon = describe_run(load("v5_12b", "--optimizer.matrices", "muon"))
    assert "1.16 GB a device" in muon and "moments 0.41" in muon
    for frames, size in ((49, "512x512"), (21, "768x768"), (9, "1024x1024")):
        assert re.search(rf"{frames} frames of .*\b{size}\b", text)


def test_training_times_are_described_by_a_histogram_of_the_shortest_and_the_longest():
    text = describe_run(load("v51_12b"))
    shares = [float(share) for share in re.findall(r"([\d.]+)% #", text)]
    assert shares == pytest.approx([10] * 10, abs=0.11) and "of all lengths" in text
    text = describe_run(load("v51_12b", "--process.train-shift", "3"))
    # Whole times are rounded up: 3 t / (1 + 2 t) is above 0.899 where t is above 0.748.
    assert re.search(r"0\.9 to 1\.0 +25\.2% #{50}\n", text)
    text = describe_run(load("v51_12b", "--process.shift-tokens", "3328"))
    assert re.findall(r"times .* of ([\d,]+) tokens", text) == ["3,072", "53,248"]


def test_overrides_reach_nested_fields():
    config = load("v5_12b", "--stages.0.steps", "7", "--mesh.fsdp", "8", "--seed", "3")
    assert (config.stages[0].steps, config.mesh.fsdp, config.seed) == (7, 8, 3)
    assert config.stages[1:] == load("v5_12b").stages[1:]


def test_a_stage_gets_its_own_mesh_and_kept_activations_by_options():
    """An axis that is not given has the default of the class, and the others stages stay."""
    base = load("demo")
    words = ("--stages.2.mesh.fsdp", "32", "--stages.2.mesh.context=4", "--stages.0.mesh.tensor")
    config = load("demo", *words, "2", "--stages.1.save", "attention", "mlp out")
    first, second, third, *others = config.stages
    assert (first.mesh, third.mesh) == (MeshConfig(tensor=2), MeshConfig(fsdp=32, context=4))
    assert second.save == ("attention", "mlp out") and (*others,) == base.stages[3:]
    assert [config.mesh_of(stage) for stage in (first, second)] == [first.mesh, config.mesh]
    assert config.step.of_stage(second).model.kept == second.save
    assert config.step.of_stage(first).model.save == config.model.save
    assert configs.from_json(configs.to_json(config)) == config
    saves = [load("demo", "--stages.1.save", *s).stages[1].save for s in ((), ("auto",), ("None",))]
    assert saves == [(), "auto", None]
    text = describe_run(config)
    assert re.search(r"1 x fsdp 32 x context 4 x tensor 1 = 128 devices in medium_t2v\n", text)
    assert "tensor=2) in image: fsdp takes the devices" in text


@pytest.mark.parametrize("save", [("mpl",), ("mlp", "qkv")])
def test_activations_that_a_stage_cannot_keep_are_refused_with_its_name(save):
    base = load("demo")
    stages = (base.stages[0], dataclasses.replace(base.stages[1], save=save), *base.stages[2:])
    model = dataclasses.replace(base.model, save=(), offload=("qkv",))
    with pytest.raises(ValueError, match=r"stage 'small_t2v': MMDiTConfig: save=.*takes names of"):
        dataclasses.replace(base, model=model, stages=stages)


def test_configs_of_a_folder_import_one_another_from_anywhere(tmp_path):
    (tmp_path / "recipes").mkdir()
    source = "from easyanimate_jax.runs.config import load\nconfig = load('configs/demo.py')\n"
    (tmp_path / "recipes" / "one.py").write_text(source)
    (tmp_path / "recipes" / "two.py").write_text("from recipes.one import config\n")
    before = list(sys.path)
    assert configs.load(str(tmp_path / "recipes" / "two.py")) == configs.load("configs/demo.py")
    assert sys.path == before


def test_bad_configs_are_refused_by_name(tmp_path):
    config = load("v5_12b")
    with pytest.raises(ValueError, match=r"no config 'nowhere\.py'"):
        configs.load("nowhere.py")
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(ValueError, match="defines no `config"):
        configs.load(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match="reads latent set 'elsewhere'"):
        stage = dataclasses.replace(config.stages[0], data="elsewhere")
        dataclasses.replace(config, stages=(stage,))
    with pytest.raises(ValueError, match="holds no conditioning"):
        stage = dataclasses.replace(config.stages[0], task="i2v")
        dataclasses.replace(config, stages=(stage,))
    with pytest.raises(ValueError, match="class 'Unknown'"):
        configs.from_json('{"class": "Unknown"}')
