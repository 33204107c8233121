"""Weights in 8 bits are read with their scales, in every model and conversion, or refused."""

import ml_dtypes
import numpy as np
import pytest
from arrays import flat_weights
from safetensors.numpy import load_file, save_file
from test_conversion import TINY, TINY_VAE, load_folder, random_state, write_original
from test_text import BERT, MT5, reference

from easyanimate_jax.commands.convert import main
from easyanimate_jax.text.bert import load_bert
from easyanimate_jax.text.t5 import load_t5
from easyanimate_jax.weights.folder import load_mmdit, load_vae
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.scales import scaled

FP8 = ml_dtypes.float8_e4m3fn


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config, load", [(BERT, load_bert), (MT5, load_t5)])
def test_a_text_encoder_is_read_with_its_scales(tmp_path, config, load, form):
    options, marker = FORMS[form]
    reference(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored, plain = quantized(load_file(path), **options)
    save_file(plain, path)
    expected = flat_weights(load(tmp_path))
    save_file(stored | marker, path)
    found = flat_weights(load(tmp_path))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config, load", [(TINY, load_mmdit), (TINY_VAE, load_vae)])
def test_a_transformer_and_a_vae_are_read_with_their_scales(tmp_path, config, load, form):
    options, marker = FORMS[form]
    stored, plain = quantized(random_state(config), **options)
    write_original(tmp_path / "plain", config, plain)
    write_original(tmp_path / "stored", config, stored | marker)
    expected, found = (flat_weights(load(tmp_path / name)) for name in ("plain", "stored"))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("form", ["ComfyUI", "by row"])
def test_conversions_apply_the_scales(tmp_path, form):
    options, marker = FORMS[form]
    stored, plain = quantized(random_state(TINY), **options)
    write_original(tmp_path / "pipeline" / "transformer", TINY, stored | marker)
    reference(MT5).save_pretrained(tmp_path / "pipeline" / "text_encoder")
    path = tmp_path / "pipeline" / "text_encoder" / "model.safetensors"
    text, plain_text = quantized(load_file(path), **options)
    save_file(text | marker, path)
    assert main([str(tmp_path / "pipeline"), str(tmp_path / "out"), "--to", "original"]) == 0
    for name, expected in (("transformer", plain), ("text_encoder", plain_text)):
        found = load_folder(tmp_path / "out" / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)


SHORT = np.ones((4, 6), FP8)
ONE = np.ones((), np.float32)
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
    write_original(tmp_path / "in" / "transformer", TINY)
    reference(BERT).save_pretrained(tmp_path / "in" / "text_encoder")
    path = tmp_path / "in" / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["encoder.layer.0.output.dense.weight.absmax"] = np.ones(3, np.float32)
    save_file(state, path)
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "jax"]) == 2
    assert "output.dense.weight.absmax belongs to a quantized" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
