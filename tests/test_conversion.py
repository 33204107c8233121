"""Weights from PyTorch and back: bit for bit, streamed, and nothing half-right is accepted."""

import json
import pickle
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from arrays import flat_weights
from disk import flip_a_bit, write_run
from safetensors.numpy import load_file, save_file

from easyanimate_jax.commands.convert import main
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.runs.load import load_pipeline
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.weights import files, mmdit_table, vae_table
from easyanimate_jax.weights.conversion import Options, convert
from easyanimate_jax.weights.folder import load_mmdit, load_vae
from easyanimate_jax.weights.lazy import Tensor, dense
from easyanimate_jax.weights.module import (
    abstract,
    build,
    misfits,
    named_weights,
    save_module,
    shapes_of,
)
from easyanimate_jax.weights.schedulers import SCHEDULERS, strange_parts

TINY = MMDiTConfig(
    depth=4,
    mmdit_depth=4,
    heads=2,
    head_width=16,
    time_width=16,
    text_widths=(24,),
    text_norm=True,
    round_time=True,
)
TINY_VAE = VAEConfig(channels=(8, 8, 16, 16), groups=4)
V5 = {"text_widths": (24, 40), "text_norm": False}
VARIANTS = {
    "v5.1": TINY,
    "v5.1-inpaint": replace(TINY, in_channels=33),
    "v5.1-control": replace(TINY, in_channels=48),
    "v5.1-camera": replace(TINY, in_channels=38),
    "v5.1-7b": replace(TINY, mmdit_depth=2, in_channels=33),
    "v5": replace(TINY, **V5),
    "v5-inpaint": replace(TINY, in_channels=33, **V5),
    "v5-control": replace(TINY, in_channels=32, **V5),
    "v5-7b": replace(TINY, mmdit_depth=3, **V5),
    "all-shared": replace(TINY, mmdit_depth=0),
    "wide-heads": replace(TINY, head_width=32),
    "vae-v5.1": TINY_VAE,
    "vae-v5": replace(TINY_VAE, attention=True),
}
KINDS = {MMDiTConfig: mmdit_table, VAEConfig: vae_table}


def shapes_only(shapes):
    return {name: Tensor(shape, np.float32, lambda box: None) for name, shape in shapes.items()}


def random_state(config, dtype=np.float32, seed=0):
    """A state dict in the original layout, by its own names and shapes."""
    kind, rng = KINDS[type(config)], np.random.default_rng(seed)
    empty = shapes_only(shapes_of(abstract(kind.MODEL_CLASS, config)))
    return {
        name: rng.standard_normal(tensor.shape, np.float32).astype(dtype)
        for name, tensor in kind.to_torch(empty, config, "original").items()
    }


