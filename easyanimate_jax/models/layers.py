"""Layers whose weights name their axes: dense layers, norms, the time sinusoid, stacked blocks.

`dtype` is always the dtype of the computation; weights are stored in float32.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core.primitives import name_p
from jaxtyping import Array, Float

from easyanimate_jax.models.products import DOT_GENERAL, Products
from easyanimate_jax.sharding import shard

LECUN_NORMAL = nnx.initializers.lecun_normal()
CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"  # JAX's name of the operation


def axes(*names: str | None) -> dict:
    """Return metadata that names a variable's axes; the jitted init places the variable once."""
    return {"out_sharding": names, "eager_sharding": False}


class Linear(nnx.Linear):
    """A dense layer whose kernel may be 8-bit integers, and may have an adapter beside it.

    `scale` is float32 of shape (d_out,), one factor for each column of an 8-bit kernel
    (models/storage.py). `adapter` is a low-rank product that is added to the output
    (models/lora.py). `dot_general` multiplies by the kernel (models/products.py).
    """

    scale: nnx.Param | None = None
    adapter: Callable | None = None

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        if self.scale is None:
            y = super().__call__(x)
        else:
            scale, bias = (w.get_value().astype(self.dtype) for w in (self.scale, self.bias))
            columns = (*[1] * (x.ndim - 1), -1)
            contracted = ((x.ndim - 1,), (0,)), ((), ())
            y = self.dot_general(x.astype(self.dtype), self.kernel.get_value(), contracted)
            y = y * scale.reshape(columns) + bias.reshape(columns)
        return y if self.adapter is None else y + self.adapter(x)


def linear(
    d_in: int,
    d_out: int,
    names: tuple[str | None, str | None],
    *,
    dtype,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    kernel_init: nnx.Initializer = LECUN_NORMAL,
    products: Products = "full",
) -> Linear:
    """Return a dense layer: float32 weights, computation in `dtype`, kernel axes (in, out).

    `products` names the type in which it multiplies by the kernel.
    """
    return Linear(
        d_in,
        d_out,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        dot_general=DOT_GENERAL[products],
        rngs=rngs,
        kernel_metadata=axes(*names),
        bias_metadata=axes(names[1]),
    )


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Yield (dotted name, layer) for every dense layer of a module."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a dotted name matches one of the patterns, such as `blocks.*.attention.*`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def layer_norm(width: int, *, eps: float, rngs: nnx.Rngs, name: str | None = None) -> nnx.LayerNorm:
    """Return an affine LayerNorm in float32 (spec 2.3); the caller casts the result back."""
    return nnx.LayerNorm(
        width,
        epsilon=eps,
        dtype=jnp.float32,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits; parity needs the exact form
        rngs=rngs,
        scale_metadata=axes(name),
        bias_metadata=axes(name),
    )


def rms_norm(width: int, *, eps: float, rngs: nnx.Rngs, name: str | None = None) -> nnx.RMSNorm:
    """Return an RMSNorm in float32; the caller casts the result back."""
    return nnx.RMSNorm(width, epsilon=eps, dtype=jnp.float32, rngs=rngs, scale_metadata=axes(name))


def spread(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Reshard embedded tokens: from the table's split by width to a split by rows.

    The array is replicated in between, because XLA has no direct exchange and would rematerialize.
    An array of embedded tokens is small compared with the weights that the first block gathers.
    """
    return shard(shard(x, None, None, None), "batch", None, None)


def sinusoid(time: Float[Array, "B"], width: int) -> Float[Array, "B E"]:
    """Return cosines, then sines, of `time` at frequencies 10000^(-2k/width) (spec 2.2)."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = time.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def stack(make_block: Callable, depth: int, *, rngs: nnx.Rngs):
    """Return `depth` blocks as one block whose weights have a leading "layers" axis."""
    build = nnx.vmap(make_block, transform_metadata={nnx.PARTITION_NAME: "layers"})
    return build(rngs.split(depth))


def scan_blocks(
    block: Callable, carry, blocks, *, save: Sequence[str] = (), offload: Sequence[str] = ()
):
    """Apply `carry = block(b, carry)` to each block of the stack; return the last carry.

    For the backward pass, activations named in `save` stay in device memory and those named in
    `offload` wait in host memory. All others are computed again. JAX's call of cuDNN with a mask
    does not name its log-sums, so the whole operation counts as "attention".
    """

    def body(carry, b):
        return block(b, carry), None

    policy = jax.checkpoint_policies.save_only_these_names(*save)
    if offload:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(save),
            names_which_can_be_offloaded=list(offload),
            offload_src="device",
            offload_dst="pinned_host",
        )

    def keep(primitive, *operands, **params):
        if primitive.name == CUDNN_ATTENTION:
            return policy(name_p, name="attention")
        return policy(primitive, *operands, **params)

    body = jax.checkpoint(body, policy=keep, prevent_cse=False)
    carry, _ = jax.lax.scan(body, carry, blocks)
    return carry
