"""Weights inside the wrappers of training programs and of whole pipelines are found by name."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_conversion import (
    TINY,
    TINY_VAE,
    ZEROS,
    assert_matches,
    assert_same_bits,
    load_folder,
    random_state,
)

from easyanimate_jax.commands.convert import main
from easyanimate_jax.weights import files
from easyanimate_jax.weights.folder import load_mmdit, load_vae, open_model
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.prefixes import unwrapped

STATE = random_state(TINY)
VAE_STATE = random_state(TINY_VAE)
SOME = {n: x for n, x in STATE.items() if n.startswith(("proj", "transformer_blocks.0.attn1"))}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def tensors(state):
    return {name: torch.tensor(value) for name, value in state.items()}


def compiled(state):
    return {name.replace(".attn1.", "._orig_mod.attn1."): value for name, value in state.items()}


PICKLED = {
    "DeepSpeed": lambda s: {"module": s, "optimizer": {"state": {0: {"m": s["proj.bias"]}}}},
    "Lightning": lambda s: {
        "state_dict": prefixed("model.diffusion_model.", s),
        "optimizer_states": [{"state": {}}],
        "epoch": 3,
    },
    "averages": lambda s: {"ema": prefixed("module.", s), "decay": 0.9, "rng": torch.zeros(4)},
    "nested": lambda s: {"model": {"state_dict": prefixed("_orig_mod.module.", s), "step": 1}},
    "compiled blocks": lambda s: {"params": compiled(s)},
}


def plain(path):
    """The arrays of a file by their names without prefixes."""
    problems = []
    found = unwrapped(files.open_weights(path, problems, allow_pickle=True), problems)
    assert not problems
    return {name: tensor.read() for name, tensor in found.items()}


@pytest.mark.parametrize("case", PICKLED)
def test_state_dicts_in_wrappers_are_read(tmp_path, case):
    torch.save(PICKLED[case](tensors(SOME)), tmp_path / "x.pt")
    assert_same_bits(plain(tmp_path / "x.pt"), SOME)


def test_a_checkpoint_of_deepspeed_is_converted(tmp_path):
    torch.save(PICKLED["DeepSpeed"](tensors(STATE)), tmp_path / "x.pt")
    command = [str(tmp_path / "x.pt"), str(tmp_path / "out"), "--to", "original", "--allow-pickle"]
    assert main(command) == 0
    assert_same_bits(load_folder(tmp_path / "out"), STATE)


UNREADABLE = {
    "no tensors": (
        lambda s: {"epoch": 3, "state_dict": {"a": 1}},
        r"x\.pt holds no tensors; its keys are epoch, state_dict",
    ),
    "an unknown wrapper": (lambda s: {"weights_v2": s}, "no tensors; its keys are weights_v2"),
    "two": (lambda s: {"model": s, "ema": s}, r"several state dicts \(model, ema\)"),
    "tensors beside": (
        lambda s: {"module": s} | s,
        r"several state dicts \(module, tensors beside them\)",
    ),
    "an optimizer": (lambda s: {"state": {0: {"m": s["proj.bias"]}}}, "no tensors; its keys are 0"),
    "tables among them": (lambda s: s | {"more": {"a": s["proj.bias"]}}, "'more' is no name"),
    "a list": (lambda s: [s["proj.bias"]], "holds a list, not a state dict"),
    "sparse": (lambda s: s | {"x": s["proj.bias"].to_sparse()}, r"x\.pt: x is a sparse_coo tensor"),
    "no values": (lambda s: s | {"x": s["proj.bias"].to("meta")}, r"x\.pt: x is a meta tensor"),
    "quantized": (
        lambda s: s | {"x": torch.quantize_per_tensor(s["proj.bias"].float(), 0.1, 0, torch.qint8)},
        r"x\.pt: x is a quantized tensor; save it as a plain one",
    ),
    "itself": (lambda s: holding_itself(), "holds dicts that contain themselves"),
}


def holding_itself():
    state = {"model": {}}
    state["model"]["model"] = state
    return state


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_no_state_dict_is_refused_by_its_keys(tmp_path, case, capsys):
    make, message = UNREADABLE[case]
    torch.save(
        make(tensors({n: STATE[n] for n in ("proj.bias", "proj.weight")})), tmp_path / "x.pt"
    )
    command = [str(tmp_path / "x.pt"), str(tmp_path / "out"), "--to", "jax", "--allow-pickle"]
    assert main(command) == 2
    assert_matches(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_pickle_that_is_cut_is_named(tmp_path, capsys):
    torch.save(tensors(SOME), tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    command = [str(tmp_path / "x.pt"), str(tmp_path / "out"), "--to", "jax", "--allow-pickle"]
    for size in (0, 9, 5000, len(content) - 30):
        (tmp_path / "x.pt").write_bytes(content[:size])
        assert main(command) == 2
        assert_matches(r"x\.pt is no pickle of weights alone, or an inc", capsys.readouterr().err)


def test_an_empty_file_of_weights_is_refused(tmp_path, capsys):
    save_file({}, tmp_path / "x.safetensors")
    for name in ("x.safetensors", ""):
        assert main([str(tmp_path / name), str(tmp_path / "out"), "--to", "jax"]) == 2
        assert "x.safetensors holds no tensors" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no tensors"):
        load_mmdit(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "prefix",
    ["model.diffusion_model.", "transformer.", "module._orig_mod.", "_fsdp_wrapped_module.model."],
)
def test_prefixes_of_a_transformer_are_taken_off(tmp_path, prefix):
    save_file(prefixed(prefix, SOME), tmp_path / "x.safetensors")
    assert_same_bits(plain(tmp_path / "x.safetensors"), SOME)


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", "state_dict.module.vae."])
def test_prefixes_of_a_vae_are_taken_off(tmp_path, prefix):
    some = {name: VAE_STATE[name] for name in ("quant_conv.bias", "encoder.conv_in.bias")}
    some["loss.logvar"] = np.zeros((), np.float32)
    save_file(prefixed(prefix, some), tmp_path / "x.safetensors")
    assert_same_bits(plain(tmp_path / "x.safetensors"), some)


def test_models_with_prefixes_are_opened(tmp_path):
    problems, fields = [], '{"norm_num_groups": 4, "scaling_factor": 0.7125}'
    save_file(prefixed("module.transformer.", STATE), tmp_path / "x.safetensors")
    assert open_model(tmp_path, "transformer", problems).config == TINY
    state = prefixed("first_stage_model.", VAE_STATE | {"loss.logvar": np.zeros((), np.float32)})
    save_file(state, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(fields)
    assert open_model(tmp_path, "vae", problems).config == TINY_VAE
    assert not problems


def test_a_part_of_a_pipeline_in_one_file_is_chosen_by_name(tmp_path, capsys):
    state = prefixed("model.diffusion_model.", STATE) | {
        "first_stage_model.quant_conv.bias": ZEROS,
        "cond_stage_model.shared.weight": ZEROS,
    }
    save_file(state, tmp_path / "all.safetensors")
    command = [str(tmp_path / "all.safetensors"), str(tmp_path / "out"), "--to", "original"]
    assert main(command) == 2
    told = "holds text_encoder and transformer and vae; choose one with --only"
    assert told in capsys.readouterr().err
    assert main([*command, "--only", "transformer"]) == 0
    assert_same_bits(load_folder(tmp_path / "out"), STATE)
    with pytest.raises(ValueError, match="not a whole EasyAnimate VAE"):
        load_vae(tmp_path / "all.safetensors")
    save_file({"vae.quant_conv.bias": ZEROS}, tmp_path / "all.safetensors")
    with pytest.raises(ValueError, match=r"holds no transformer; .* it holds vae"):
        load_mmdit(tmp_path / "all.safetensors")


def test_a_weight_under_two_names_is_refused(tmp_path):
    save_file({"proj.bias": ZEROS, "model.proj.bias": ZEROS}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"proj.bias and .*proj.bias are the same weight; remove"):
        load_mmdit(tmp_path / "x.safetensors")


def sharded(folder, stem, index):
    """SOME in shards named `stem-0000i-of-0000n.safetensors`, and their index."""
    there = {name: Tensor.of(value) for name, value in SOME.items()}
    files.write_shards(folder, stem, there, shard_bytes=10_000)
    (folder / f"{stem}.safetensors.index.json").rename(folder / index)


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        ("model.fp16", "model.safetensors.index.fp16.json"),
        ("model.fp16", "model.fp16.safetensors.index.json"),
        ("model", "model.safetensors.index.json"),
    ],
)
def test_an_index_of_a_variant_is_read(tmp_path, stem, index):
    sharded(tmp_path, stem, index)
    assert_same_bits(plain(tmp_path), SOME)
    # Beside another variant, only its own shards belong to it.
    sharded(tmp_path, "other.bf16", "other.bf16.safetensors.index.json")
    assert_same_bits(plain(tmp_path / index), SOME)
    with pytest.raises(ValueError, match="more than one model"):
        load_mmdit(tmp_path)


def test_an_index_of_pickles_is_read(tmp_path):
    names, places = sorted(SOME), {}
    for part in (1, 2):
        file = f"pytorch_model-0000{part}-of-00002.bin"
        some = {name: SOME[name] for name in names[part - 1 :: 2]}
        torch.save(tensors(some), tmp_path / file)
        places |= dict.fromkeys(some, file)
    index = json.dumps({"weight_map": places})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        load_mmdit(tmp_path)
    assert_same_bits(plain(tmp_path), SOME)