def write_original(folder, config, state=None, **fields):
    """A folder as the original's authors publish it; `fields` replaces lines of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = random_state(config) if state is None else state
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    told = KINDS[type(config)].config_json(config, "original") | fields
    (folder / "config.json").write_text(json.dumps(told))
    return state


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


def load_folder(folder):
    return {k: v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((name, "bfloat16") for name in VARIANTS), ("v5.1-control", "float32"), ("v5", "float16")],
)
def test_original_to_ours_to_diffusers_to_ours_to_original_changes_no_bit(tmp_path, variant, dtype):
    config = VARIANTS[variant]
    state = random_state(config, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    write_original(tmp_path / "original", config, state)
    convert(tmp_path / "original", tmp_path / "ours", Options("jax"))
    convert(tmp_path / "ours", tmp_path / "theirs", Options("diffusers", shard_bytes=50_000))
    convert(tmp_path / "theirs", tmp_path / "again", Options("jax"))
    convert(tmp_path / "again", tmp_path / "back", Options("original"))

    assert_same_bits(load_folder(tmp_path / "back"), state)
    assert len(list((tmp_path / "theirs").glob("*-of-*.safetensors"))) > 2
    for name in ("weights.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    theirs = load_folder(tmp_path / "theirs")
    if isinstance(config, MMDiTConfig) and config.mmdit_depth:
        assert not any(".attn2." in name for name in theirs)
        moved = state["transformer_blocks.0.attn2.to_out.0.weight"]
        assert theirs["transformer_blocks.0.attn1.to_add_out.weight"].tobytes() == moved.tobytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_config_is_read_off_the_tensors(tmp_path, variant):
    config = VARIANTS[variant]
    write_original(tmp_path, config)
    if isinstance(config, MMDiTConfig):
        (tmp_path / "config.json").unlink()
        assert load_mmdit(tmp_path).config == config
    else:  # only the number of groups is in no tensor
        (tmp_path / "config.json").write_text('{"norm_num_groups": 4}')
        assert load_vae(tmp_path).config == config


RELEASED = {
    "v5.1-12b": ({"num_layers": 48, "mmdit_layers": 48, "in_channels": 16}, 11_799_056_960),
    "v5.1-12b-inp": ({"num_layers": 48, "mmdit_layers": 48, "in_channels": 33}, 11_799_265_856),
    "v5.1-12b-control": ({"num_layers": 48, "mmdit_layers": 48, "in_channels": 48}, 11_799_450_176),
    "v5.1-7b-inp": ({"num_layers": 36, "mmdit_layers": 18, "in_channels": 33}, 6_814_670_912),
    "v5-12b": ({"num_layers": 48, "mmdit_layers": 48, "in_channels": 16}, 11_797_483_584),
    "v5-12b-inp": ({"num_layers": 48, "mmdit_layers": 48, "in_channels": 33}, 11_797_692_480),
    "v5-7b-inp": ({"num_layers": 36, "mmdit_layers": 18, "in_channels": 33}, 6_813_097_536),
}
V5_FIELDS = {"text_embed_dim": 1024, "text_embed_dim_t5": 2048, "add_norm_text_encoder": False}
V51_FIELDS = {"text_embed_dim": 3584, "add_norm_text_encoder": True}


@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_of_a_released_transformer_maps_one_to_one(name):
    from diffusers import EasyAnimateTransformer3DModel

    fields, parameters = RELEASED[name]
    fields |= V51_FIELDS if "v5.1" in name else V5_FIELDS
    with torch.device("meta"):
        reference = EasyAnimateTransformer3DModel(out_channels=16, patch_size=2, **fields)
    theirs = {name: tuple(value.shape) for name, value in reference.state_dict().items()}

    problems = []
    config, ours = mmdit_table.from_torch(shapes_only(theirs), problems, reference.config)
    assert not problems
    assert not misfits(ours, abstract(MMDiT, config))
    assert sum(np.prod(tensor.shape, dtype=np.int64) for tensor in ours.values()) == parameters
    back = mmdit_table.to_torch(ours, config, "diffusers")
    assert {name: tensor.shape for name, tensor in back.items()} == theirs

    original = mmdit_table.to_torch(ours, config, "original")
    assert len(original) == len(theirs)
    assert sum(".attn2." in name for name in original) == 12 * fields["mmdit_layers"]
    again, _ = mmdit_table.from_torch(original, problems)
    assert again == config and not problems


@pytest.mark.parametrize(
    ("attention", "tensors", "parameters"), [(False, 228, 244_375_507), (True, 248, 246_478_803)]
)
def test_every_tensor_of_a_released_vae_maps_one_to_one(attention, tensors, parameters):
    from diffusers import AutoencoderKLMagvit

    config = VAEConfig(attention=attention)
    ours = shapes_of(abstract(CausalVAE, config))
    theirs = vae_table.to_torch(shapes_only(ours), config, "original")
    assert len(theirs) == len(ours) == tensors
    assert sum(np.prod(tensor.shape, dtype=np.int64) for tensor in theirs.values()) == parameters
    with torch.device("meta"):
        reference = AutoencoderKLMagvit().state_dict()
    extra = {name for name in theirs if ".attentions." in name}
    assert len(extra) == 20 * attention
    found = {name: tensor.shape for name, tensor in theirs.items() if name not in extra}
    assert found == {name: tuple(value.shape) for name, value in reference.items()}
    problems = []
    again, back = vae_table.from_torch(theirs, problems)
    assert again == config and not problems and not misfits(back, abstract(CausalVAE, config))


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def spoil_header(header, data=b"\0" * 8):
    """A model whose file has this header."""

    def spoil(folder):
        write_raw(folder / "diffusion_pytorch_model.safetensors", header, data)

    return spoil


def spoil_state(change):
    """A model whose tensors were changed by `change(state)` after it was written."""

    def spoil(folder):
        state = load_folder(folder)
        change(state)
        save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    return spoil


def spoil_config(**fields):
    return lambda folder: write_original(folder, TINY, **fields)


def spoil_shards(change):
    """A sharded model, its folder and index changed by `change(folder, index)`."""

    def spoil(folder):
        whole = folder / "diffusion_pytorch_model.safetensors"
        tensors = files.open_file(whole, [])
        files.write_shards(folder, "model", tensors, shard_bytes=100_000)
        whole.unlink()
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index = change(folder, index) or index
        path.write_text(index if isinstance(index, str) else json.dumps(index))

    return spoil


def cut(path, size=100):
    path.write_bytes(path.read_bytes()[:-size])


def poison(name, value):
    def change(state):
        state[name] = state[name].copy()
        state[name].reshape(-1)[-1] = value

    return change


def put(name, array):
    return lambda state: state.update({name: array})


def drop(*names):
    return lambda state: [state.pop(name) for name in names]


def keep_blocks(*kept):
    def change(state):
        for name in [n for n in state if n.startswith("transformer_blocks.")]:
            if int(name.split(".")[1]) not in kept:
                del state[name]

    return change


def another_shard(folder, index):
    first = next(iter(index["weight_map"]))
    state = load_file(folder / index["weight_map"][first])
    other = next(f for f in index["weight_map"].values() if f != index["weight_map"][first])
    save_file(load_file(folder / other) | {first: state[first]}, folder / other)


def move_in_index(folder, index):
    names, shards = index["weight_map"], sorted(set(index["weight_map"].values()))
    name = next(n for n in names if names[n] == shards[0])
    names[name] = shards[1]


WHOLE = "diffusion_pytorch_model.safetensors"
SHARD_2 = "model-00002-of-"
ZEROS = np.zeros(3, np.float32)
LINE = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
TWICE = b"{" + LINE + b"," + LINE + b"}"
BLOCK = "transformer_blocks.1."
MALFORMED = {
    "empty file": (lambda f: (f / WHOLE).write_bytes(b""), "has 0 bytes"),
    "seven bytes": (lambda f: (f / WHOLE).write_bytes(b"1234567"), "has 7 bytes"),
    "header longer than the file": (
        lambda f: (f / WHOLE).write_bytes((10**6).to_bytes(8, "little") + b"{}"),
        "its header should have 1000000",
    ),
    "LFS pointer": (
        lambda f: (f / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
        "Git LFS pointer.*git lfs pull",
    ),
    "header is no JSON": (spoil_header(b"{'a': 1}"), "its header is no JSON"),
    "header is no UTF-8": (spoil_header(b'{"\xff\xfe": 1}'), "its header is no JSON"),
    "header is nested": (spoil_header(b"[" * 50_000), "its header is no JSON"),
    "header is a list": (spoil_header([1, 2]), "its header is a list"),
    "name twice in a header": (spoil_header(TWICE), "a is in the header more than once"),
    "no offsets": (
        spoil_header({"a": {"dtype": "F32", "shape": [2]}}),
        "a has no dtype, shape and data_offsets",
    ),
    "unknown dtype": (spoil_header({"a": entry("F128")}), "a has dtype 'F128'; known are"),
    "negative shape": (spoil_header({"a": entry(shape=(-2,))}), "only whole numbers from 0 on"),
    "fractional shape": (spoil_header({"a": entry(shape=(2.0,))}), "only whole numbers from 0 on"),
    "size and shape differ": (
        spoil_header({"a": entry(shape=(3,))}),
        "a of shape .* needs 12 bytes and has 8",
    ),
    "tensors overlap": (
        spoil_header({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
        "b overlaps the tensor before it",
    ),
    "hole between tensors": (
        spoil_header({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20),
        "4 bytes before b belong to no tensor",
    ),
    "half-downloaded": (lambda f: cut(f / WHOLE), "100 bytes are not there.*half-downloaded"),
    "bytes at the end": (
        lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes() + b"more"),
        "4 bytes at the end belong to no tensor",
    ),
    "half-downloaded shard": (
        spoil_shards(lambda f, i: cut(next(f.glob(f"{SHARD_2}*")))),
        f"{SHARD_2}.*half-downloaded",
    ),
    "shard not there": (
        spoil_shards(lambda f, i: next(f.glob(f"{SHARD_2}*")).unlink()),
        f"names {SHARD_2}.*not there; download it",
    ),
    "shard beside the index": (
        spoil_shards(lambda f, i: save_file({"x": ZEROS}, f / "model-00009-of-00009.safetensors")),
        "model-00009-of-00009.safetensors is a shard that .* does not name",
    ),
    "index is no JSON": (spoil_shards(lambda f, i: "{"), "is no index of tensors"),
    "index is nested": (spoil_shards(lambda f, i: "[" * 50_000), "is no index of tensors"),
    "index without a map": (spoil_shards(lambda f, i: {"metadata": {}}), "'weight_map'"),
    "index of lists": (spoil_shards(lambda f, i: {"weight_map": [1]}), "is no index of tensors"),
    "index points elsewhere": (
        spoil_shards(lambda f, i: {"weight_map": {"a": "../other.safetensors"}}),
        r"points outside its folder: \.\./other",
    ),
    "index knows less": (
        spoil_shards(lambda f, i: i["weight_map"].pop("proj.bias") and None),
        "proj.bias is in .* and not in model.safetensors.index.json",
    ),
    "index names what is not there": (
        spoil_shards(lambda f, i: i["weight_map"].update(ghost=i["weight_map"]["proj.bias"])),
        "names .* for ghost, and it is not in that file",
    ),
    "index swaps shards": (spoil_shards(move_in_index), "and it is not in that file"),
    "tensor in two shards": (spoil_shards(another_shard), r"is in model-\S+ and in model-"),
    "two models": (
        lambda f: save_file({"x": ZEROS}, f / "other.safetensors"),
        "more than one model .*keep one of them",
    ),
    "no weights": (lambda f: (f / WHOLE).unlink(), "holds no weights"),
    "missing tensor": (spoil_state(drop(f"{BLOCK}ff.net.2.bias")), "ff.net.2.bias is missing"),
    "unexpected tensor": (spoil_state(put("clip_proj.weight", ZEROS)), "clip_proj.weight is not"),
    "wrong shape": (
        spoil_state(put(f"{BLOCK}attn1.to_q.bias", ZEROS)),
        r"attn1.to_q.bias has shape \(3,\), wanted \(32,\)",
    ),
    "whole numbers": (
        spoil_state(put("norm_final.bias", np.zeros(32, np.int64))),
        "norm_final.bias has dtype int64",
    ),
    "dtypes mixed in a stack": (
        spoil_state(put(f"{BLOCK}norm1.norm.bias", np.zeros(32, np.float16))),
        "in other layers have dtypes .*--dtype",
    ),
    "NaN": (spoil_state(poison(f"{BLOCK}attn1.to_v.weight", np.nan)), "to_v.weight holds NaN"),
    "infinity": (spoil_state(poison("proj.weight", -np.inf)), "proj.weight holds NaN or inf"),
    "both layouts": (
        spoil_state(put(f"{BLOCK}attn1.add_q_proj.weight", np.zeros((32, 32), np.float32))),
        "add_q_proj.weight and .*attn2.to_q.weight are the same weight in both layouts",
    ),
    "a block is missing": (spoil_state(keep_blocks(0, 1, 3)), r"it has blocks \[0, 1, 3\]"),
    "no patch embedding": (spoil_state(drop("proj.weight")), "proj.weight is missing"),
    "no text projection": (
        spoil_state(drop("text_proj.0.weight", "text_proj.1.weight", "text_proj.1.bias")),
        "text_proj.weight is missing",
    ),
    "flat patch embedding": (
        spoil_state(put("proj.weight", np.zeros((32, 64), np.float32))),
        r"proj.weight has shape \(32, 64\)",
    ),
    "not ours": (
        lambda f: save_file({"x": ZEROS}, f / WHOLE),
        "is no transformer, VAE or LoRA of EasyAnimate: its first tensor is x",
    ),
    "config is nested": (
        lambda f: (f / "config.json").write_text("[" * 50_000),
        "cannot be read as JSON",
    ),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "config of another class": (spoil_config(_class_name="FluxTransformer"), "holds a FluxTransf"),
    "config with other depth": (
        spoil_config(num_layers=30),
        "num_layers is 30, and the tensors have 4",
    ),
    "config with other channels": (
        spoil_config(in_channels=33),
        "in_channels is 33, and the tensors have 16",
    ),
    "config of sliding windows": (
        spoil_config(swa_layers=[1]),
        r"swa_layers is \[1\], and only None is supported",
    ),
    "config without an epsilon": (spoil_config(norm_eps=None), "norm_eps is None"),
    "config with a word for a number": (spoil_config(mmdit_layers="all"), "mmdit_layers is 'all'"),
    "config of after-norm": (spoil_config(after_norm=True), "after_norm is True"),
    "pickle": (
        lambda f: (f / WHOLE).rename(f / "diffusion_pytorch_model.bin"),
        "is a pickle, which can run code.*--allow-pickle",
    ),
}


@pytest.mark.reliability  # R13
@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_wrong_is_named_with_exit_code_2_and_nothing_is_written(tmp_path, case, capsys):
    spoil, message = MALFORMED[case]
    write_original(tmp_path / "model", TINY)
    spoil(tmp_path / "model")
    assert main([str(tmp_path / "model"), str(tmp_path / "out"), "--to", "jax"]) == 2
    assert_matches(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def assert_matches(message, text):
    assert re.search(message, text), text


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    state = random_state(TINY)
    del state["norm_final.bias"]
    state |= {"extra": ZEROS, "proj.bias": ZEROS}
    write_original(tmp_path / "model", TINY, state, num_layers=7)
    with pytest.raises(ValueError, match="4 problems") as error:
        convert(tmp_path / "model", tmp_path / "out", Options("jax"))
    for name in ("norm_final.bias is missing", "extra is not", "proj.bias has", "num_layers is 7"):
        assert name in str(error.value)
    with pytest.raises(ValueError, match="4 problems"):
        load_mmdit(tmp_path / "model")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders that commands can go wrong with."""
    folder = tmp_path_factory.mktemp("places")
    write_original(folder / "model", TINY)
    write_original(folder / "pipeline" / "transformer", TINY)
    index = '{"text_encoder": ["transformers", "Bert"]}'
    (folder / "pipeline" / "model_index.json").write_text(index)
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("")
    config = VAEConfig(channels=(8, 8, 8), layers=1, groups=4, unshuffle=4, norm="rms")
    zeros = {n: np.zeros(s) for n, s in shapes_of(abstract(CausalVAE, config)).items()}
    save_module(folder / "ours", build(CausalVAE, config, zeros))
    convert(folder / "model", folder / "changed", Options("jax"))
    fields = json.loads((folder / "changed" / "config.json").read_text())
    del fields["depth"]
    (folder / "changed" / "config.json").write_text(json.dumps(fields | {"colour": "red"}))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out", "--to", "jax"], "nowhere does not exist"),
        (["model", "full", "--to", "jax"], "full already exists"),
        (["model", "out", "--to", "flax"], "invalid choice 'flax'"),
        (["model", "out"], "--to"),
        (["model", "out", "--to", "jax", "--dtype", "int8"], "invalid choice 'int8'"),
        (["model", "out", "--to", "jax", "--only", "vae"], "wanted a AutoencoderKLMagvit"),
        (["pipeline", "out", "--to", "jax"], "names text_encoder, and there is no such folder"),
        (["pipeline", "out", "--to", "jax", "--only", "vae"], "has no vae; it has transformer"),
        (["ours", "out", "--to", "diffusers"], "unshuffle is 4, norm is 'rms'.*--only transformer"),
        (["full", "out", "--to", "jax"], "no file of weights|holds no weights"),
        (["changed", "out", "--to", "jax"], "'colour' is not known, 'depth' is missing"),
    ],
)
def test_commands_that_cannot_work_are_refused(places, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(places)
    before = sorted(places.rglob("*"))
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert_matches(message, capsys.readouterr().err)
    assert sorted(places.rglob("*")) == before


def test_a_conversion_that_is_interrupted_leaves_nothing(tmp_path):
    write_original(tmp_path / "model", TINY)

    def stop(size, total):
        assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "model", tmp_path / "out", Options("jax"), stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_cast_on_the_way(tmp_path, dtype, capsys):
    state = write_original(tmp_path / "model", TINY)
    command = [str(tmp_path / "model"), str(tmp_path / "out"), "--to", "original", "--dtype", dtype]
    assert main(command) == 0
    cast = {name: value.astype(np.dtype(dtype)) for name, value in state.items()}
    assert_same_bits(load_folder(tmp_path / "out"), cast)
    report = capsys.readouterr().out
    size = sum(value.nbytes for value in cast.values()) / 1e6
    assert_matches(f"total *{len(state)} tensors *{size:.2f} MB in .* MB/s, peak RSS", report)


def test_what_float16_cannot_hold_is_named(tmp_path):
    state = random_state(TINY)
    poison("proj.bias", 70_000)(state)
    write_original(tmp_path / "model", TINY, state)
    with pytest.raises(ValueError, match=r"proj.bias holds NaN or infinity in float16"):
        convert(tmp_path / "model", tmp_path / "out", Options("jax", dtype="float16"))
    convert(tmp_path / "model", tmp_path / "out", Options("jax", dtype="bfloat16"))


def test_memory_is_used_again_only_when_no_view_of_it_is_left():
    memory, size = files.Memory(most=2), 2 * files.PIECE
    place = lambda array: array.__array_interface__["data"][0]  # noqa: E731
    first = memory.take(size)
    first[:] = 1
    view = first.view(np.int16).reshape(2, -1)[1:].T
    del first
    second = memory.take(size)
    second[:] = 2
    assert (view == 257).all() and not memory.free
    taken = {place(second)}
    del second
    third, fourth = memory.take(size - 5), memory.take(size)
    assert {place(third)} == taken and place(fourth) not in taken
    del third, fourth, view
    assert len(memory.free) == 2  # of three


def test_matrices_of_many_pieces_pass_through_shards_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    matrices = {f"m{i}": rng.integers(0, 256, (3000, 5700 - i), np.uint8) for i in range(5)}
    save_file(matrices, tmp_path / "theirs.safetensors")
    there = files.open_file(tmp_path / "theirs.safetensors", [], files.Memory())
    turned = {name: tensor.transpose((1, 0)) for name, tensor in there.items()}
    files.write_shards(tmp_path, "ours", turned, shard_bytes=40_000_000)
    found = files.open_index(tmp_path / "ours.safetensors.index.json", [])
    for name, matrix in matrices.items():
        np.testing.assert_array_equal(found[name].read(), matrix.T)


def test_files_are_those_of_the_safetensors_library(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.uint8]
    arrays = {
        f"{np.dtype(dtype)}.{i}": np.asarray(9 * rng.standard_normal(shape)).astype(dtype)
        for dtype in dtypes
        for i, shape in enumerate([(3, 5, 7), (11,), (), (4, 0), (1, 1, 6)])
    }
    files.write_file(tmp_path / "ours", {name: Tensor.of(x) for name, x in arrays.items()})
    assert_same_bits(load_file(tmp_path / "ours"), arrays)
    save_file(arrays, tmp_path / "theirs")
    problems = []
    found = files.open_file(tmp_path / "theirs", problems)
    assert not problems
    assert_same_bits({name: tensor.read() for name, tensor in found.items()}, arrays)
    box = (slice(1, 3), slice(2, 3), slice(0, 5))
    part = found["bfloat16.0"].read(box)
    np.testing.assert_array_equal(part, arrays["bfloat16.0"][box])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "float8_e4m3fn", "int64"])
