"""Exact attention over padded rows with a kernel that knows no mask.

A kernel may be faster without a mask and at lengths that are multiples of `GRANULE`. So padded keys
and values are zeros here, and no mask hides them. A zero key has the score 0 and adds exp(0) to a
query's softmax sum. P of them add P to the sum, and nothing to the mixed values. With the kernel's
result o' and log-sum L', the result and log-sum over the real keys alone are

    padding = P exp(-L')        o = o' / (1 - padding)        L = L' + log(1 - padding)

The keys of a row are centred first: their mean is subtracted. This adds the same number to all
scores of a query, so the softmax stays the same. The mean score is then 0, and exp is convex. So n
real keys sum to n or more, and `padding` is at most P / (n + P), for all weights and queries.
Without centring, a query whose scores are all very negative would lose its digits beside P. The
relative error of o is that of exp(L'), times at most P / n.

Centred keys are rounded to the dtype of the keys once more. Their mean is often their largest part
in video models, and rounding without it is finer (SageAttention, arXiv 2410.02367).

The backward kernel gets the true o and L, so its gradients are those of the real keys. A zero key
adds nothing to the gradient of a query, and its own gradients are dropped. The gradients of the
real keys add up to zero, so the mean has none.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

GRANULE = 128

Queries = Float[Array, "B Q heads K"]
Keys = Float[Array, "B S heads K"]
LogSums = Float[Array, "B heads Q"]


class Kernel(NamedTuple):
    """Softmax attention without a mask; scores are divided by the square root of the width K."""

    forward: Callable  # (q, k, v) -> (o, float32 log-sums of the scores' exponentials)
    backward: Callable  # (q, k, v, o, log-sums, gradient of o) -> (gradients of q, k, v)


def attend_real(
    q: Queries, k: Keys, v: Keys, lengths: Int[Array, "B"], *, kernel: Kernel
) -> Queries:
    """Let every query attend to the first `lengths` keys of its row, of which there is one or more.

    The result and the log-sums are named "attention" for `scan_blocks`.
    """
    num_queries = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % GRANULE), (0, 0), (0, 0))) for x in (q, k, v))
    counts = rearrange(lengths, "B -> B 1 1 1")
    real = rearrange(jnp.arange(k.shape[1]), "S -> 1 S 1 1") < counts
    mean = jnp.where(real, k, 0).sum(axis=1, keepdims=True, dtype=jnp.float32) / counts
    k = jnp.where(real, k - jax.lax.stop_gradient(mean), 0).astype(k.dtype)
    v = jnp.where(real, v, 0)
    return _attend(kernel, q, k, v, k.shape[1] - lengths)[:, :num_queries]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: Kernel, q: Queries, k: Keys, v: Keys, num_zeros: Int[Array, "B"]) -> Queries:
    return _forward(kernel, q, k, v, num_zeros)[0]


def _forward(kernel, q, k, v, num_zeros):
    out, log_sums = kernel.forward(q, k, v)
    padding = rearrange(num_zeros, "B -> B 1 1") * jnp.exp(-log_sums)
    real = rearrange(1 - padding, "B heads Q -> B Q heads 1")
    out, log_sums = (out / real).astype(out.dtype), log_sums + jnp.log1p(-padding)
    out, log_sums = (checkpoint_name(x, "attention") for x in (out, log_sums))
    return out, (q, k, v, out, log_sums)


def _backward(kernel, kept, d_out):
    return *kernel.backward(*kept, d_out), None


_attend.defvjp(_forward, _backward)
