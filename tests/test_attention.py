"""Attention: every kernel equals the softmax on the real keys, blind to the rest."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easyanimate_jax.models.attention import (
    LONG,
    attention,
    block_sizes,
    cudnn,
    kernel,
    plain,
    sliced,
    splash,
)
from easyanimate_jax.models.layers import scan_blocks


def qkv(num_queries=7, num_keys=11, heads=3, K=16, dtype="float32"):
    rng = np.random.RandomState(0)
    shapes = ((2, n, heads, K) for n in (num_queries, num_keys, num_keys))
    return tuple(jnp.asarray(rng.randn(*shape), dtype) for shape in shapes)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_equals_torch_on_the_real_keys(dtype, atol):
    q, k, v = qkv(dtype=dtype)
    out = jax.jit(attention)(q, k, v, jnp.array([11, 6]))
    assert out.dtype == dtype
    for i, length in enumerate((11, 6)):
        args = (
            torch.tensor(np.asarray(x[i], np.float32)).transpose(0, 1)
            for x in (q, k[:, :length], v[:, :length])
        )
        want = torch.nn.functional.scaled_dot_product_attention(*args).transpose(0, 1).numpy()
        np.testing.assert_allclose(np.asarray(out[i], np.float32), want, atol=atol)


def test_hidden_keys_give_and_get_nothing():
    q, k, v = qkv()
    lengths = jnp.array([4, 9])
    loss = lambda q, k, v: jnp.sum(attention(q, k, v, lengths) ** 2)  # noqa: E731
    _, k_grad, v_grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for i, length in enumerate((4, 9)):
        assert np.all(k_grad[i, length:] == 0) and np.all(v_grad[i, length:] == 0)
        assert np.all(k_grad[i, :length] != 0) and np.all(v_grad[i, :length] != 0)
    changed = attention(q, k.at[0, 4:].set(50.0), v.at[0, 4:].set(-3.0), lengths)
    np.testing.assert_array_equal(changed, attention(q, k, v, lengths))


def test_large_scores_do_not_overflow():
    q, k, v = qkv()
    assert np.isfinite(attention(100 * q, 100 * k, v, jnp.array([11, 1]))).all()


def mix(q, k, v, lengths, cotangent):
    """Softmax attention in float64 and its gradients for the sum of result x cotangent."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    scale = q.shape[-1] ** -0.5
    scores = scale * np.einsum("BqhK,BshK->Bhqs", q, k)
    hidden = np.arange(k.shape[1])[None] >= np.asarray(lengths)[:, None]
    scores = np.where(hidden[:, None, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("Bhqs,BshK->BqhK", weights, v)
    by_weight = np.einsum("BqhK,BshK->Bhqs", cotangent, v)
    by_score = weights * (by_weight - np.sum(weights * by_weight, axis=-1, keepdims=True))
    return out, (
        scale * np.einsum("Bhqs,BshK->BqhK", by_score, k),
        scale * np.einsum("Bhqs,BqhK->BshK", by_score, q),
        np.einsum("Bhqs,BqhK->BshK", weights, cotangent),
    )


@pytest.mark.parametrize(
    ("attend", "num_queries", "num_keys", "lengths"),
    [
        (plain, 7, 11, (11, 6)),
        (sliced, 600, 700, (700, 333)),  # five slices, the last not full
        (partial(splash, interpret=True), 200, 300, (300, 77)),  # filled up to blocks of 128
    ],
    ids=["plain", "sliced", "splash"],
)
def test_every_kernel_is_the_softmax_in_float64(attend, num_queries, num_keys, lengths):
    q, k, v = qkv(num_queries, num_keys, heads=2)
    cotangent = np.random.RandomState(1).randn(*q.shape).astype(np.float32)
    want, want_grads = mix(q, k, v, lengths, cotangent)
    out, pull = jax.vjp(lambda *x: attend(*x, jnp.array(lengths)), q, k, v)
    np.testing.assert_allclose(out, want, atol=5e-6)
    for got, want_grad in zip(pull(jnp.asarray(cotangent)), want_grads, strict=True):
        np.testing.assert_allclose(got, want_grad, atol=2e-5)


def test_slices_in_bfloat16_keep_their_sums_in_float32():
    q, k, v = qkv(2400, 700, heads=2, dtype="bfloat16")
    cotangent = jnp.asarray(np.random.RandomState(1).randn(*q.shape), q.dtype)
    want, want_grads = mix(q, k, v, (700, 333), cotangent)
    out, pull = jax.vjp(lambda *x: sliced(*x, jnp.array([700, 333])), q, k, v)
    for got, true in zip((out, *pull(cotangent)), (want, *want_grads), strict=True):
        assert got.dtype == q.dtype
        error = np.linalg.norm(np.asarray(got, np.float64) - true) / np.linalg.norm(true)
        assert error < 3e-3  # rounding alone gives 2.6e-3; sums in bfloat16 5e-3


def test_kept_attention_is_not_computed_again():
    q, k, v = qkv(600, 700, heads=2)

    def exponentials(save):
        @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*save))
        def loss(q):
            return jnp.sum(sliced(2 * q, k, v, jnp.array([700, 333])) ** 2)

        return str(jax.make_jaxpr(jax.grad(loss))(q)).count(" exp ")

    assert (exponentials(["attention"]), exponentials([])) == (2, 3)


