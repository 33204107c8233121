"""The transformer: golden values, parity with diffusers, padding, packing, weight surgery."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from arrays import count_parameters, flat_weights
from diffusers import EasyAnimateTransformer3DModel
from einops import rearrange
from flax import nnx

from easyanimate_jax.facts import ACTIVATIONS
from easyanimate_jax.models.mmdit import (
    MMDiT,
    MMDiTConfig,
    patchify,
    unpatchify,
)
from easyanimate_jax.training.step import widen_state
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.mmdit_table import from_torch, to_torch
from easyanimate_jax.weights.module import build

V51 = {"text_widths": (3584,), "text_norm": True, "round_time": True}
V5 = {"text_widths": (1024, 2048), "text_norm": False, "round_time": True}
TINY = MMDiTConfig(
    depth=2,
    mmdit_depth=2,
    heads=2,
    head_width=32,
    time_width=32,
    text_widths=(24, 40),
    text_norm=False,
    round_time=False,
    dtype="float32",
)


def random_model(config):
    """No weight at its initial value: zero gates would hide the blocks."""
    rng = np.random.RandomState(0)
    model = jax.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), model)


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def golden_weights(reference):
    """Appendix A: the filling rule, over the sorted names of the original layout."""
    names = {}
    for name, value in reference.state_dict().items():
        ours = from_diffusers_name(name)
        names[ours] = tuple(value.shape)
    weights = {}
    for j, name in enumerate(sorted(names)):
        r = np.random.RandomState(1000 + j).standard_normal(names[name])
        if r.ndim > 1:
            r = r / np.sqrt(np.prod(r.shape[1:]))
        else:
            r = 1 + 0.1 * r if name.endswith(".weight") else 0.1 * r
        weights[name] = r.astype(np.float32)
    return weights


def from_diffusers_name(name):
    for new, old in (
        ("add_q_proj", "to_q"),
        ("add_k_proj", "to_k"),
        ("add_v_proj", "to_v"),
        ("to_add_out", "to_out.0"),
        ("norm_added_q", "norm_q"),
        ("norm_added_k", "norm_k"),
    ):
        if f"attn1.{new}." in name:
            return name.replace(f"attn1.{new}.", f"attn2.{old}.")
    return name


def reference(**kwargs):
    torch.manual_seed(0)
    options = {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "num_layers": 2,
        "mmdit_layers": 2,
        "time_embed_dim": 32,
        "text_embed_dim": 24,
    }
    model = EasyAnimateTransformer3DModel(**options | kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def converted(state, dtype="float32"):
    problems = []
    config, weights = from_torch(tensors(state), problems)
    assert not problems
    return build(MMDiT, dataclasses.replace(config, dtype=dtype), weights)


def tensors(arrays):
    return {name: Tensor.of(array) for name, array in arrays.items()}


def numpy_state(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def denoise(model, latents, time, texts, condition=None):
    """The model on latent videos of one size; `condition` joins as further channels."""
    if condition is not None:
        latents = jnp.concatenate([latents, condition], axis=-1)
    B, T, h, w, _ = latents.shape
    grid, tokens = (T, h // 2, w // 2), patchify(latents)
    lengths = jnp.full((B,), tokens.shape[1])
    tokens = model(tokens, jnp.tile(jnp.array([grid]), (B, 1)), lengths, time, texts)
    return unpatchify(tokens, grid)


def run(model, latents, time, texts, condition=None):
    """Ours on the reference's (B, C, T, h, w)."""
    last = lambda x: rearrange(x, "B C T h w -> B T h w C")  # noqa: E731
    out = jax.jit(denoise)(
        model, last(latents), time, texts, None if condition is None else last(condition)
    )
    return rearrange(np.asarray(out), "B T h w C -> B C T h w")


ENTRIES = [0, 1, 2, 10, 100, 777, 1919, 2000, 3000]


