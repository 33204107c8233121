"""A run that trains adapters: the base stays, checkpoints hold adapters alone, resume is exact."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import flat_weights
from small_runs import DEMO, losses, small_run

from easyanimate_jax.commands.convert import main as convert
from easyanimate_jax.models.lora import LoRAConfig
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.runs.describe import describe_run
from easyanimate_jax.runs.loop import train
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.weights import lora
from easyanimate_jax.weights.adapters import open_loras
from easyanimate_jax.weights.folder import load_mmdit, load_start
from easyanimate_jax.weights.module import abstract, save_module, with_weights

LAYERS = "blocks.*.attention.q", "blocks.*.mlp.up"
LORA = LoRAConfig(rank=2, alpha=1.0, targets=LAYERS, dropout=0.5)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two updates without and two with a start picture, beside a model of text to video."""
    folder = tmp_path_factory.mktemp("lora")
    run = small_run(folder)
    save_module(folder / "base", random_model(run.model, 0))
    return replace(run, init=f"{folder}/base", lora=LORA, frozen="float32")


def random_model(config, seed):
    rng = np.random.default_rng(seed)
    return with_weights(
        abstract(MMDiT, config),
        lambda _, x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32),
    )


@pytest.fixture(scope="module")
def whole(config):
    assert train(config) == 0
    return config


def test_a_checkpoint_holds_adapters_alone_and_the_base_keeps_its_bits(whole):
    from easyanimate_jax.weights.run_folder import read_meta

    step, meta = read_meta(whole.run)
    names = set(meta["arrays"]["ema"])
    assert step == 4 and len(names) == 2 * 4 and all(".adapter." in name for name in names)
    assert not any("kernel" in name for name in meta["arrays"]["state"])
    model, base = load_mmdit(whole.run), load_mmdit(whole.init, in_channels=33)
    ours, theirs = flat_weights(model), flat_weights(base)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    # The text of the last block does not reach the output.
    changed = {name for name, value in ours.items() if name.endswith("adapter.up") and value.any()}
    layers = ("attention.q", "mlp.up")
    assert changed == {f"blocks.0.video.{layer}.adapter.up" for layer in layers}


def test_a_run_that_went_on_has_the_bits_of_one_that_was_never_stopped(whole, tmp_path):
    base = tmp_path / "base"
    save_module(base, random_model(whole.model, 0))
    part = replace(whole, run=str(tmp_path / "run"), init=str(base))
    first = replace(part, stages=(replace(whole.stages[0], steps=1),))
    assert train(first) == 0

    save_module(base, random_model(whole.model, 1))
    before = sorted(map(str, (tmp_path / "run").rglob("*")))
    with pytest.raises(ValueError, match=r"was trained beside weights with fingerprint .* put the"):
        train(part)
    with pytest.raises(ValueError, match=r"made with lora = .*rank=2.* has .*rank=4"):
        train(replace(part, lora=replace(LORA, rank=4)))
    with pytest.raises(ValueError, match="holds other weights than those beside which"):
        load_mmdit(part.run)
    assert sorted(map(str, (tmp_path / "run").rglob("*"))) == before

    save_module(base, random_model(whole.model, 0))
    assert train(part) == 0
    assert losses(part) == losses(whole)
    ours, theirs = (flat_weights(load_mmdit(c.run, weights="raw")) for c in (part, whole))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.slow
def test_another_mesh_and_a_base_of_eight_bits_give_almost_the_same_losses(whole, tmp_path):
    other = replace(
        whole,
        run=str(tmp_path),
        mesh=MeshConfig(fsdp=2, context=2, tensor=2),
        frozen="int8",
    )
    assert train(other) == 0
    np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-2)