@pytest.mark.parametrize(("save", "runs"), [((), 2), (("attention",), 1)])
def test_cudnn_is_kept_too_and_takes_any_length(monkeypatch, save, runs):
    """Traced as for a GPU, whose checks see a version of cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    q, k, v = qkv(33, 33, heads=2, dtype="bfloat16")

    def loss(q):
        mix = lambda _, q: cudnn(q, k, v, jnp.array([33, 20]))  # noqa: E731
        return scan_blocks(mix, q, jnp.zeros(3), save=save).astype(jnp.float32).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(q))
    assert program.count("= dot_product_attention_fwd_wrapper") == runs
    assert program.count("= dot_product_attention_bwd_wrapper") == 1


def test_memory_of_a_long_sequence_grows_linearly():
    """Forward and backward of one row of 12 heads of 64: 100 kB a token beside its results."""

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 12, 64), jnp.float32)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        loss = lambda q, k, v, n: jnp.sum(attention(q, k, v, n))  # noqa: E731
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, lengths).compile()
        return program.memory_analysis().temp_size_in_bytes

    sizes = {length: temporaries(length) for length in (3456, 6912, 13824)}
    assert all(size < 100e3 * length for length, size in sizes.items()), sizes
    assert sizes[13824] < 2.1 * sizes[6912] < 2.1 * 2.1 * sizes[3456], sizes


def test_the_kernel_follows_the_devices_of_the_mesh():
    assert kernel(jnp.bfloat16, LONG) is plain and kernel(jnp.bfloat16, LONG + 1) is sliced
    for platform, want in (("tpu", splash), ("gpu", cudnn)):
        device = jax.sharding.AbstractDevice("some kind", 1, platform)
        mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            chosen = kernel(jnp.bfloat16, 64)
            assert getattr(chosen, "func", chosen) is want


@pytest.mark.parametrize("num_keys", [384, 4096, 14336, 53760])
def test_blocks_divide_every_length(num_keys):
    for device in ("TPU v5", "TPU v5 lite"):
        blocks = block_sizes(num_keys, num_keys, device)
        for size in (blocks.block_q, blocks.block_kv, blocks.block_kv_dkv):
            assert size % 128 == 0 and num_keys % size == 0
        assert blocks.block_kv % blocks.block_kv_compute == 0
        assert blocks.block_kv_dkv % blocks.block_kv_dkv_compute == 0
        # A chip with short blocks would have 35 partial sums of a long sequence.
        assert blocks.use_fused_bwd_kernel == (device == "TPU v5" or num_keys < 53760)
