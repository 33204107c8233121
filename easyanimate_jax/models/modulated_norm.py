"""LayerNorm and its modulation by the time in one pass over the tokens: the norm of AdaLN.

    n = (x - mean) * rstd        y = n * factor + offset
    factor = weight * (1 + scale)        offset = bias * (1 + scale) + shift

XLA reads the tokens once for the mean, again for the variance and again for the result. On a TPU,
Pallas kernels hold whole tokens in vector memory and read each array once. They compute in float32
and round once, to the dtype of `x`. On other platforms XLA computes `dtype(norm(x)) * (1 + scale) +
shift`, as the reference does.

The backward pass keeps only `x` and the vectors. With g = dy * factor, and d the gradient of `x`
from the path around the norm,

    dx = d + rstd * (g - mean(g) - n * mean(g * n))

The gradients of `factor` and `offset` are sums over the tokens of a row: of dy * n and of dy.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from easyanimate_jax.sharding import platform

Tokens = Float[Array, "B S D"]
OfRow = Float[Array, "B 1 D"]

# Tokens in vector memory at once, beside those that are read and written meanwhile, and the bytes
# that they may have: with these the backward kernel fits the 16 MiB of the compiler's default.
BLOCKS, MOST_BYTES = (128, 64, 32, 16), 2**20


def modulated_norm(
    norm: nnx.LayerNorm, x: Tokens, shift: OfRow, scale: OfRow
) -> tuple[Tokens, Tokens]:
    """Return `norm(x)` times 1 + `scale`, plus `shift`, in the dtype of `x`; and `x`.

    The path around the norm should use the returned `x`, so that the backward pass adds its
    gradient in the same kernel. `norm` is a float32 LayerNorm with weight and bias. `shift` and
    `scale` have the dtype of `x`.
    """
    if platform() != "tpu":
        return norm(x).astype(x.dtype) * (1 + scale) + shift, x
    more = 1 + scale.astype(jnp.float32)
    factor = norm.scale.get_value()[None, None] * more
    offset = norm.bias.get_value()[None, None] * more + shift.astype(jnp.float32)
    fused, mesh = partial(in_one_pass, norm.epsilon), jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # `by_device` leaves only the axis `tensor` to XLA, and XLA cannot split a kernel over it.
        whole = PartitionSpec()
        fused = jax.shard_map(
            fused,
            in_specs=(whole,) * 3,
            out_specs=(whole, whole),
            axis_names={"tensor"},
            check_vma=False,
        )
    return fused(x, factor, offset)


@partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def in_one_pass(
    eps: float,
    x: Tokens,
    factor: Float[Array, "B 1 D"],
    offset: Float[Array, "B 1 D"],
    interpret: bool = False,
) -> tuple[Tokens, Tokens]:
    """Return normalised tokens times `factor`, plus `offset`, both float32 for each row; and `x`.

    With `interpret`, the kernel runs on any platform.
    """
    tokens, of_row = _specs(x)
    y = pl.pallas_call(
        partial(_forward_kernel, eps),
        grid=_grid(x),
        in_specs=[tokens, of_row, of_row],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="modulated_norm_fwd",
        interpret=interpret,
    )(x, factor, offset)
    return y, x


def _forward(eps, x, factor, offset, interpret):
    return in_one_pass(eps, x, factor, offset, interpret), (x, factor)


def _backward(eps, interpret, kept, gradients):
    (x, factor), (dy, around) = kept, gradients
    tokens, of_row = _specs(x)
    sums = jax.ShapeDtypeStruct(factor.shape, jnp.float32)
    return tuple(
        pl.pallas_call(
            partial(_backward_kernel, eps, x.shape[1]),
            grid=_grid(x),
            in_specs=[tokens, of_row, tokens, tokens],
            out_specs=[tokens, of_row, of_row],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            name="modulated_norm_bwd",
            interpret=interpret,
        )(x, factor, dy, around)
    )


in_one_pass.defvjp(_forward, _backward)


def _specs(x: Tokens) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Return the blocks of tokens, and of one vector for each row."""
    tokens = pl.BlockSpec((1, _block(x), x.shape[-1]), lambda row, block: (row, block, 0))
    return tokens, pl.BlockSpec((1, 1, x.shape[-1]), lambda row, block: (row, 0, 0))


def _grid(x: Tokens) -> tuple[int, int]:
    return x.shape[0], pl.cdiv(x.shape[1], _block(x))


def _block(x: Tokens) -> int:
    token = x.shape[-1] * x.dtype.itemsize
    return next((n for n in BLOCKS if n * token <= MOST_BYTES), BLOCKS[-1])


def _normalised(x: Float[Array, "block D"], eps: float):
    """Return (normalised tokens, reciprocal of their deviation), float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return x * rstd, rstd


def _forward_kernel(eps, x, factor, offset, y):
    n, _ = _normalised(x[0], eps)
    y[0] = (n * factor[0] + offset[0]).astype(y.dtype)


def _backward_kernel(eps, num_tokens, x, factor, dy, around, dx, d_factor, d_offset):
    @pl.when(pl.program_id(1) == 0)
    def _():
        d_factor[...] = jnp.zeros_like(d_factor)
        d_offset[...] = jnp.zeros_like(d_offset)

    n, rstd = _normalised(x[0], eps)
    g = dy[0].astype(jnp.float32)
    block = n.shape[0]
    if num_tokens % block:  # what lies behind the last token is undefined
        place = jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
        real = pl.program_id(1) * block + place < num_tokens
        n, g = (jnp.where(real, value, 0) for value in (n, g))
    d_factor[0] += (g * n).sum(axis=0, keepdims=True)
    d_offset[0] += g.sum(axis=0, keepdims=True)
    g = g * factor[0]
    mean, mean_n = (value.mean(axis=-1, keepdims=True) for value in (g, g * n))
    dx[0] = (around[0].astype(jnp.float32) + rstd * (g - mean - n * mean_n)).astype(dx.dtype)
