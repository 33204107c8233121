"""Attention: equal to torch on the real keys, blind to the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easyanimate_jax.models.attention import attention


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


def test_its_gradient_is_that_of_the_plain_softmax():
    q, k, v = qkv()

    def plain(q, k, v):
        scores = jnp.einsum("BqhK,BshK->Bhqs", q, k) / np.sqrt(q.shape[-1])
        return jnp.einsum("Bhqs,BshK->BqhK", jax.nn.softmax(scores), v)

    def gradient(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2)))(q, k, v)

    ours = gradient(lambda q, k, v: attention(q, k, v, jnp.array([11, 11])))
    for got, want in zip(ours, gradient(plain), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
