"""Softmax attention over a padded sequence: the only place that knows kernels and platforms.

The kernel follows from the platform of the mesh's devices (not from where the program is compiled)
and from the length: Splash (Pallas) on TPU, cuDNN's on GPU, elsewhere XLA's, in slices when the
sequence is long, so that no score matrix of a whole sequence ever exists. All take the softmax in
float32. Q: queries, S: keys.

Results are named "attention" for `scan_blocks`, which keeps them for the backward pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    QKVLayout,
    SegmentIds,
    make_splash_mha,
)
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from easyanimate_jax.sharding import platform

Queries = Float[Array, "B Q heads K"]
Keys = Float[Array, "B S heads K"]
Tokens = Float[Array, "B _ heads K"]

LONG = 1024  # keys; up to here the whole score matrix is smaller than what it saves
SLICE = 128  # queries a slice of a long sequence: a head's scores then stay near the cores

# Splash: largest blocks of queries, of keys in fast memory, of keys in one product, and of keys in
# the backward pass. All are multiples of 128. The first three fit the vector memory that a program
# gets unasked. The fused backward writes a partial gradient of the queries per block of keys, and
# XLA is slow to add them up: so those blocks are as long as the step's own limit allows
# (`training/program.py`, COMPILER_OPTIONS).
BLOCKS = {"TPU v5": (1152, 2048, 768, 7168), "TPU v6 lite": (1152, 2048, 768, 7168)}
SAFE_BLOCKS = (512, 1536, 512, 1536)
MOST_PARTIAL = 16  # sums a query; with more, a second backward kernel costs less than adding them


def joint_attention(
    q: tuple[Tokens, Tokens],
    k: tuple[Tokens, Tokens],
    v: tuple[Tokens, Tokens],
    lengths: Int[Array, "B"],
    *,
    num_text: int,
    axis: str | None = None,
) -> tuple[Tokens, Tokens]:
    """Attention of (text, video) over both, text first; `lengths` counts the real video tokens.

    With `axis` each device holds a part of the tokens, the text filled up to whole parts. Devices
    exchange tokens for heads and back (Ulysses); where the heads do not divide, queries stay where
    they are and keys and values are gathered.
    """
    lengths = num_text + lengths
    if axis is None:
        return _attend(q, [jnp.concatenate(x, axis=1) for x in (k, v)], lengths)

    def whole(text, video, collect):
        return jnp.concatenate([collect(text)[:, :num_text], collect(video)], axis=1)

    parts = jax.lax.axis_size(axis)
    if q[1].shape[2] % (parts * jax.sharding.get_abstract_mesh().shape["tensor"]):
        collect = partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
        return _attend(q, [whole(*x, collect) for x in (k, v)], lengths)

    exchange = partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
    to_heads = partial(exchange, split_axis=2, concat_axis=1)
    out = attention(*(whole(*x, to_heads) for x in (q, k, v)), lengths)
    filled = q[0].shape[1] * parts - num_text
    text = jnp.pad(out[:, :num_text], ((0, 0), (0, filled), (0, 0), (0, 0)))
    return tuple(exchange(x, split_axis=1, concat_axis=2) for x in (text, out[:, num_text:]))


def _attend(q: tuple[Tokens, Tokens], kv: list[Keys], lengths) -> tuple[Tokens, Tokens]:
    """Text and video queries: XLA's own attention needs no copy that joins them."""
    if kernel(q[0].dtype, kv[0].shape[1]) is plain:
        video = attention(q[1], *kv, lengths)
        return attention(q[0], *kv, lengths), video
    out = attention(jnp.concatenate(q, axis=1), *kv, lengths)
    return out[:, : q[0].shape[1]], out[:, q[0].shape[1] :]