def test_golden_a1_of_the_original():
    shapes = reference(
        mmdit_layers=1, in_channels=33, text_embed_dim=24, add_norm_text_encoder=True
    )
    weights = golden_weights(shapes)
    assert len(weights) == 81
    out = run(
        converted(weights),
        normal(1, 2, 16, 2, 6, 10),
        np.array([999, 250], np.float32),
        (normal(2, 2, 5, 24),),
        normal(3, 2, 17, 2, 6, 10),
    )
    assert out.mean() == pytest.approx(-0.01902497576, abs=1e-6)
    assert np.abs(out).mean() == pytest.approx(0.826871962, abs=1e-6)
    expected = [1.390985, 0.518784, 1.205595, 0.352366, 1.991143, 0.157118, 1.052260, 1.361593]
    expected += [-0.061892, 0.441000]
    np.testing.assert_allclose(out.ravel()[[*ENTRIES, 3839]], expected, atol=1e-5)


def test_golden_a1b_shared_blocks_follow_the_original_where_diffusers_does_not():
    theirs = reference(num_layers=5, mmdit_layers=2, text_embed_dim_t5=40)
    weights = golden_weights(theirs)
    assert len(weights) == 170
    latents, time = normal(1, 2, 16, 3, 8, 6), np.array([999, 250], np.float32)
    texts = (normal(2, 2, 5, 24), normal(3, 2, 7, 40))
    model = converted(weights)
    out = run(model, latents, time, texts)
    assert out.mean() == pytest.approx(0.009128338, abs=1e-6)
    assert np.abs(out).mean() == pytest.approx(0.82009643, abs=1e-6)
    expected = [0.359187, -0.228672, 1.258974, -0.109197, 0.702678, 0.676766, 0.292910]
    expected += [0.059346, 0.874170, 1.634497]
    np.testing.assert_allclose(out.ravel()[[*ENTRIES, 4607]], expected, atol=1e-5)

    # The same weights in diffusers: text leaves its shared blocks unprojected.
    state = to_torch(tensors(flat_weights(model)), model.config, "diffusers")
    theirs.load_state_dict({name: torch.tensor(np.array(x)) for name, x in state.items()})
    assert np.abs(run_reference(theirs, latents, time, texts) - out).max() > 0.01


def run_reference(model, latents, time, texts, **condition):
    with torch.no_grad():
        return model(
            torch.from_numpy(latents),
            torch.from_numpy(time),
            encoder_hidden_states=torch.from_numpy(texts[0]),
            encoder_hidden_states_t5=torch.from_numpy(texts[1]) if len(texts) > 1 else None,
            **{name: torch.from_numpy(x) for name, x in condition.items()},
        ).sample.numpy()


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        pytest.param({"text_embed_dim_t5": 40}, {}, id="v5"),
        pytest.param({"add_norm_text_encoder": True}, {}, id="v5.1"),
        pytest.param({"in_channels": 33}, {"inpaint_latents": 17}, id="inpaint"),
        pytest.param({"in_channels": 48}, {"control_latents": 32}, id="control"),
        pytest.param({"in_channels": 32}, {"control_latents": 16}, id="v5-control"),
        pytest.param({"in_channels": 38}, {"control_latents": 22}, id="camera"),
    ],
)
def test_equals_diffusers(options, extra):
    theirs = reference(**options)
    latents, time = normal(1, 2, 16, 2, 6, 10), np.array([999, 250], np.float32)
    texts = (normal(2, 2, 5, 24), normal(3, 2, 7, 40))[: 1 + ("text_embed_dim_t5" in options)]
    condition = {name: normal(4, 2, C, 2, 6, 10) for name, C in extra.items()}
    want = run_reference(theirs, latents, time, texts, **condition)
    got = run(converted(numpy_state(theirs)), latents, time, texts, *condition.values())
    assert np.abs(got - want).max() <= 2e-5 * max(1, np.abs(want).mean())


