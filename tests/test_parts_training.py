"""A run that trains a part of the weights, keeps no average, and keeps its moments small."""
# ruff: noqa: F401, F811 (pytest finds fixtures by name)

from dataclasses import replace

import numpy as np
import pytest
from arrays import flat_weights
from small_runs import losses
from test_lora_training import LORA, config

from easyanimate_jax.commands.convert import main as convert
from easyanimate_jax.models.lora import LoRAConfig
from easyanimate_jax.runs.describe import describe_run
from easyanimate_jax.runs.loop import train
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.training.optimizer import OptimizerConfig
from easyanimate_jax.weights.folder import load_mmdit
from easyanimate_jax.weights.run_folder import read_meta

PARTS = (("blocks.*.mlp.*.kernel", 1.0), ("patches.*", 0.5), ("time.*", 0.0))


@pytest.fixture(scope="module")
def part(config, tmp_path_factory):
    """The matrices of the MLPs and the input layer, by Adafactor."""
    return replace(
        config,
        stages=config.stages[1:],
        run=str(tmp_path_factory.mktemp("part") / "run"),
        lora=LoRAConfig(),
        train=PARTS,
        ema_decay=0.0,
        optimizer=OptimizerConfig("adafactor", moments="bfloat16"),
    )


@pytest.fixture(scope="module")
def whole(part):
    assert train(part) == 0
    return part


def test_the_parts_change_and_all_other_weights_keep_their_bits(whole):
    ours = flat_weights(load_mmdit(whole.run))
    theirs = flat_weights(load_mmdit(whole.init, in_channels=33))
    changed = {name for name, value in theirs.items() if (ours[name] != value).any()}
    # The text of the last block does not reach the output, but its weights decay.
    layers = [
        f"blocks.0.{s}.mlp.{name}.kernel" for s in ("video", "text") for name in ("up", "down")
    ]
    assert changed == {*layers, "patches.kernel", "patches.bias"}


def test_a_checkpoint_holds_the_parts_and_no_average(whole):
    _, meta = read_meta(whole.run)
    assert set(meta["arrays"]) == {"state"}
    own = {n for n in meta["arrays"]["state"] if n.startswith("model.")}
    assert len(own) == 2 * 2 + 2 + 4
    moments = [x for n, x in meta["arrays"]["state"].items() if n.startswith("opt_state.")]
    assert {dtype for _, dtype, _ in moments} == {"bfloat16", "int32"}


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(whole, tmp_path):
    again = replace(whole, run=str(tmp_path / "run"))
    assert train(replace(again, stages=(replace(whole.stages[0], steps=1),))) == 0
    for change, words in (
        ({"train": PARTS[:1]}, "train = "),
        ({"ema_decay": 0.9}, r"an average \(ema_decay above 0\) = False"),
        ({"optimizer": OptimizerConfig("adafactor")}, "moments of optimizer = 'bfloat16'"),
        ({"frozen": "int8"}, "frozen = 'float32'"),
    ):
        with pytest.raises(ValueError, match=f"was made with {words}"):
            train(replace(again, **change))
    assert train(again) == 0
    assert losses(again) == losses(whole)
    ours, theirs = (flat_weights(load_mmdit(c.run)) for c in (again, whole))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.slow
def test_parts_and_adapters_train_together_beside_eight_bits_on_any_mesh(config, tmp_path, capsys):
    both = replace(
        config,
        run=str(tmp_path / "run"),
        lora=replace(LORA, targets=("blocks.*.attention.q",)),
        train=(("patches.*", 1.0),),
        frozen="int8",
        mesh=MeshConfig(fsdp=2, context=2, tensor=2),
    )
    assert train(both) == 0
    ours = flat_weights(load_mmdit(both.run))
    theirs = flat_weights(load_mmdit(both.init, in_channels=33))
    changed = {n for n, x in ours.items() if n not in theirs or (x != theirs[n]).any()}
    assert {n for n in changed if "adapter" not in n} == {"patches.kernel", "patches.bias"}
    assert any(n.startswith("blocks.0.video.attention.q.adapter") for n in changed)
    file = tmp_path / "a.safetensors"
    assert convert([both.run, str(file), "--to", "comfyui"]) == 2 and not file.exists()
    assert "trained patches.* of the model itself too" in capsys.readouterr().err


def test_describe_names_the_parts_and_a_pattern_that_matches_none_is_refused(part):
    text = describe_run(replace(part, mesh=MeshConfig(fsdp=1)))
    assert "train    patches.*: 4,256 parameters at 0.5 x the learning rate" in text
    assert "Adafactor for the blocks' matrices, moments in bfloat16" in text
    assert "not averaged" in text and "their average" not in text
    with pytest.raises(ValueError, match=r"TrainConfig.train: 'blocks.\*.mlb' matches no weight"):
        describe_run(replace(part, train=(("blocks.*.mlb", 1.0),)))
    with pytest.raises(ValueError, match="train asks for a part of existing weights, and init is"):
        replace(part, init="")
