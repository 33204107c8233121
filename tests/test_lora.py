"""LoRA: adapters beside frozen weights, and the files of other tools."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from fakes import TINY
from flax import nnx
from peft import (
    LoraConfig,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.numpy import load_file, save_file
from test_mmdit import converted, normal, numpy_state, reference, run

from easyanimate_jax.commands.convert import main as convert
from easyanimate_jax.models.layers import linears
from easyanimate_jax.models.lora import LoRAConfig, attach, chosen, is_adapter, without_some
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.models.storage import store
from easyanimate_jax.sharding import MeshConfig, make_mesh, shardings
from easyanimate_jax.weights import adapters, lora
from easyanimate_jax.weights.adapters import Weighted, named_weight
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.lora import LoRA, Pair
from easyanimate_jax.weights.mmdit_table import dense_layers
from easyanimate_jax.weights.module import abstract, named_weights, with_weights

CONFIG = replace(TINY, depth=3, mmdit_depth=2, heads=4, text_norm=True, in_channels=16)
CONFIG_12B = replace(TINY, depth=48, mmdit_depth=48)
CONFIG_7B = replace(TINY, depth=36, mmdit_depth=18)


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    return with_weights(
        abstract(MMDiT, CONFIG),
        lambda _, x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32),
    )


INPUTS = (
    np.random.default_rng(3).standard_normal((2, 16, 64), np.float32),
    np.array([[1, 4, 4]] * 2),
    np.array([16, 12]),
    np.array([3.0, 500.0], np.float32),
    (np.random.default_rng(4).standard_normal((2, 5, 8), np.float32),),
)
_predict = jax.jit(lambda model, *inputs: model(*inputs))


def predict(model):
    return _predict(model, *INPUTS)


def copy(model):
    return jax.tree.map(lambda x: x, model)


def random_lora(config, *, seed=0, dtype=np.float32, skip=()):
    """A pair of every layer, with ranks 2, 4 and 8 and three alphas by turns."""
    rng, pairs = np.random.default_rng(seed), {}
    shapes = {n: x.kernel.shape[-2:] for n, x in linears(abstract(MMDiT, config))}
    for ours, theirs in dense_layers(config).items():
        d_in, d_out = shapes[ours]
        for name in theirs:
            rank = (2, 4, 8)[len(pairs) % 3]
            down = 0.3 * rng.standard_normal((rank, d_in))
            up = 0.3 * rng.standard_normal((d_out, rank))
            alpha = {2: 1.0, 4: 2.0, 8: 1.0}[rank]
            pairs[name] = Pair(down.astype(dtype), up.astype(dtype), alpha)
    return LoRA({n: p for n, p in pairs.items() if n not in skip}, {"title": "stripes"})


def tensors_of(state):
    return {name: Tensor.of(np.asarray(value)) for name, value in state.items()}


def assert_same(found: LoRA, expected: LoRA):
    assert found.pairs.keys() == expected.pairs.keys()
    for name, pair in expected.pairs.items():
        for ours, theirs in zip(found.pairs[name], pair, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            assert np.asarray(ours).dtype == np.asarray(theirs).dtype


# The model


def test_new_adapters_change_nothing_and_trained_ones_equal_merged_weights(model):
    whole = copy(model)
    attach(whole, LoRAConfig(rank=4, alpha=8.0), key=jax.random.key(0))
    before = predict(model)
    np.testing.assert_allclose(predict(whole), before, atol=1e-6)

    rng = np.random.default_rng(1)
    graph, parts, frozen = nnx.split(whole, is_adapter, ...)
    parts = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), parts)
    whole, merged = nnx.merge(graph, parts, frozen), copy(model)
    for (_, layer), (_, plain) in zip(linears(whole), linears(merged), strict=True):
        if (a := layer.adapter) is not None:
            kernel = plain.kernel.get_value() + 2 * a.down.get_value() @ a.up.get_value()
            plain.kernel.set_value(kernel)
    after = predict(merged)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(predict(whole), after, atol=1e-5)


@pytest.mark.parametrize("kernels", [pytest.param("float32", marks=pytest.mark.slow), "int8"])
def test_adapters_beside_any_storage_are_split_over_a_mesh(model, kernels):
    whole = copy(model)
    store(whole, kernels)
    adapters.add(whole, [Weighted(random_lora(CONFIG), 0.5, "x")])
    expected = predict(whole)
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(whole, shardings(mesh, whole))
        np.testing.assert_allclose(predict(sharded), expected, atol=1e-5)
    up = sharded.blocks[0].video.mlp.up.adapter.up.get_value()
    assert up.addressable_shards[0].data.size == up.size // 4


def test_targets_are_groups_and_patterns_and_each_must_match(model):
    names = dict(linears(model))
    everything = chosen(names, LoRAConfig(rank=1))
    assert set(names) - set(everything) == {"patches"}
    attention = chosen(names, LoRAConfig(targets=("attention",)))
    assert len(attention) == 12 and all(".attention." in name for name in attention)
    some = LoRAConfig(targets=("attention", "mlp"), exclude=("blocks.*.text.*",))
    assert len(chosen(names, some)) == 12
    with pytest.raises(ValueError, match=r"'blocks\.\*\.video\.atention\.q' matches no dense lay"):
        chosen(names, LoRAConfig(targets=("attention", "blocks.*.video.atention.q")))
    with pytest.raises(ValueError, match="leave no layer"):
        chosen(names, LoRAConfig(targets=("mlp",), exclude=("all",)))


def test_dropout_leaves_out_whole_ranks_and_keeps_the_mean():
    adapter = nnx.State({"q": nnx.State({"up": nnx.Param(jnp.ones((2, 64, 3)))})})
    draws = [without_some(adapter, jax.random.key(i), 0.25)["q"]["up"] for i in range(20)]
    draws = np.stack([x.get_value() for x in draws])
    np.testing.assert_allclose(np.unique(draws), [0, 4 / 3], rtol=1e-6)
    assert (draws == draws[..., :1]).all() and not (draws[:, 0] == draws[:, 1]).all()
    np.testing.assert_allclose(draws.mean(), 1, atol=0.05)


# Files


def as_kohya(x, double="_"):
    state = {}
    for name, pair in x.pairs.items():
        key = f"lora_unet_{double}{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up}
        state[f"{key}.alpha"] = np.array(pair.alpha, np.float32)
    return state


def as_dotted(x, prefix, a=".lora_A.weight", b=".lora_B.weight", alpha=True):
    state = {}
    for name, pair in x.pairs.items():
        state |= {f"{prefix}{name}{a}": pair.down, f"{prefix}{name}{b}": pair.up}
        if alpha:
            state[f"{prefix}{name}.alpha"] = np.array([pair.alpha], np.float64)
    return state


FORMATS = {
    "EasyAnimate": as_kohya,
    "kohya": lambda x: as_kohya(x, ""),
    "kohya, integer alphas": lambda x: {
        name: np.array(value, np.int64) if name.endswith("alpha") else value
        for name, value in as_kohya(x, "").items()
    },
    "ComfyUI": lambda x: as_dotted(x, "diffusion_model."),
    "ComfyUI, whole model": lambda x: as_dotted(x, "model.diffusion_model."),
    "diffusers with alphas": lambda x: as_dotted(x, "transformer."),
    "no prefix, old names": lambda x: as_dotted(x, "", ".lora.down.weight", ".lora.up.weight"),
    "adapter name": lambda x: as_dotted(
        x, "base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"
    ),
    "1 x 1 convolutions": lambda x: {
        name: value[..., None, None] if value.ndim == 2 else value
        for name, value in as_kohya(x).items()
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_to_equal_arrays(tmp_path, name):
    expected = random_lora(CONFIG, dtype=ml_dtypes.bfloat16)
    save_file(FORMATS[name](expected), tmp_path / "a.safetensors", {"title": "stripes"})
    found = lora.read(tmp_path / "a.safetensors")
    assert_same(found, expected)
    assert found.metadata == {"title": "stripes"}


@pytest.mark.parametrize("form", ["original", "diffusers", "comfyui"])
def test_reading_writing_and_reading_again_changes_no_bit(tmp_path, form):
    expected = random_lora(CONFIG, dtype=ml_dtypes.bfloat16)
    lora.write(tmp_path / "a.safetensors", expected, form)
    once = lora.read(tmp_path / "a.safetensors")
    lora.write(tmp_path / "b.safetensors", once, form)
    assert_same(lora.read(tmp_path / "b.safetensors"), once)
    assert once.metadata["title"] == "stripes" and once.metadata["ss_network_dim"] == "Dynamic"
    if form == "diffusers":  # alpha is inside the second matrix; here alpha / rank are powers of 2
        for name, pair in expected.pairs.items():
            scaled = pair.up.astype(np.float32) * (pair.alpha / pair.rank)
            np.testing.assert_array_equal(once.pairs[name].up.astype(np.float32), scaled)
            assert once.pairs[name].alpha == pair.rank
    else:
        assert_same(once, expected)


def test_without_alpha_the_factor_is_one_or_that_of_pefts_settings(tmp_path):
    some = random_lora(CONFIG)
    state = as_dotted(some, "base_model.model.", alpha=False)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"stands in adapter_config\.json, and there is none"):
        lora.read(tmp_path / "adapter_model.safetensors")
    told = {"r": 4, "lora_alpha": 3, "alpha_pattern": {"proj_out": 5}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        pairs = lora.read(place).pairs
        pair = pairs["transformer_blocks.1.ff.net.2"]
        assert pair.alpha == pytest.approx(3 * pair.rank**0.5)
        assert pairs["proj_out"].alpha == pytest.approx(5 * pairs["proj_out"].rank ** 0.5)
    save_file(as_dotted(some, "diffusion_model.", alpha=False), tmp_path / "b.safetensors")
    pairs = lora.read(tmp_path / "b.safetensors").pairs
    assert all(pair.alpha == pair.rank for pair in pairs.values())


UP, DOWN = "lora_unet__proj_out.lora_up.weight", "lora_unet__proj_out.lora_down.weight"
ONE, MATRIX = np.ones(1, np.float32), np.ones((4, 4), np.float32)


def put(name, value=MATRIX):
    return lambda state: state.update({name: value})


REFUSED = {
    "no up": (lambda s: s.pop(UP), "proj_out: its up half is missing"),
    "no down": (lambda s: s.pop(DOWN), "proj_out: its down half is missing"),
    "alpha alone": (put("lora_unet__text_proj_t5.alpha", ONE), "text_proj_t5: its down and up"),
    "two alphas": (put("lora_unet__proj_out.alpha", np.ones(2, np.float32)), "alpha is one number"),
    "ranks differ": (put(UP, np.ones((64, 5), np.float32)), "of one rank"),
    "three axes": (put(UP, np.ones((64, 2, 1), np.float32)), "of one rank"),
    "integers": (put(UP, np.ones((64, 2), np.int8)), "has dtype int8"),
    "NaN": (put(DOWN, np.full((2, 64), np.nan, np.float32)), "lora_down.weight holds NaN"),
    "NaN alpha": (
        put("lora_unet__proj_out.alpha", np.array(np.nan, np.float32)),
        "alpha holds NaN",
    ),
    "text encoder": (put("lora_te_encoder_layer_0.lora_down.weight"), "changes a text encoder"),
    "text encoder of diffusers": (put("text_encoder.q.lora_A.weight"), "changes a text encoder"),
    "U-Net": (put("unet.down_blocks.0.lora_A.weight"), "changes a text encoder"),
    "another model": (put("lora_unet_double_blocks_0_img_attn.lora_up.weight"), "no dense layer"),
    "the patches": (put("lora_unet__proj.lora_up.weight"), "belongs to no dense layer"),
    "a norm": (put("lora_unet__norm_final.lora_up.weight"), "belongs to no dense layer"),
    "fused qkv": (put("transformer_blocks.0.attn1.to_qkv.lora_A.weight"), "no dense layer"),
    "DoRA of kohya": (put("lora_unet__proj_out.dora_scale", ONE), "it is DoRA"),
    "DoRA of PEFT": (put("x.proj_out.lora_magnitude_vector.weight", ONE), "it is DoRA"),
    "LoHa": (put("lora_unet__proj_out.hada_w1_a"), "it is LoHa"),
    "LoKr": (put("lora_unet__proj_out.lokr_w1"), "it is LoKr"),
    "LoKr in parts": (put("lora_unet__proj_out.lokr_w2_b"), "it is LoKr"),
    "whole weights": (put("diffusion_model.proj_out.diff"), "a change of whole weights"),
    "biases": (put("diffusion_model.proj_out.diff_b", ONE), "a change of whole weights"),
    "biases of PEFT": (put("x.proj_out.lora_B.bias", ONE), "lora_B.bias is not understood"),
    "unknown": (put("something", ONE), "something is not understood"),
    "same layer twice": (put("diffusion_model.proj_out.lora_B.weight"), "are the same part"),
    "two adapters": (
        put("diffusion_model.text_proj.lora_A.style.weight"),
        "holds several adapters",
    ),
    "all zero": (
        lambda s: s.update({n: 0 * x for n, x in s.items() if "up" in n}),
        "it changes nothing",
    ),
    "no tensors": (lambda s: s.clear(), "it holds no tensors"),
    "no LoRA": (lambda s: (s.clear(), s.update(x=ONE)), "it is no LoRA: its first tensor is x"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path, case):
    spoil, message = REFUSED[case]
    state = as_kohya(random_lora(CONFIG))
    spoil(state)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        lora.read(tmp_path / "a.safetensors")
    assert len(str(error.value)) < 400


def test_a_lora_of_another_model_is_refused(tmp_path):
    def misfit(some, config):
        with pytest.raises(ValueError) as error:
            adapters.check([Weighted(some, 1.0, "x.safetensors")], config)
        return str(error.value)

    small = random_lora(CONFIG)
    assert "from 64 to 64 values, and the layer of this model goes from 96" in misfit(
        small, replace(CONFIG, heads=6)
    )
    assert "changes transformer_blocks.2.attn1.to_q, which this model does not have" in misfit(
        small, replace(CONFIG, depth=2)
    )
    assert "changes text_proj.1, which" in misfit(small, replace(CONFIG, text_norm=False))
    assert "for a model of 7B, and this one is 12B" in misfit(random_lora(CONFIG_7B), CONFIG_12B)


def test_several_loras_with_weights_are_their_sum(model):
    one, two = random_lora(CONFIG), random_lora(CONFIG, seed=1, skip=("proj_out", "text_proj.1"))
    wanted = [Weighted(one, 0.5, "one"), Weighted(two, -2.0, "two")]
    beside = copy(model)
    adapters.add(beside, wanted)
    weights = {name: Tensor.of(x) for name, x in named_weights(model).items()}
    merged = adapters.merged(weights, CONFIG, wanted)
    again = with_weights(model, lambda name, _: jnp.asarray(merged[name].read()))
    expected = predict(again)
    assert np.abs(expected - predict(model)).max() > 0.1
    np.testing.assert_allclose(predict(beside), expected, atol=2e-5)
    # The reference's rule, W + m s up @ down, for one layer.
    name = "transformer_blocks.2.attn1.to_q"
    pairs = [(one.lora.pairs[name], one.weight) for one in wanted]
    change = sum(weight * p.alpha / p.rank * (p.up @ p.down) for p, weight in pairs)
    kernel = model.blocks[1].video.attention.q.kernel.get_value()[0]
    np.testing.assert_allclose(
        again.blocks[1].video.attention.q.kernel.get_value()[0], kernel + change.T, atol=1e-6
    )


def test_weight_zero_is_the_model_itself(model):
    beside = copy(model)
    adapters.add(beside, [Weighted(random_lora(CONFIG), 0.0, "x")])
    np.testing.assert_array_equal(predict(beside), predict(model))


@pytest.mark.parametrize(
    "text, expected",
    [("a.safetensors", ("a.safetensors", 1.0)), ("a:0.5", ("a", 0.5)), ("a:-1", ("a", -1.0))],
)
def test_a_file_and_its_weight_are_read_from_one_word(text, expected):
    assert named_weight(text) == expected


def test_a_name_that_ends_like_a_weight_is_a_name_if_it_exists(tmp_path):
    (tmp_path / "a:2").touch()
    assert named_weight(f"{tmp_path}/a:2") == (f"{tmp_path}/a:2", 1.0)


# Other tools


def test_pefts_adapters_in_diffusers_transformer_give_our_output(tmp_path):
    """PEFT injects the same adapters, with ranks and alphas of their own, from each format."""
    theirs = reference(add_norm_text_encoder=True, text_embed_dim_t5=None)
    ours = converted(numpy_state(theirs))
    skip = ("transformer_blocks.0.attn1.to_k", "proj_out")
    some = random_lora(ours.config, skip=skip)
    inputs = normal(1, 2, 16, 2, 6, 10), np.array([0.0, 500.0], np.float32), (normal(2, 2, 5, 24),)
    plain = run(ours, *inputs)
    adapters.add(ours, [Weighted(some, 1.0, "x")])
    lora.write(tmp_path / "a.safetensors", some, "diffusers")
    state = load_file(tmp_path / "a.safetensors")
    told = json.loads(lora.read(tmp_path / "a.safetensors").metadata["lora_adapter_metadata"])
    told = {name.removeprefix("transformer."): value for name, value in told.items()}
    del told["peft_type"]
    for key in ("rank_pattern", "alpha_pattern"):
        told[key] = {f"^{name}": value for name, value in told[key].items()}
    inject_adapter_in_model(LoraConfig(**told), theirs)
    state = {n.removeprefix("transformer."): torch.from_numpy(x) for n, x in state.items()}
    assert not set_peft_model_state_dict(theirs, state).unexpected_keys
    out = predict_torch(theirs, *inputs)
    assert np.abs(out - plain).max() > 0.1
    np.testing.assert_allclose(run(ours, *inputs), out, atol=2e-5)


def test_a_folder_that_peft_saved_gives_its_output(tmp_path):
    theirs = reference(add_norm_text_encoder=True, text_embed_dim_t5=None)
    ours = converted(numpy_state(theirs))
    patterns = {"rank_pattern": {"ff.net.2": 8}, "alpha_pattern": {"proj_out": 7}}
    settings = LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules="all-linear", **patterns
    )
    theirs = get_peft_model(theirs, settings)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight += 0.1 * torch.randn_like(weight) * ("lora_" in name)
    theirs.save_pretrained(tmp_path)
    inputs = normal(1, 2, 16, 2, 6, 10), np.array([0.0, 500.0], np.float32), (normal(2, 2, 5, 24),)
    plain = run(ours, *inputs)
    adapters.add(ours, adapters.open_loras([(tmp_path, 1.0)]))
    out = predict_torch(theirs, *inputs)
    assert np.abs(out - plain).max() > 0.1
    np.testing.assert_allclose(run(ours, *inputs), out, atol=2e-5)


def predict_torch(model, latents, time, texts):
    arrays = (torch.from_numpy(np.array(x)) for x in (latents, time, *texts))
    latents, time, text = arrays
    with torch.no_grad():
        return model(latents, time, encoder_hidden_states=text)[0].numpy()


def test_convert_writes_each_format_and_merges(tmp_path, model):
    some = random_lora(CONFIG)
    save_file(as_kohya(some), tmp_path / "a.safetensors", {"title": "stripes"})
    for form in ("comfyui", "diffusers", "original"):
        target = str(tmp_path / f"{form}.safetensors")
        assert convert([str(tmp_path / "a.safetensors"), target, "--to", form]) == 0
    assert_same(lora.read(tmp_path / "original.safetensors"), some)
    assert_same(lora.read(tmp_path / "comfyui.safetensors"), some)
    assert "transformer.transformer_blocks.0.attn1.add_q_proj.lora_A.weight" in load_file(
        tmp_path / "diffusers.safetensors"
    )
    half = [str(tmp_path / "a.safetensors"), str(tmp_path / "half.safetensors"), "--to", "comfyui"]
    assert convert([*half, "--dtype", "bfloat16"]) == 0
    halved = load_file(tmp_path / "half.safetensors")
    assert halved["diffusion_model.proj_out.lora_A.weight"].dtype == ml_dtypes.bfloat16
    assert halved["diffusion_model.proj_out.alpha"].dtype == ml_dtypes.bfloat16