@pytest.mark.parametrize("shape", [(300, 1048), (7, 5), (1, 8), (8, 1), (257, 129), (0, 8)])
def test_transposed_copies_are_those_of_numpy(dtype, shape):
    x = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    np.testing.assert_array_equal(dense(x.T), x.T)
    assert dense(x.T).flags.c_contiguous
    np.testing.assert_array_equal(dense(x[:, 3:-1].T), x[:, 3:-1].T)


def test_a_loaded_model_computes_in_the_dtype_asked_for(tmp_path):
    state = write_original(tmp_path, TINY)
    for mesh in (make_mesh(MeshConfig(data=8)), None):
        model = load_mmdit(tmp_path, dtype="float32", kernels="bfloat16", mesh=mesh)
        assert model.config.dtype == "float32"
        for name, leaf in named_weights(model).items():
            assert leaf.dtype == ("bfloat16" if name.endswith("kernel") else "float32"), name
    kernel = np.asarray(model.blocks[0].video.attention.q.kernel)[2]
    expected = state["transformer_blocks.2.attn1.to_q.weight"].T
    np.testing.assert_array_equal(kernel, expected.astype(ml_dtypes.bfloat16))


def test_a_mesh_is_filled_from_the_files_without_a_whole_copy(tmp_path, monkeypatch):
    config = replace(TINY, heads=4, time_width=64, mmdit_depth=2)
    write_original(tmp_path, config)
    read, sizes = Tensor.read, []

    def recorded(self, index=()):
        values = read(self, index)
        sizes.append(values.nbytes)
        return values

    whole = load_mmdit(tmp_path)
    monkeypatch.setattr(Tensor, "read", recorded)
    sharded = load_mmdit(tmp_path, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
    expected = flat_weights(whole)
    largest = max(value.nbytes for value in expected.values())
    assert max(sizes) <= largest / 4
    for name, value in named_weights(sharded).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    kernel = sharded.blocks[0].video.mlp.up.kernel.get_value()
    assert {shard.data.nbytes for shard in kernel.addressable_shards} == {kernel.nbytes // 8}


PEAK = """
    import sys
    from pathlib import Path
    from easyanimate_jax.weights.conversion import Options, convert, peak_rss

    warm, source, target, to = sys.argv[1:]
    convert(warm, target + "-warm", Options(to))  # imports and compiles what is needed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_rss()
    convert(source, target, Options(to))
    print(peak_rss() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded_by_one_stacked_tensor_and_not_by_the_model(tmp_path):
    config = replace(TINY, depth=16, mmdit_depth=16, heads=8, head_width=64)
    noise = np.random.default_rng(0).standard_normal(65_537, np.float32).astype("bfloat16")
    empty = mmdit_table.to_torch(
        shapes_only(shapes_of(abstract(MMDiT, config))), config, "original"
    )
    state = {name: np.resize(noise, tensor.shape) for name, tensor in empty.items()}
    write_original(tmp_path / "original", config, state)
    write_original(tmp_path / "tiny", TINY)
    shapes = shapes_of(abstract(MMDiT, config)).values()
    sizes = [2 * int(np.prod(shape)) for shape in shapes]
    for source, target, to in (("original", "ours", "jax"), ("ours", "back", "diffusers")):
        folders = [str(tmp_path / name) for name in ("tiny", source, target)]
        code = textwrap.dedent(PEAK)
        ran = subprocess.run(
            [sys.executable, "-c", code, *folders, to], capture_output=True, text=True, check=True
        )
        peak = int(ran.stdout.split()[-1])
        assert sum(sizes) > 5 * max(sizes)
        assert peak < 1.3 * max(sizes) + 20e6, (to, peak, max(sizes), sum(sizes))


def test_a_run_gives_its_averaged_or_raw_weights_of_any_step(tmp_path):
    config = replace(TINY, in_channels=33, mmdit_depth=3, dtype="float32")
    states = [random_state(config, seed=seed) for seed in range(2)]
    for name, state in zip("ab", states, strict=True):
        write_original(tmp_path / name, config, state)
    write_run(tmp_path / "run", [load_mmdit(tmp_path / name, dtype="float32") for name in "ab"])

    def converted(*options):
        target = tmp_path / "-".join(["out", *map(str, options)])
        command = [str(tmp_path / "run"), str(target), "--to", "original", "--only", "transformer"]
        assert main([*command, *options]) == 0
        return load_folder(target)

    raw, ema = states
    assert_same_bits(converted(), ema)
    assert_same_bits(converted("--weights", "raw"), raw)
    assert_same_bits(converted("--step", "3"), raw)
    assert_same_bits(converted("--step", "3", "--weights", "raw"), ema)
    loaded = load_mmdit(tmp_path / "run")
    assert loaded.config == config
    assert_same_bits(flat_weights(loaded), flat_weights(load_mmdit(tmp_path / "b")))
    with pytest.raises(ValueError, match=r"holds no checkpoint 5; complete ones in .*3, 7"):
        load_mmdit(tmp_path / "run", step=5)
    flip_a_bit(tmp_path / "run" / "checkpoints" / "7" / "ema")
    with pytest.raises(ValueError, match="is damaged"):
        load_mmdit(tmp_path / "run")


@pytest.mark.parametrize("wanted", [33, 48])
def test_a_t2v_model_becomes_an_inpaint_or_control_model_by_name(tmp_path, wanted, capsys, caplog):
    state = write_original(tmp_path / "model", TINY)
    command = [str(tmp_path / "model"), str(tmp_path / "out"), "--to", "original"]
    assert main([*command, "--in-channels", str(wanted)]) == 0
    out = capsys.readouterr().out
    assert "tensors as they are" in out and "extended: patches.kernel" in out
    assert f"zeroed: patches.kernel, input channels 16 to {wanted - 1}" in out
    found = load_folder(tmp_path / "out")
    kernel = found.pop("proj.weight")
    assert kernel.shape == (32, wanted, 2, 2)
    np.testing.assert_array_equal(kernel[:, :16], state.pop("proj.weight"))
    assert not kernel[:, 16:].any()
    assert_same_bits(found, state)

    model = load_mmdit(tmp_path / "out", in_channels=16)
    assert "cut: patches.kernel, input channels 0 to 15 of" in caplog.text
    assert_same_bits(flat_weights(model), flat_weights(load_mmdit(tmp_path / "model")))


def test_training_checkpoints_of_a_vae_lose_their_wrapping(tmp_path):
    state = random_state(TINY_VAE)
    fields = {"norm_num_groups": 4}
    wrapped = {f"state_dict.{name}": value for name, value in state.items()}
    wrapped |= {"state_dict.loss.logvar": np.zeros(()), "state_dict.loss.disc.main.0.bias": ZEROS}
    write_original(tmp_path / "wrapped", TINY_VAE, wrapped, **fields)
    write_original(tmp_path / "plain", TINY_VAE, state | {"loss.logvar": np.zeros(())}, **fields)
    for name in ("wrapped", "plain"):
        convert(tmp_path / name, tmp_path / f"{name}-out", Options("original"))
        assert_same_bits(load_folder(tmp_path / f"{name}-out"), state)


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.reliability  # R13
def test_pickles_are_read_on_request_and_only_weights(tmp_path, capsys):
    state = random_state(TINY_VAE)
    tensors = {name: torch.tensor(value) for name, value in state.items()}
    half = {name: value.bfloat16() for name, value in tensors.items()}
    torch.save({"state_dict": tensors | {"loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    torch.save(half, tmp_path / "half.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"x": Evil()}))
    (tmp_path / "list.pt").write_bytes(b"")
    command = lambda name: [str(tmp_path / name), str(tmp_path / f"{name}-out"), "--to", "original"]  # noqa: E731
    assert main(command("vae.ckpt")) == 2
    assert "is a pickle" in capsys.readouterr().err
    assert main([*command("vae.ckpt"), "--allow-pickle"]) == 2  # 32 groups do not fit 8 channels
    assert "norm_num_groups is 32, which does not divide 8" in capsys.readouterr().err
    wide = VAEConfig(channels=(32, 32, 32, 32))
    state = random_state(wide)
    tensors = {name: torch.tensor(value) for name, value in state.items()}
    torch.save({"state_dict": tensors | {"loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    assert main([*command("vae.ckpt"), "--allow-pickle"]) == 0
    assert_same_bits(load_folder(tmp_path / "vae.ckpt-out"), state)
    half = {name: value.bfloat16() for name, value in tensors.items()}
    torch.save(half, tmp_path / "half.pt", _use_new_zipfile_serialization=False)
    assert main([*command("half.pt"), "--allow-pickle"]) == 0
    cast = {name: value.astype(ml_dtypes.bfloat16) for name, value in state.items()}
    assert_same_bits(load_folder(tmp_path / "half.pt-out"), cast)
    for name in ("evil.bin", "list.pt"):
        assert main([*command(name), "--allow-pickle"]) == 2
        out, err = capsys.readouterr()
        assert "is no pickle of weights alone" in err and "this ran" not in out + err


VAE_SHAPES = {name: Tensor.of(value) for name, value in random_state(TINY_VAE).items()}


@pytest.mark.parametrize("scale", [0, float("nan"), -0.7, float("inf"), "0.7", None])
def test_a_vae_without_a_usable_scale_is_refused(scale):
    fields = {"norm_num_groups": 4, "scaling_factor": scale}
    with pytest.raises(ValueError, match=r"scaling_factor .*; the released model has 32 and 0\.71"):
        vae_table.config_of(VAE_SHAPES, fields)


def test_the_scale_of_a_vae_is_checked_before_it_is_converted(tmp_path, capsys):
    write_original(tmp_path / "vae", TINY_VAE, scaling_factor=0)
    assert main([str(tmp_path / "vae"), str(tmp_path / "out"), "--to", "jax"]) == 2
    assert "scaling_factor 0; the released model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"norm_num_groups": 4}, "scaling_factor"),
        ({"scaling_factor": 0.7}, "norm_num_groups"),
        (None, "scaling_factor"),
    ],
)
def test_what_a_vae_config_does_not_say_is_said(fields, name, caplog):
    state = random_state(VAEConfig(channels=(32, 32, 32, 32), layers=1))
    vae_table.config_of(state, fields)
    released = {"scaling_factor": 0.7125, "norm_num_groups": 32}[name]
    assert f"no config.json gives {name}; the released {released} is used" in caplog.text


DDIM, EULER = (SCHEDULERS[name] for name in ("DDPM", "Flow"))
V51_VAE, V5_VAE = TINY_VAE, replace(TINY_VAE, attention=True)


@pytest.mark.parametrize(
    ("texts", "scheduler", "vae", "said"),
    [
        (1, EULER, V51_VAE, ()),
        (2, DDIM, V5_VAE, ()),
        (1, EULER, V5_VAE, ("has an attention .* as released with V5, .* as in V5.1:",)),
        (1, DDIM, V51_VAE, ("is a DDIMScheduler, .* reads 1 text encoder, ",)),
        (
            2,
            EULER,
            V51_VAE,
            ("is a FlowMatchEuler", "has no attention .* as in V5:"),
        ),
        (2, {"_class_name": "Other"}, replace(TINY_VAE, norm="rms"), ()),
    ],
)
def test_parts_of_another_release_are_named(texts, scheduler, vae, said):
    found = strange_parts(texts, scheduler["_class_name"], vae)
    assert len(found) == len(said)
    for line, message in zip(found, said, strict=True):
        assert_matches(message, line)


def test_a_conversion_names_parts_of_another_release(tmp_path, capsys):
    """A VAE and a scheduler of V5 beside V5.1; a pipeline of them warns when it is loaded."""
    write_original(tmp_path / "in" / "transformer", TINY)
    write_original(tmp_path / "in" / "vae", V5_VAE)
    texts = {"model_type": "qwen2", "hidden_size": 24}
    for name, told in (("text_encoder/config", texts), ("scheduler/scheduler_config", DDIM)):
        (tmp_path / "in" / name).parent.mkdir()
        (tmp_path / "in" / f"{name}.json").write_text(json.dumps(told))
    (tmp_path / "in" / "tokenizer").mkdir()
    save_file({"layers.0.x": ZEROS}, tmp_path / "in" / "text_encoder" / "model.safetensors")
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "jax"]) == 0
    out = capsys.readouterr().out
    assert "note: the VAE has an attention" in out and "note: the scheduler is a DDIM" in out
    (tmp_path / "in" / "scheduler" / "scheduler_config.json").write_text(json.dumps(EULER))
    with pytest.warns(UserWarning, match="the VAE has an attention in its middle, as released wit"):
        load_pipeline(tmp_path / "in")


@pytest.mark.parametrize(
    ("layer", "fields", "message"),
    [
        ("encoder.block.{}.x", {"num_layers": 2}, "names 2 layers, and the weights have 3"),
        ("bert.encoder.layer.{}.x", {"num_hidden_layers": 1}, "names 1 layers, and the weights"),
        ("model.layers.{}.x", {"text_config": {"num_hidden_layers": 4}}, "names 4 layers, and the"),
        ("encoder.block.{}.layer.0.x", {"num_layers": 3}, ""),
        ("model.layers.{}.x", {"num_hidden_layers": 3}, ""),
    ],
)
def test_a_text_encoder_with_another_config_is_not_converted(
    tmp_path, layer, fields, message, capsys
):
    folder = tmp_path / "in" / "text_encoder"
    folder.mkdir(parents=True)
    state = {layer.format(i): ZEROS for i in range(3)}
    state |= {"decoder.block.7.x": ZEROS, "visual.layers.9.x": ZEROS}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    code = main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "jax"])
    assert code == (2 if message else 0) and message in capsys.readouterr().err
    assert (tmp_path / "out").exists() == (not message)
