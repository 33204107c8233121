"""Softmax attention over a padded sequence; only this file chooses a kernel for a platform.

The choice depends on the platform of the mesh's devices, not on the compiling machine: Splash
(Pallas) on TPU, cuDNN on GPU in 16 bits, XLA elsewhere. XLA processes long sequences in slices, so
it never holds the score matrix of a whole sequence. Every kernel computes the softmax in float32.
Padded keys are hidden, except where cuDNN is faster without a mask (`UNMASKED`, zero_keys.py).

Results are named "attention" for `scan_blocks`, which can save them for the backward pass.
Letters beyond the legend: Q queries, S keys.
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

from easyanimate_jax.models import heads
from easyanimate_jax.models.cudnn import unmasked
from easyanimate_jax.models.rope import Angles
from easyanimate_jax.models.zero_keys import Keys, Queries, attend_real
from easyanimate_jax.sharding import device_kind, platform

Tokens = Float[Array, "B _ heads K"]
Rows = Float[Array, "B _ D"]

LONG = 1024  # keys; with at most this many, `plain` is cheaper than slices
SLICE = 128  # queries in a slice of a long sequence: the scores of one head then fit the CPU cache
UNMASKED = (64,)  # widths of heads for which cuDNN has a faster kernel without a mask

# Splash: the largest blocks of queries, of keys in vector memory, of keys in one product, and of
# keys in the backward pass. All are multiples of 128. The first three fit the default limit of
# vector memory. The fused backward kernel writes one partial gradient of the queries per block of
# keys, and XLA adds these slowly. The last block is therefore as long as the step's raised limit
# allows (`training/program.py`, COMPILER_OPTIONS).
BLOCKS = {
    "TPU v5": (1152, 2048, 768, 7168),
    "TPU v6 lite": (1152, 2048, 768, 14336),
    "TPU7x": (1152, 2048, 768, 7168),
}
SAFE_BLOCKS = (512, 1536, 512, 1536)
MOST_PARTIAL = 16  # partial gradients; with more, a second backward kernel is cheaper


def joint_attention(
    q: tuple[Tokens, Tokens],
    k: tuple[Tokens, Tokens],
    v: tuple[Tokens, Tokens],
    lengths: Int[Array, "B"],
    *,
    num_text: int,
    axis: str | None = None,
) -> tuple[Tokens, Tokens]:
    """Return the attention of (text, video) queries over all tokens, text first.

    `lengths` counts the real video tokens of each row; `num_text` counts all text tokens.

    With a mesh axis `axis`, each device holds a part of the tokens, and the text is padded to equal
    parts. Devices then exchange tokens for heads and back (DeepSpeed-Ulysses). Where the number of
    heads does not divide, each device keeps its queries and gathers all keys and values.
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
    """Attend with text and video queries; joined, except for `plain`, which saves that copy."""
    if kernel(q[0].dtype, kv[0].shape[1]) is plain:
        video = attention(q[1], *kv, lengths)
        return attention(q[0], *kv, lengths), video
    out = attention(jnp.concatenate(q, axis=1), *kv, lengths)
    return out[:, : q[0].shape[1]], out[:, q[0].shape[1] :]


def attention(q: Queries, k: Keys, v: Keys, lengths: Int[Array, "B"]) -> Queries:
    """Let every query attend to the first `lengths` keys of its row, with the platform's kernel."""
    attend, mesh = kernel(q.dtype, k.shape[1]), jax.sharding.get_abstract_mesh()
    if attend is plain or mesh.empty or mesh.size == 1:
        return attend(q, k, v, lengths)
    # `by_device` leaves only the axis `tensor` to XLA, and XLA cannot split a kernel over it.
    heads = PartitionSpec(None, None, "tensor", None)
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, PartitionSpec(None)),
        out_specs=heads,
        axis_names={"tensor"},
        check_vma=False,
    )(q, k, v, lengths)