def test_the_exported_file_and_the_merged_weights_make_the_runs_prediction(whole, tmp_path):
    file = str(tmp_path / "a.safetensors")
    assert convert([whole.run, file, "--to", "comfyui"]) == 0
    found = lora.read(file)
    assert found.metadata["ss_steps"] == "4" and found.metadata["ss_network_dim"] == "2"
    assert json.loads(found.metadata["easyanimate_jax"])["lora"]["alpha"] == 1.0
    only = ["--only", "transformer", "--to", "jax"]
    assert convert([whole.run, str(tmp_path / "merged"), *only]) == 0
    assert (
        convert(
            [whole.init, str(tmp_path / "again"), *only[2:], "--lora", file, "--in-channels", "33"]
        )
        == 0
    )
    models = [
        load_mmdit(whole.run),
        load_mmdit(whole.init, in_channels=33, loras=open_loras([(file, 1.0)])),
        load_mmdit(tmp_path / "merged"),
        load_mmdit(tmp_path / "again"),
        load_start(whole.run, replace(whole.model, in_channels=33), mesh=make_mesh(MeshConfig())),
    ]
    assert not any("adapter" in name for name in flat_weights(models[-1]))
    rng = np.random.default_rng(0)
    inputs = (
        rng.standard_normal((1, 16, 132), np.float32),
        np.array([[1, 4, 4]]),
        np.array([16]),
        np.array([400.0], np.float32),
        tuple(rng.standard_normal((1, 3, width), np.float32) for width in (8, 12)),
    )
    models.append(load_mmdit(whole.init, in_channels=33))
    *made, base = (jax.jit(lambda model, *x: model(*x))(model, *inputs) for model in models)
    assert np.abs(made[0] - base).max() > 1e-3
    for other in made[1:]:
        np.testing.assert_allclose(other, made[0], atol=1e-5)


def test_a_run_continues_a_lora_of_a_smaller_rank(whole, tmp_path):
    """At rate 0 the product is the file's, whatever its alpha; the rest of the rank is new."""
    file = tmp_path / "style.safetensors"
    assert convert([whole.run, str(file), "--to", "original"]) == 0
    wider = replace(LORA, rank=5, alpha=3.0)
    still = replace(whole.stages[1], steps=1, learning_rate=0.0, end_learning_rate=None)
    config = replace(
        whole, run=str(tmp_path / "run"), lora=wider, init_lora=str(file), stages=(still,)
    )
    for change, message in (
        ({"lora": replace(wider, rank=1)}, "has rank 2, and lora.rank is 1: use 2 or more"),
        ({"lora": replace(wider, targets=LAYERS[:1])}, r"also changes blocks\.0\.text\.mlp\.up"),
        ({"init_lora": str(tmp_path / "gone.safetensors")}, "gone.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            train(replace(config, **change))
        assert not Path(config.run).exists()
    assert train(config) == 0
    ours, theirs = (flat_weights(load_mmdit(run)) for run in (config.run, whole.run))
    downs = [name for name in theirs if name.endswith("adapter.down")]
    for name in downs:
        up = name.replace("down", "up")
        # `load_mmdit` multiplies the factor of the product into `up`.
        np.testing.assert_allclose(ours[name] @ ours[up], theirs[name] @ theirs[up], atol=1e-7)
        assert ours[name][..., 2:].any() and not ours[up][..., 2:, :].any()
    assert len(downs) == 4
    file.unlink()
    assert train(replace(config, stages=(still, replace(still, name="more")))) == 0  # goes on


def test_describe_says_what_is_trained_and_what_it_takes(config):
    text = describe_run(replace(config, mesh=MeshConfig(fsdp=1)))
    assert "lora     rank 2, alpha 1, beside blocks.*.attention.q, blocks.*.mlp.up: " in text
    assert "frozen   all others in float32" in text and "frozen weights" in text


def test_a_config_of_adapters_needs_weights_and_adam(config):
    with pytest.raises(ValueError, match="asks for adapters of existing weights, and init is em"):
        replace(config, init="")
    with pytest.raises(ValueError, match="adapters are trained by Adam; use 'adam'"):
        replace(config, optimizer=DEMO.optimizer)
