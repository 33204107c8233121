"""Attention without a mask: zero keys in the place of padding change nothing.

On a GPU the kernel is cuDNN's. Here it is `REFERENCE`, in plain JAX, with the same arguments and
results. The program for a GPU is lowered, and not compiled.
"""

import inspect
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import mix

from easyanimate_jax.models import attention as adapter
from easyanimate_jax.models import cudnn
from easyanimate_jax.models.attention import attention, sliced
from easyanimate_jax.models.layers import scan_blocks
from easyanimate_jax.models.zero_keys import Kernel, attend_real
from easyanimate_jax.sharding import MeshConfig, make_mesh

K = 64


def product(letters, *operands):
    return jnp.einsum(letters, *operands, preferred_element_type=jnp.float32)


def forward(q, k, v):
    scores = product("BqhK,BshK->Bhqs", q * K**-0.5, k)
    log_sums = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - log_sums[..., None])
    return product("Bhqs,BshK->BqhK", weights.astype(v.dtype), v).astype(v.dtype), log_sums


def backward(q, k, v, out, log_sums, d_out):
    weights = jnp.exp(product("BqhK,BshK->Bhqs", q * K**-0.5, k) - log_sums[..., None])
    inner = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1).swapaxes(1, 2)
    d_scores = K**-0.5 * weights * (product("BqhK,BshK->Bhqs", d_out, v) - inner[..., None])
    d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
    grads = (
        product("Bhqs,BshK->BqhK", d_scores, k),
        product("Bhqs,BqhK->BshK", d_scores, q),
        product("Bhqs,BqhK->BshK", weights, d_out),
    )
    return tuple(x.astype(q.dtype) for x in grads)


REFERENCE = Kernel(forward, backward)


def normed(x, gain):
    """As QK-norm leaves queries and keys: with the gain 1 they are 8 long, with 4 they are 32."""
    return gain * np.sqrt(K) * x / np.linalg.norm(x, axis=-1, keepdims=True)


def inputs(num_queries, num_keys, heads, gain, alike=0.0):
    """Queries, keys, values and a gradient in float64; `alike` gives all keys a common part."""
    rng = np.random.RandomState(0)
    q, k, v, d = (rng.randn(2, n, heads, K) for n in (num_queries, num_keys, num_keys, num_queries))
    return normed(q, gain), normed(k + alike * rng.randn(2, 1, heads, K), gain), v, d


def opposite(num_keys, gain):
    """The same where every key is nearly opposite to every query: all scores near -8 gain^2."""
    rng = np.random.RandomState(0)
    one = rng.randn(2, 1, 2, K)
    q, k = (normed(s * one + 0.2 * rng.randn(2, num_keys, 2, K), gain) for s in (1, -1))
    return q, k, *(rng.randn(2, num_keys, 2, K) for _ in range(2))


def zero_keys(q, k, v, lengths):
    return attend_real(q, k, v, jnp.array(lengths), kernel=REFERENCE)


def errors(attend, arrays, lengths, dtype):
    """Relative errors of the result and the gradients, and the gradients of keys and values."""
    want, want_grads = mix(*arrays[:3], lengths, arrays[3])
    q, k, v, d_out = (jnp.asarray(x, dtype) for x in arrays)
    out, pull = jax.vjp(lambda *x: attend(*x, jnp.array(lengths)), q, k, v)
    got = [np.asarray(x, np.float64) for x in (out, *pull(d_out))]
    pairs = zip(got, (want, *want_grads), strict=True)
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs], got[2:]


@pytest.mark.parametrize("gain", [1, 4])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "heads", "lengths"),
    [
        (433, 433, 2, (433, 350)),  # 333 text tokens and 100 of video; 83 are padding in a row
        (200, 589, 3, (589, 334)),  # a device's part of the queries
        (384, 384, 1, (384, 384)),  # no zero key at all
    ],
)
def test_result_and_gradients_are_those_of_the_real_keys(
    num_queries, num_keys, heads, lengths, gain
):
    arrays = inputs(num_queries, num_keys, heads, gain, alike=0.5)
    found, by_key = errors(zero_keys, arrays, lengths, "float32")
    assert max(found) < 1e-5, found
    for gradient in by_key:
        for row, length in zip(gradient, lengths, strict=True):
            assert np.all(row[length:] == 0) and np.all(row[:length].any(axis=-1))


@pytest.mark.parametrize("gain", [1, 4])
def test_scores_that_are_all_very_negative_keep_their_digits(gain):
    arrays = opposite(433, gain)
    scores = np.einsum("BqhK,BshK->Bhqs", *arrays[:2]) * K**-0.5
    assert scores.max() < (-5 if gain == 1 else -80)  # beside scores of 0 they would be nothing
    found, _ = errors(zero_keys, arrays, (433, 350), "float32")
    assert max(found) < 1e-5, found