def kernel(dtype, num_keys: int):
    """Return this platform's attention function: `splash`, `cudnn`, `plain` or `sliced`."""
    if platform() == "tpu":
        return partial(splash, device_kind=device_kind())
    if platform() == "gpu" and dtype != jnp.float32:  # cuDNN has no float32 kernel
        return cudnn
    return plain if num_keys <= LONG else sliced


def cudnn(q: Queries, k: Keys, v: Keys, lengths: Int[Array, "B"]) -> Queries:
    """Attend with cuDNN; `scan_blocks` saves its result and log-sums as "attention".

    With a mask, the sequence is padded by one or two tokens. JAX's backward pass requires even
    lengths, and XLA joins text and video three times faster into a padded array than into an
    unpadded one.
    """
    zero_keys = unmasked() if q.shape[-1] in UNMASKED else None
    if zero_keys is not None:
        return attend_real(q, k, v, lengths, kernel=zero_keys)
    rows = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, 2 - x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :rows]


def plain(q: Queries, k: Keys, v: Keys, lengths: Int[Array, "B"]) -> Queries:
    """Attend with the whole score matrix in memory, for at most `LONG` keys."""
    return checkpoint_name(_softmax_mix(q, k, v, lengths), "attention")


def sliced(q: Queries, k: Keys, v: Keys, lengths: Int[Array, "B"]) -> Queries:
    """Attend to `SLICE` queries of one head at a time: flash attention in XLA.

    Beside arguments and results it holds SLICE x S scores, so memory is linear in the sequence.
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
    """Return the result and the residuals; log-sums suffice to recompute the softmax weights."""
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
    """Return the gradients; scores are keys x queries, so only one product transposes a matrix."""
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
    # Division after the product with v touches K numbers per query instead of S. On the CPU that
    # is a third faster, forward and backward, than normalising the scores.
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
    """Attend with Splash; padded keys get another segment number than the queries.

    The kernel names its result and its log-sums "attention". If `scan_blocks` saves that name, the
    backward pass does not run the kernel again.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    q_rows, k_rows = (n + -n % granule(n) for n in (num_queries, num_keys))

    def lay(x, rows):
        x = jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, 0)))
        return rearrange(x, "B S heads K -> B heads S K")

    laid = lay(q * q.shape[-1] ** -0.5, q_rows), lay(k, k_rows), lay(v, k_rows)
    out = splash_heads(*laid, lengths, num_keys, 0, device_kind, interpret)
    return rearrange(out, "B heads S K -> B S heads K")[:, :num_queries]