def attention(q: Queries, k: Keys, v: Keys, lengths: Int[Array, "B"]) -> Queries:
    """Every query attends to the first `lengths` keys of its sample."""
    attend, mesh = kernel(q.dtype, k.shape[1]), jax.sharding.get_abstract_mesh()
    if attend is plain or mesh.empty or mesh.size == 1:
        return attend(q, k, v, lengths)
    # XLA cannot split a kernel over `tensor`, the one axis that is left to it.
    heads = PartitionSpec(None, None, "tensor", None)
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, PartitionSpec(None)),
        out_specs=heads,
        axis_names={"tensor"},
        check_vma=False,
    )(q, k, v, lengths)


def kernel(dtype, num_keys: int):
    """The function that attends on this platform: `splash`, `cudnn`, `plain` or `sliced`."""
    if platform() == "tpu":
        device = jax.sharding.get_abstract_mesh().abstract_device
        return partial(splash, device_kind=getattr(device, "device_kind", None))
    if platform() == "gpu" and dtype != jnp.float32:  # cuDNN has no float32 kernel
        return cudnn
    return plain if num_keys <= LONG else sliced


def cudnn(q: Queries, k: Keys, v: Keys, lengths: Int[Array, "B"]) -> Queries:
    """`scan_blocks` knows the operation, and keeps its result and log-sums as "attention".

    One or two rows are added: JAX takes even lengths alone for the backward pass, and XLA writes
    text and video into one padded array at three times the rate of one that is not.
    """
    rows = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, 2 - x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :rows]


def plain(q: Queries, k: Keys, v: Keys, lengths: Int[Array, "B"]) -> Queries:
    """All scores at once."""
    return checkpoint_name(_softmax_mix(q, k, v, lengths), "attention")


def sliced(q: Queries, k: Keys, v: Keys, lengths: Int[Array, "B"]) -> Queries:
    """Flash attention in XLA: `SLICE` queries of one head at a time.

    Beside arguments and results it holds SLICE x S scores: linear in the sequence.
    """
    num_queries, heads = q.shape[1:3]
    filled = ((0, 0), (0, -num_queries % SLICE), (0, 0), (0, 0))
    q = jnp.pad(q * q.shape[-1] ** -0.5, filled)
    by_head = (rearrange(x, "B S heads K -> (B heads) S K") for x in (q, k, v))
    out = jax.lax.map(lambda x: _head(*x), (*by_head, jnp.repeat(lengths, heads)))
    return rearrange(out, "(B heads) S K -> B S heads K", heads=heads)[:, :num_queries]


@jax.custom_vjp
def _head(q: Float[Array, "Q K"], k: Float[Array, "S K"], v: Float[Array, "S K"], length):
    return _head_forward(q, k, v, length)[0]


def _head_forward(q, k, v, length):
    """Also what the backward pass needs: it makes the weights again from the logs of their sums."""
    hidden = _minus_infinity_from(length, k.shape[0])[None]

    def part(q):
        scores = _product(q, k.T) + hidden
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        mixed = _product(weights.astype(v.dtype), v) / total
        return mixed.astype(v.dtype), (largest + jnp.log(total))[:, 0]

    out, log_sums = jax.lax.map(part, _slices(q))
    out, log_sums = (checkpoint_name(x, "attention") for x in (out.reshape(q.shape), log_sums))
    return out, (q, k, v, length, out, log_sums)


def _head_backward(kept, d_out):
    """Scores lie keys x queries here: so only one of the five products has to turn an operand."""
    q, k, v, length, out, log_sums = kept
    hidden = _minus_infinity_from(length, k.shape[0])[:, None]
    inner = (d_out.astype(jnp.float32) * out).sum(axis=-1).reshape(log_sums.shape)

    def part(sums, slices):
        q, d_out, log_sums, inner = slices
        weights = jnp.exp(_product(k, q.T) + hidden - log_sums[None])
        d_scores = (weights * (_product(v, d_out.T) - inner[None])).astype(k.dtype)
        d_k, d_v = _product(d_scores, q), _product(weights.astype(v.dtype), d_out)
        return (sums[0] + d_k, sums[1] + d_v), _product(d_scores.T, k).astype(q.dtype)

    zero = jnp.zeros(k.shape, jnp.float32)
    parts = (_slices(q), _slices(d_out), log_sums, inner)
    (d_k, d_v), d_q = jax.lax.scan(part, (zero, zero), parts)
    return d_q.reshape(q.shape), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_head.defvjp(_head_forward, _head_backward)
