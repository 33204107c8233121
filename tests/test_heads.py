"""The kernels of TPUs between products: they equal the formulas that other platforms compute."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from easyanimate_jax.facts import MESH_AXES
from easyanimate_jax.models import heads
from easyanimate_jax.models.attention import fused_attention, is_fused, joint_attention
from easyanimate_jax.models.heads import HeadNorm
from easyanimate_jax.models.layers import layer_norm
from easyanimate_jax.models.modulated_norm import in_one_pass, modulated_norm
from easyanimate_jax.models.rope import rotary_angles, rotate
from easyanimate_jax.pods.compile import topology_devices

EPS = 1e-6


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), dtype)


def inputs(N, L, num_heads, K, dtype="float32"):
    """Return projections of video and text, and the norms of queries and keys."""
    D = num_heads * K
    video = tuple(2 * normal(2, N, D, seed=n, dtype=dtype) for n in range(3))
    text = tuple(normal(2, L, D, seed=n, dtype=dtype) for n in range(3, 6))
    norms = tuple(
        tuple(HeadNorm(1 + normal(K, seed=n) / 5, normal(K, seed=n + 1) / 5) for n in pair)
        for pair in ((6, 8), (10, 12))
    )
    return video, text, norms


def by_formula(video, text, norms, angles, lengths):
    """Return the attention of (video, text) with `joint_attention` and a LayerNorm of heads."""
    K = norms[0][0].scale.size
    video, text = (
        [rearrange(x, "B S (h K) -> B S h K", K=K) for x in stream] for stream in (video, text)
    )

    def normalised(x, norm):
        x = x - x.mean(axis=-1, keepdims=True)
        variance = (x * x).mean(axis=-1, keepdims=True)
        return (
            x / jnp.sqrt(variance + EPS) * norm.scale[None, None, None]
            + norm.bias[None, None, None]
        )

    q, k = (
        (normalised(text[n], norms[n][1]), rotate(normalised(video[n], norms[n][0]), angles))
        for n in range(2)
    )
    out = joint_attention(q, k, (text[2], video[2]), lengths, num_text=text[0].shape[1])
    return tuple(rearrange(x, "B S h K -> B S (h K)") for x in out[::-1])


@pytest.mark.parametrize(
    ("N", "L", "num_heads", "K"),
    [
        (256, 77, 6, 64),
        (384, 130, 2, 128),  # text in two blocks
        (128, 128, 3, 16),  # text that fills its block
    ],
)
def test_fused_attention_is_the_formula_with_its_gradients(N, L, num_heads, K):
    video, text, norms = inputs(N, L, num_heads, K)
    rows = N // 16
    angles = rotary_angles(jnp.array([[1, rows, 16], [2, rows // 4, 16]]), N, K)
    lengths = jnp.array([N, N // 2])
    real = (jnp.arange(N)[None] < lengths[:, None])[..., None]
    weights = normal(2, N, num_heads * K, seed=20) * real, normal(2, L, num_heads * K, seed=21)
    found = []
    for attend in (by_formula, partial(fused_attention, num_text=L, eps=EPS, interpret=True)):

        def loss(video, text, norms, attend=attend):
            out = attend(video, text, norms, angles, lengths)
            total = sum((x * w).sum() for x, w in zip(out, weights, strict=True))
            return total, (out[0] * real, out[1])

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
            video, text, norms
        )
        found.append((out, gradients))
    for want, got in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(("context", "tensor"), [(1, 2), (2, 1), (2, 2)])
def test_fused_attention_is_the_same_on_more_devices(context, tensor):
    """Devices hold parts of the tokens or of the heads; 2 tokens fill the 30 of the text."""
    video, text, norms = inputs(128, 30, 4, 16)
    angles = rotary_angles(jnp.array([[1, 8, 16], [1, 8, 8]]), 128, 16)
    arguments = video, text, norms, angles, jnp.array([128, 64])
    attend = partial(fused_attention, num_text=30, eps=EPS, interpret=True)
    want = jax.jit(attend)(*arguments)

    auto = (AxisType.Auto,) * len(MESH_AXES)
    text = tuple(jnp.pad(x, ((0, 0), (0, 2), (0, 0))) for x in text)
    axis, tokens = (None, P()) if context == 1 else ("context", P(None, "context"))
    with jax.set_mesh(jax.make_mesh((1, 1, context, tensor), MESH_AXES, axis_types=auto)):
        on_devices = jax.shard_map(
            partial(attend, axis=axis),
            in_specs=(tokens, tokens, P(), tokens, P()),
            out_specs=(tokens, tokens),
            axis_names={"data", "fsdp", "context"},
            check_vma=False,
        )
        text = text if axis else tuple(x[:, :30] for x in text)
        got = jax.jit(on_devices)(video, text, *arguments[2:])
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    np.testing.assert_allclose(got[1][:, :30], want[1], atol=1e-6)


def test_layouts_have_whole_blocks_of_video():
    assert heads.layout(3584, 333, 48, EPS, 512)[:4] == (3584, 333, 4096, 512)
    assert heads.layout(3328, 333, 48, EPS, 512)[:4] == (3328, 333, 4096, 256)
    assert heads.layout(100, 20, 4, EPS, 128) is None
    assert not is_fused(3584, 48, None)  # on a CPU


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(333, "float32"), (40, "float32"), (300, "bfloat16")]
)
def test_the_norm_in_one_pass_is_the_formula_with_its_gradients(tokens, dtype):
    width = 128
    x = 3 * normal(2, tokens, width, dtype=dtype) + 1
    shift, scale = (normal(2, 1, width, seed=n, dtype=dtype) / 4 for n in (1, 2))
    gradients = tuple(normal(*x.shape, seed=n, dtype=dtype) for n in (3, 6))  # and around the norm

    def formula(x, weight, bias, shift, scale):
        norm = layer_norm(width, eps=1e-5, rngs=nnx.Rngs(0))
        norm.scale, norm.bias = norm.scale.replace(weight), norm.bias.replace(bias)
        return modulated_norm(norm, x, shift, scale)

    def kernel(x, weight, bias, shift, scale):
        more = 1 + scale.astype(jnp.float32)
        weight, bias = weight[None, None], bias[None, None]
        return in_one_pass(1e-5, x, weight * more, bias * more + shift, True)

    arguments = x, 1 + normal(width, seed=4) / 5, normal(width, seed=5), shift, scale
    atol = 2e-6 if dtype == "float32" else 1e-2
    (want, pull), (got, pull_too) = (jax.vjp(f, *arguments) for f in (formula, kernel))
    results = (*want, *pull(gradients)), (*got, *pull_too(gradients))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(value, np.float32) for value in (a, b))
        np.testing.assert_allclose(b, a, atol=atol * np.abs(a).max())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernels_compile_for_every_chip_with_its_default_vector_memory(topology, dtype):
    """At the width of the 12B; a program that samples does not raise the limit."""
    device = jax.sharding.SingleDeviceSharding(topology_devices(topology)[0])
    N, L, num_heads, K = 3584, 333, 48, 64
    place = heads.layout(N, L, num_heads, EPS, 512)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def step(x, factor, offset, text, norm, angles, d_joined):
        (y, _), pull = jax.vjp(partial(in_one_pass, EPS), x, factor, offset)
        d_norm = pull((y, y))

        def joined(x, text, norm):
            tokens = x.swapaxes(1, 2), text.swapaxes(1, 2)
            out = heads.join_normalised(place, *tokens, (norm, norm), angles, K**-0.5)
            return out, heads.join(place, *tokens)

        out, pull = jax.vjp(joined, x, text, norm)
        return d_norm, heads.part(place, out[0]), pull((d_joined, d_joined))

    D, of_row = num_heads * K, array(2, 1, num_heads * K, dtype="float32")
    norm = HeadNorm(array(K, dtype="float32"), array(K, dtype="float32"))
    angles = (array(2, K, N, dtype="float32"),) * 2
    joined = array(2, num_heads, place.total, K)
    arguments = array(2, N, D), of_row, of_row, array(2, L, D), norm, angles, joined
    assert "heads_bwd" in jax.jit(step).lower(*arguments).compile().as_text()