def splash_heads(
    q: Float[Array, "B heads Q K"],
    k: Float[Array, "B heads S K"],
    v: Float[Array, "B heads S K"],
    lengths: Int[Array, "B"],
    num_keys: int,
    num_text: int,
    device_kind: str | None,
    interpret: bool,
) -> Float[Array, "B heads Q K"]:
    """Attend as `splash` does, with scaled queries.

    The first `num_keys` keys are no filling. The last `num_text` of these are real; of the others
    the first, so that `lengths` keys of each row are real.
    """
    q_rows, k_rows, num_heads = q.shape[2], k.shape[2], q.shape[1]
    place = jnp.arange(k_rows)[None]
    text = (place >= num_keys - num_text) & (place < num_keys)
    padded = (place >= lengths[:, None] - num_text) & ~text
    call = make_splash_mha(
        MultiHeadMask([FullMask((q_rows, k_rows))] * num_heads),
        block_sizes=block_sizes(q_rows, k_rows, device_kind),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    queries = jnp.zeros((q.shape[0], q_rows), jnp.int32)
    return jax.vmap(call)(q, k, v, SegmentIds(queries, padded.astype(jnp.int32)))


def is_fused(num_video: int, num_heads: int, axis: str | None) -> bool:
    """Return whether `fused_attention` can attend: on a TPU, if devices can exchange whole heads.

    `num_video` counts the video tokens of a row that a device holds.
    """
    if platform() != "tpu":
        return False
    parts = sharing = 1  # of a row's tokens, and of its heads
    if axis is not None:
        parts = jax.lax.axis_size(axis)
        sharing = parts * jax.sharding.get_abstract_mesh().shape["tensor"]
    return num_video * parts % min(heads.BLOCKS) == 0 and num_heads % sharing == 0


def fused_attention(
    video: tuple[Rows, Rows, Rows],
    text: tuple[Rows, Rows, Rows],
    norms: tuple[heads.Norms, heads.Norms],
    angles: Angles,
    lengths: Int[Array, "B"],
    *,
    num_text: int,
    eps: float,
    axis: str | None = None,
    interpret: bool = False,
) -> tuple[Rows, Rows]:
    """Return the attention of (video, text) from their projections (queries, keys, values).

    It normalises the heads of queries and keys and rotates those of the video; see
    models/heads.py. `norms` are those of queries and keys, each of (video, text). `num_text` and
    `axis` are those of `joint_attention`.
    """
    run = partial(_fused, num_text=num_text, eps=eps, axis=axis, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(video, text, norms, angles, lengths)
    by_heads, whole = PartitionSpec(None, None, "tensor"), PartitionSpec()
    return jax.shard_map(
        run,
        in_specs=(by_heads, by_heads, whole, whole, whole),
        out_specs=(by_heads, by_heads),
        axis_names={"tensor"},
        check_vma=False,
    )(video, text, norms, angles, lengths)


def _fused(video, text, norms, angles, lengths, *, num_text, eps, axis, interpret):
    video, text = (tuple(x.swapaxes(1, 2) for x in projections) for projections in (video, text))
    if axis is not None:  # devices exchange tokens for heads
        parts = jax.lax.axis_size(axis)

        def to_heads(x):
            x = rearrange(x, "B (parts D) N -> parts B D N", parts=parts)
            x = jax.lax.all_to_all(x, axis, 0, 0, tiled=True)
            return rearrange(x, "parts B D N -> B D (parts N)")

        video, text = jax.tree.map(to_heads, (video, text))
        angles = tuple(jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in angles)
        text, filled = tuple(x[..., :num_text] for x in text), text[0].shape[2]
    (_, D, N), K = video[0].shape, norms[0][0].scale.shape[0]
    place = heads.layout(N, num_text, D // K, eps, granule(N + num_text), interpret)
    turns = heads.signed_angles(angles)
    q, k = (
        heads.join_normalised(place, video[n], text[n], norms[n], turns, factor)
        for n, factor in enumerate((K**-0.5, 1.0))
    )
    v, num_keys = heads.join(place, video[2], text[2]), N + num_text
    out = splash_heads(q, k, v, num_text + lengths, num_keys, num_text, device_kind(), interpret)
    video, text = heads.part(place, out)
    if axis is not None:
        text = jnp.pad(text, ((0, 0), (0, 0), (0, filled - num_text)))

        def back(x):
            x = rearrange(x, "B D (parts N) -> parts B D N", parts=parts)
            x = jax.lax.all_to_all(x, axis, 0, 0, tiled=True)
            return rearrange(x, "parts B D N -> B (parts D) N")

        video, text = back(video), back(text)
    return video.swapaxes(1, 2), text.swapaxes(1, 2)


def granule(length: int) -> int:
    """Return the multiple that a length is padded to; larger blocks are faster on long ones."""
    return 512 if length > 2048 else 128


def block_sizes(num_queries: int, num_keys: int, device_kind: str | None) -> BlockSizes:
    """Return the largest blocks that divide the padded lengths and that the chip allows.

    Tokens lie along the lanes of the vector unit. Heads of width 64 would leave half of the 128
    lanes empty, and XLA would transpose its products. By the compiler's estimate that takes an
    eighth of a training step with 3328 tokens.
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