@pytest.mark.parametrize(
    ("arrays", "length"),
    [
        (inputs(128, 384, 2, 1), 300),
        (inputs(128, 384, 2, 100), 300),
        (opposite(384, 4), 300),
        (opposite(384, 4), 20),
    ],
    ids=["usual", "long", "opposite", "few"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_keys_add_up_to_their_number_or_more(arrays, length, dtype):
    """So the padding's part of a softmax sum is at most P / (n + P), whatever the weights are."""
    sums = []

    def seen(*operands):
        sums.append(jnp.exp(forward(*operands)[1]))
        return forward(*operands)

    q, k, v = (jnp.asarray(x, dtype) for x in arrays[:3])
    attend_real(q, k, v, jnp.array([length, length]), kernel=Kernel(seen, backward))
    assert np.min(sums[0]) > 0.999 * 384


@pytest.mark.parametrize("length", [400, 40])
def test_the_error_grows_with_the_padding_per_real_key(length):
    """Padding of 9 and 101 times the real keys; a still picture in the longest bucket has 160."""
    arrays = inputs(64, 4096, 1, 1)
    found, _ = errors(zero_keys, arrays, (length, length), "float32")
    assert max(found) < 1e-6 * (4096 - length) / length, found


@pytest.mark.parametrize("gain", [1, 4])
@pytest.mark.parametrize("alike", [0, 4])
def test_bfloat16_loses_no_more_than_its_own_rounding(gain, alike):
    """Errors are those of float64 inputs, so they begin with the rounding of queries and keys."""
    arrays = inputs(433, 433, 2, gain, alike)
    found, _ = errors(zero_keys, arrays, (433, 350), "bfloat16")
    hidden, _ = errors(sliced, arrays, (433, 350), "bfloat16")
    assert all(a < 1.3 * b for a, b in zip(found, hidden, strict=True)), (found, hidden)


def test_padding_may_hold_anything():
    q, k, v, d_out = (jnp.asarray(x, "float32") for x in inputs(433, 433, 2, 1))
    lengths = jnp.array([433, 350])

    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: zero_keys(*x, lengths), q, k, v)
        return out, *pull(d_out.at[1, 350:].set(0))

    want = run(q, k, v)
    got = run(*(x.at[1, 350:].mul(1e3) for x in (q, k, v)))
    assert all(np.isfinite(x).all() for x in got)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a[1, :350], b[1, :350])
        np.testing.assert_array_equal(a[0], b[0])


def test_heads_that_are_split_over_devices_attend_alike(monkeypatch):
    monkeypatch.setattr(adapter, "platform", lambda: "gpu")
    monkeypatch.setattr(adapter, "unmasked", lambda: REFERENCE)
    q, k, v, d_out = (jnp.asarray(x, "bfloat16") for x in inputs(433, 433, 4, 1))
    lengths = jnp.array([433, 350])

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: attention(*x, lengths), q, k, v)
        return out, *pull(d_out)

    want = run(q, k, v)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1, 2), jax.devices()[:2])):
        got = run(q, k, v)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=1e-2)


@pytest.fixture
def cudnn_there(monkeypatch):
    """JAX's checks see a version of cuDNN, so programs for a GPU can be lowered."""
    monkeypatch.setattr(cudnn.private, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn.private, "check_compute_capability", lambda _: True)


def calls(width, save=("attention",)):
    """The calls of cuDNN in the gradient of three layers: [(target, operands, mask)]."""
    x = jax.ShapeDtypeStruct((2, 433, 2, width), jnp.bfloat16)

    def loss(q, k, v):
        attend = lambda _, q: adapter.cudnn(q, k, v, jnp.array([433, 350]))  # noqa: E731
        return scan_blocks(attend, q, jnp.zeros(3), save=save).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"@__cudnn\$(\w+)\((.*?)\).*?mask_type\\22: \\22(\w+)\\22", text)
    return [(target, operands.count("%"), mask) for target, operands, mask in found]


def test_a_gpu_runs_one_kernel_forward_and_one_backward_without_a_mask(cudnn_there):
    forward, backward = ("fmhaSoftmax", 3, "NO_MASK"), ("fmhaSoftmaxBackward", 6, "NO_MASK")
    assert calls(64) == [forward, backward]
    assert calls(64, save=()) == [forward, forward, backward]


def test_cudnn_gets_every_array_at_its_place(cudnn_there):
    q, k, v = (jax.ShapeDtypeStruct((1, 128, 2, K), jnp.bfloat16) for _ in range(3))
    sums = jax.ShapeDtypeStruct((1, 2, 128), jnp.float32)
    program = jax.make_jaxpr(cudnn.unmasked().backward)(q, k, v, q, sums, q)
    names = ("query", "key", "value", "fwd_output", "activation", "grad_output")
    (call,) = (e for e in program.eqns if e.primitive.name.startswith("dot_product_attention"))
    operands = inspect.signature(cudnn.private._dot_product_attention_bwd_impl).parameters
    at = dict(zip(operands, call.invars, strict=False))
    assert [at[name] for name in names] == program.jaxpr.invars
    assert program.jaxpr.outvars == call.outvars and call.params["scale"] == K**-0.5
    program = jax.make_jaxpr(cudnn.unmasked().forward)(q, k, v)
    assert f"scale={K**-0.5}" in str(program).split()


def test_other_widths_hide_the_padding(cudnn_there):
    masked = [("fmhaSoftmax", 5, "PADDING"), ("fmhaSoftmaxBackward", 8, "PADDING")]
    assert calls(128) == masked


def private_with(parameters):
    """JAX's private module, but its backward operation has other parameters."""
    signature = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in parameters]
    )

    def operation(**_): ...

    operation.__signature__ = signature
    other = SimpleNamespace(**vars(cudnn.private))
    other._dot_product_attention_bwd_impl = operation
    return other


def test_a_release_of_jax_with_another_call_hides_the_padding(cudnn_there, monkeypatch):
    """0.12 has two more parameters, which are known. Any other change is not."""
    parameters = cudnn.OPERANDS + cudnn.SETTINGS
    for other, known in (
        (private_with(parameters + cudnn.ADDED), True),
        (private_with([*parameters, "unheard_of"]), False),
        (private_with(parameters[1:]), False),
        (None, False),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(cudnn, "private", other)
            assert (cudnn.unmasked() is not None) == known
            if not known:
                assert {mask for _, _, mask in calls(64)} == {"PADDING"}