_product = partial(jnp.dot, preferred_element_type=jnp.float32)


def _slices(x: Float[Array, "Q K"]) -> Float[Array, "_ slice K"]:
    return rearrange(x, "(slices Q) K -> slices Q K", Q=SLICE)


def _minus_infinity_from(length, num_keys: int) -> Float[Array, "S"]:
    return jnp.where(jnp.arange(num_keys) < length, 0.0, -jnp.inf)


def _softmax_mix(q: Queries, k: Keys, v: Keys, lengths: Int[Array, "B"]) -> Queries:
    hidden = jnp.arange(k.shape[1])[None] >= lengths[:, None]
    scores = jnp.einsum(
        "BqhK,BshK->Bhqs", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
    )
    scores = jnp.where(hidden[:, None, None], -jnp.inf, scores)
    # Dividing after the product with v touches K numbers a query instead of S: a third faster on
    # the CPU, forward and backward, than normalising the scores.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1)
    mixed = jnp.einsum("Bhqs,BshK->BqhK", weights.astype(v.dtype), v)
    return (mixed / total.swapaxes(1, 2)[..., None]).astype(v.dtype)


def splash(
    q: Queries,
    k: Keys,
    v: Keys,
    lengths: Int[Array, "B"],
    *,
    device_kind: str | None = None,
    interpret: bool = False,
) -> Queries:
    """Splash attention; hidden keys are another segment than the queries.

    The kernel itself names its result and its log-sums "attention", so that with them kept the
    backward pass does not run it again.
    """
    num_queries, num_keys, heads = q.shape[1], k.shape[1], q.shape[2]
    q_rows, k_rows = (n + -n % _granule(n) for n in (num_queries, num_keys))

    def lay(x, rows):
        x = jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, 0)))
        return rearrange(x, "B S heads K -> B heads S K")

    segments = (jnp.arange(k_rows)[None] >= lengths[:, None]).astype(jnp.int32)
    call = make_splash_mha(
        MultiHeadMask([FullMask((q_rows, k_rows))] * heads),
        block_sizes=block_sizes(q_rows, k_rows, device_kind),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    out = jax.vmap(call)(
        lay(q * q.shape[-1] ** -0.5, q_rows),
        lay(k, k_rows),
        lay(v, k_rows),
        SegmentIds(jnp.zeros((q.shape[0], q_rows), jnp.int32), segments),
    )
    return rearrange(out, "B heads S K -> B S heads K")[:, :num_queries]


def _granule(length: int) -> int:
    """Sequences are padded to multiples of this: more is faster, and too much for short ones."""
    return 512 if length > 2048 else 128


def block_sizes(num_queries: int, num_keys: int, device_kind: str | None) -> BlockSizes:
    """Blocks that divide the padded lengths, as large as the chip allows.

    Tokens lie along the lanes: heads of 64 would leave half of every row of 128 empty, and XLA
    would turn what its products give. By its own estimate that took an eighth of a step at 3328.
    """
    most_q, most_kv, most_compute, most_back = BLOCKS.get(device_kind, SAFE_BLOCKS)

    def largest(length: int, most: int) -> int:
        return max(b for b in range(128, most + 1, 128) if length % b == 0)

    q, kv = largest(num_queries, most_q), largest(num_keys, most_kv)
    compute = largest(kv, most_compute)
    kv_back = largest(num_keys, most_back)
    fused = num_keys <= MOST_PARTIAL * kv_back
    kv_back = kv_back if fused else kv
    return BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv_back,
        block_kv_dkv_compute=largest(kv_back, most_compute),
        block_q_dq=None if fused else q,
        block_kv_dq=None if fused else kv,
        use_fused_bwd_kernel=fused,
        q_layout=QKVLayout.SEQ_MINOR,
        k_layout=QKVLayout.SEQ_MINOR,
        v_layout=QKVLayout.SEQ_MINOR,
    )