def test_bfloat16_equals_diffusers_to_its_rounding():
    theirs = reference(add_norm_text_encoder=True)
    model = converted(numpy_state(theirs), "bfloat16")
    latents, time = normal(1, 2, 16, 2, 6, 10), np.array([999, 257], np.float32)
    text = normal(2, 2, 5, 24)
    exact = run_reference(theirs, latents, np.array([1000, 256], np.float32), (text,))
    got = run(model, latents, time, (text,)).astype(np.float32)
    assert np.abs(got - exact).mean() < 0.03 * np.abs(exact).mean()


@pytest.mark.parametrize(
    ("parameters", "size"),
    [
        (11_799_056_960, {"depth": 48, "mmdit_depth": 48, **V51}),
        (11_799_265_856, {"depth": 48, "mmdit_depth": 48, "in_channels": 33, **V51}),
        (11_799_450_176, {"depth": 48, "mmdit_depth": 48, "in_channels": 48, **V51}),
        (6_814_670_912, {"depth": 36, "mmdit_depth": 18, "in_channels": 33, **V51}),
        (11_797_483_584, {"depth": 48, "mmdit_depth": 48, **V5}),
        (11_797_692_480, {"depth": 48, "mmdit_depth": 48, "in_channels": 33, **V5}),
        (6_813_097_536, {"depth": 36, "mmdit_depth": 18, "in_channels": 33, **V5}),
    ],
)
def test_released_sizes_have_their_parameters(parameters, size):
    assert count_parameters(MMDiTConfig(heads=48, **size)) == parameters


def test_wide_heads_have_the_same_parameters():
    size = {"depth": 48, "mmdit_depth": 48, **V5}
    narrow = count_parameters(MMDiTConfig(heads=48, head_width=64, **size))
    wide = count_parameters(MMDiTConfig(heads=24, head_width=128, **size))
    assert wide == pytest.approx(narrow, rel=1e-5)


def test_a_token_holds_a_patch_with_its_channel_slowest():
    latents = jnp.asarray(normal(0, 2, 3, 4, 6, 16))
    tokens = patchify(latents)
    assert tokens.shape == (2, 3 * 2 * 3, 64)
    np.testing.assert_array_equal(
        tokens[1, 1 * 6 + 1 * 3 + 2], latents[1, 1, 2:4, 4:6].transpose(2, 0, 1).ravel()
    )
    np.testing.assert_array_equal(unpatchify(tokens, (3, 2, 3)), latents)


call = jax.jit(lambda model, *args: model(*args))


def inputs(grids, padded):
    """Tokens of several sizes in one batch, zeros at the end."""
    grid = np.array(grids, np.int32)
    lengths = grid.prod(axis=1).astype(np.int32)
    tokens = normal(1, len(grids), padded, 64)
    tokens *= (np.arange(padded) < lengths[:, None])[..., None]
    texts = (normal(2, len(grids), 5, 24), normal(3, len(grids), 7, 40))
    return tokens, grid, lengths, np.linspace(0, 999, len(grids), dtype=np.float32), texts


def test_a_mixed_padded_batch_equals_its_samples_alone():
    model = random_model(TINY)
    tokens, grid, lengths, time, texts = inputs([(1, 5, 4), (2, 2, 4)], padded=24)
    together = call(model, tokens, grid, lengths, time, texts)
    for i, n in enumerate(lengths):
        one = slice(i, i + 1)
        alone = call(
            model, tokens[one, :n], grid[one], lengths[one], time[one], tuple(t[one] for t in texts)
        )
        np.testing.assert_allclose(together[one, :n], alone, atol=2e-5)


def test_what_stands_in_the_padding_changes_nothing():
    model = random_model(TINY)
    tokens, grid, lengths, time, texts = inputs([(1, 5, 4), (2, 2, 4)], padded=24)
    clean = call(model, tokens, grid, lengths, time, texts)
    tokens[1, 16:] = 7.0
    dirty = call(model, tokens, grid, lengths, time, texts)
    np.testing.assert_array_equal(clean[1, :16], dirty[1, :16])
    assert np.isfinite(dirty).all()


