"""Weights in 8 bits are read with their scales, in every model and conversion, or refused."""

import ml_dtypes
import numpy as np
import pytest
from arrays import flat_weights
from safetensors.numpy import load_file, save_file
from test_conversion import (
    TINY,
    TINY_VAE,
    assert_same_bits,
    load_folder,
    random_state,
    write_original,
)
from test_text import BERT, MT5, reference

from easyanimate_jax.commands.convert import main
from easyanimate_jax.text.bert import load_bert
from easyanimate_jax.text.t5 import load_t5
from easyanimate_jax.weights.folder import open_model
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.scales import scaled

FP8 = ml_dtypes.float8_e4m3fn
SHORT = np.ones((4, 6), FP8)
ONE = np.ones((), np.float32)


def by_tensor(weight):
    return np.abs(weight).max() / 448


def by_row(weight):
    return (np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / 448).astype(
        np.float32
    )


def quantized(state, word, scale_of=by_tensor, dtype=FP8, inputs=None):
    """(the state with matrices in 8 bits and their scales, the same values in float32)"""
    stored, plain = {}, {}
    for name, value in state.items():
        if value.ndim < 2 or not name.endswith("weight"):
            stored[name] = plain[name] = value
            continue
        scale = np.asarray(scale_of(value), np.float32)
        stored[name] = (value / scale).astype(dtype)
        stored[name.removesuffix("weight") + word] = scale
        if inputs:
            stored[name.removesuffix("weight") + inputs] = np.ones((), np.float32)
        plain[name] = stored[name].astype(np.float32) * scale
    return stored, plain


FORMS = {
    "ComfyUI": (dict(word="scale_weight", inputs="scale_input"), {"scaled_fp8": np.zeros(0, FP8)}),
    "ComfyUI, later": (dict(word="weight_scale", inputs="input_scale"), {}),
    "by row": (dict(word="weight_scale", scale_of=by_row), {}),
    "5 bits of exponent": (dict(word="scale_weight", dtype=ml_dtypes.float8_e5m2), {}),
    "whole numbers": (
        dict(word="weight_scale", dtype=np.int8, scale_of=lambda w: by_tensor(w) * 4),
        {},
    ),
}


def read(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_scale_gives_the_values(form):
    options, marker = FORMS[form]
    rng, shapes = np.random.default_rng(0), {"a.weight": (4, 6), "b.c.weight": (5, 4, 3, 3, 3)}
    state = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    stored, plain = quantized(state | {"a.bias": ONE[None]}, **options)
    problems = []
    found = scaled({n: Tensor.of(x) for n, x in (stored | marker).items()}, problems)
    assert not problems
    assert_same_bits(read(found), plain)
    part = found["b.c.weight"].read((slice(2, 4), slice(1, 3)))
    np.testing.assert_array_equal(part, plain["b.c.weight"][2:4, 1:3])


@pytest.mark.parametrize(
    ("config", "load", "ours", "theirs"),
    [
        (BERT, load_bert, "blocks.up.kernel", "encoder.layer.{}.intermediate.dense.weight"),
        (MT5, load_t5, "blocks.down.kernel", "encoder.block.{}.layer.1.DenseReluDense.wo.weight"),
    ],
)
def test_a_text_encoder_is_read_with_its_scales(tmp_path, config, load, ours, theirs):
    reference(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored, plain = quantized(load_file(path), "scale_weight", inputs="scale_input")
    save_file(stored | {"scaled_fp8": np.zeros(0, FP8)}, path)
    kernels = np.stack([plain[theirs.format(i)].T for i in range(3)])
    np.testing.assert_array_equal(flat_weights(load(tmp_path))[ours], kernels)


@pytest.mark.parametrize(("config", "name"), [(TINY, "transformer"), (TINY_VAE, "vae")])
def test_a_transformer_and_a_vae_are_read_with_their_scales(tmp_path, config, name):
    stored, plain = quantized(random_state(config), "weight_scale", by_row)
    found, problems = [], []
    for number, state in enumerate((stored, plain)):
        write_original(tmp_path / str(number), config, state)
        found.append(open_model(tmp_path / str(number), name, problems))
    assert not problems
    assert_same_bits(*(read(model.tensors) for model in found))


def test_conversions_apply_the_scales(tmp_path):
    options, marker = FORMS["ComfyUI"]
    folder = tmp_path / "in" / "text_encoder"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    text = {f"encoder.block.{i}.o.weight": rng.standard_normal((4, 6)) for i in range(2)}
    stored, plain = quantized(text, **options)
    save_file(stored | marker, folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_layers": 2}')
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "original"]) == 0
    assert_same_bits(load_folder(tmp_path / "out" / "text_encoder"), plain)


REFUSED = {
    "blocks": (
        {"a.weight": SHORT, "a.weight_scale": np.ones((2, 3), np.float32)},
        "a scale of shape",
    ),
    "columns": (
        {"a.weight": SHORT, "a.scale_weight": np.ones((1, 6), np.float32)},
        "one for each row",
    ),
    "inverse": ({"a.weight": SHORT, "a.weight_scale_inv": ONE}, "a.weight_scale_inv belongs to"),
    "four bits": (
        {"a.weight": np.ones((12, 1), np.uint8), "a.weight.absmax": np.ones(2, np.float32)},
        "a.weight.absmax belongs to",
    ),
    "GPTQ": ({"a.qweight": np.ones((4, 6), np.int32), "a.scales": SHORT}, "a.qweight belongs to"),
    "a layer without": (
        {"a.weight": SHORT, "b.weight": SHORT, "b.scale_weight": ONE},
        "a.weight has dtype float8_e4m3fn and no scale",
    ),
    "a marker alone": ({"a.weight": SHORT, "scaled_fp8": np.zeros(0, FP8)}, "a.weight .* no scale"),
    "whole numbers alone": (
        {"a.weight": np.ones((4, 6), np.int8)},
        "a.weight .* int8 and no scale",
    ),
    "a long weight": (
        {"a.weight": np.ones((4, 6), np.float16), "a.scale_weight": ONE},
        "only weights in 8 bits have scales",
    ),
    "another format": (
        {
            "a.weight": SHORT,
            "a.weight_scale": ONE,
            "a.comfy_quant": np.frombuffer(b'{"format": "nvfp4"}', np.uint8),
        },
        "a.comfy_quant says 'nvfp4'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_scales_that_are_not_understood_are_refused(case):
    arrays, message = REFUSED[case]
    problems = []
    scaled({name: Tensor.of(array) for name, array in arrays.items()}, problems)
    assert len(problems) >= 1
    with pytest.raises(ValueError, match=message):
        raise ValueError("\n".join(problems))


def test_what_is_not_quantized_passes_unchanged():
    arrays = {"a.weight": SHORT, "b.scale": ONE, "c.kernel": SHORT, "ids": np.ones(3, np.int64)}
    tensors, problems = {name: Tensor.of(array) for name, array in arrays.items()}, []
    assert scaled(tensors, problems) == tensors and not problems


def test_a_refused_text_encoder_is_not_converted(tmp_path, capsys):
    folder = tmp_path / "in" / "text_encoder"
    folder.mkdir(parents=True)
    state = {"layer.0.weight": SHORT, "layer.0.weight.absmax": ONE}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "jax"]) == 2
    assert "layer.0.weight.absmax belongs to a quantized" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