def test_rounding_the_time_is_a_switch():
    tokens, grid, lengths, _, texts = inputs([(1, 2, 2)] * 2, padded=4)
    tokens, texts = tokens[:1].repeat(2, 0), tuple(t[:1].repeat(2, 0) for t in texts)
    time = np.array([999.0, 1000.0], np.float32)  # one number in bfloat16
    for rounds in (True, False):
        config = dataclasses.replace(TINY, round_time=rounds, dtype="bfloat16")
        a, b = call(random_model(config), tokens, grid, lengths, time, texts)
        assert np.array_equal(a, b) == rounds


def test_gradients_are_finite_with_an_empty_row_and_the_same_whatever_is_saved():
    batch = inputs([(1, 5, 4), (0, 0, 0)], padded=24)

    def gradient(**kept):
        model = random_model(dataclasses.replace(TINY, depth=1, mmdit_depth=1, **kept))
        return jax.jit(jax.grad(lambda m, *args: jnp.mean(m(*args)[:1] ** 2)))(model, *batch)

    none = jax.tree.leaves(gradient(save=()))
    for kept in ({"save": ("attention",)}, {"save": ("qkv",), "offload": ("attention", "mlp")}):
        for a, b in zip(jax.tree.leaves(gradient(**kept)), none, strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("left_out", "again"), [("qkv", 3), ("mlp", 1)])
def test_a_kept_activation_saves_its_products_in_the_backward_pass(left_out, again):
    """ "qkv" must be what the norms of heads read: of what they write, the products come again."""
    batch = inputs([(1, 5, 4)], padded=24)

    def products(save):
        model = random_model(dataclasses.replace(TINY, depth=1, mmdit_depth=1, save=save))
        step = jax.jit(jax.grad(lambda m, *args: jnp.mean(m(*args) ** 2)))
        return step.lower(model, *batch).as_text().count("stablehlo.dot_general")

    fewer = tuple(name for name in ACTIVATIONS if name != left_out)
    assert products(fewer) - products(tuple(ACTIVATIONS)) == 2 * again  # text and video


def test_a_widened_model_ignores_its_new_channels_until_trained():
    model = random_model(TINY)
    wide = widen_state(model, 33)
    latents, texts = normal(1, 1, 2, 4, 6, 16), (normal(2, 1, 5, 24), normal(3, 1, 7, 40))
    time = np.array([500.0], np.float32)
    run = jax.jit(denoise)
    plain = run(model, latents, time, texts)
    zero = run(wide, latents, time, texts, np.zeros((1, 2, 4, 6, 17), np.float32))
    other = run(wide, latents, time, texts, normal(4, 1, 2, 4, 6, 17))
    np.testing.assert_allclose(zero, plain, atol=1e-6)
    np.testing.assert_allclose(other, plain, atol=1e-6)
    assert model.config.in_channels == 16
    narrow = widen_state(wide, 16)
    np.testing.assert_array_equal(run(narrow, latents, time, texts), plain)


def test_widening_reaches_every_model_in_a_training_state():
    def state(config):
        model = MMDiT(config, rngs=nnx.Rngs(0))
        return {"ema": model, "opt": optax.adam(1e-3).init(model)}

    widened = jax.eval_shape(lambda: widen_state(state(TINY), 33))
    fresh = jax.eval_shape(lambda: state(dataclasses.replace(TINY, in_channels=33)))
    assert jax.tree.structure(widened) == jax.tree.structure(fresh)
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(widened) == shapes(fresh)


def test_refusals_name_the_repair():
    with pytest.raises(ValueError, match="head_width=40"):
        dataclasses.replace(TINY, head_width=40)
    with pytest.raises(ValueError, match="takes names of"):
        dataclasses.replace(TINY, save=("atention",))
    with pytest.raises(ValueError, match="use each name in only one of them"):
        dataclasses.replace(TINY, save=("mlp",), offload=("mlp",))
    with pytest.raises(ValueError, match="mmdit_depth=4 of depth=2"):
        dataclasses.replace(TINY, mmdit_depth=4)
