"""Matrix products of dense layers in 8 bits, in the forward and the backward pass.

    y = x @ kernel        dx = dy @ kernel.T        dkernel = x.T @ dy

Each operand is divided by a float32 scale, one for each of its vectors that are multiplied: the
scale takes the largest absolute value of the vector to the largest value of the 8-bit type. So an
operand is scaled anew for each of its two products. The sum is int32 or float32, is multiplied by
both scales in float32, and has the dtype of `x`; a gradient has the dtype of what it belongs to.
Inside `by_device` a vector along the tokens is that of one device.

* int8: all three products, with `dy` rounded stochastically and all else to the nearest integer.
  This is AQT's recipe (google/aqt, `config_v4`), which MaxText's `quantization=int8` selects with
  the same scales per device for `dkernel`.
* fp8: e4m3 for `x` and `kernel`, e5m2 for `dy` (Micikevicius et al. 2022, arXiv 2209.05433; the
  "hybrid" format of NVIDIA's Transformer Engine), with the scales of torchao's recipe "rowwise".
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

Products = Literal["full", "int8", "fp8"]

SMALLEST = 1e-30  # a vector of smaller values has this scale, so zeros are not divided by zero
FORWARD = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
GRADIENT = {"int8": jnp.int8, "fp8": jnp.float8_e5m2}
SUM = {"int8": jnp.int32, "fp8": jnp.float32}


def full(x: Array, kernel: Array, dimensions: tuple, **settings) -> Array:
    """Return the product in the dtype of `x`; a kernel of integers is cast to it first."""
    return jax.lax.dot_general(x, kernel.astype(x.dtype), dimensions, **settings)


def int8(x: Array, kernel: Array, dimensions: tuple, **settings) -> Array:
    """Return the product of a dense layer in int8; a kernel that is int8 already has scale 1."""
    return _rows_product("int8", x, kernel)


def fp8(x: Array, kernel: Array, dimensions: tuple, **settings) -> Array:
    """Return the product of a dense layer in float8."""
    return _rows_product("fp8", x, kernel)


# By name, as `dot_general` of `nnx.Linear`: (x, kernel, dimension numbers, settings) -> y.
DOT_GENERAL = {"full": full, "int8": int8, "fp8": fp8}


def _rows_product(kind: str, x: Shaped[Array, "... in"], kernel: Shaped[Array, "in out"]) -> Array:
    y = product(kind, x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
    kind: str, x: Float[Array, "rows in"], kernel: Shaped[Array, "in out"]
) -> Float[Array, "rows out"]:
    """Return `x @ kernel` with both in the 8-bit type of `kind`, "int8" or "fp8"."""
    x_8, x_scale = quantized(x, 1, FORWARD[kind])
    kernel_8, kernel_scale = quantized(kernel, 0, FORWARD[kind])
    y = jnp.einsum("ni,io->no", x_8, kernel_8, preferred_element_type=SUM[kind])
    return (y.astype(jnp.float32) * x_scale * kernel_scale).astype(x.dtype)


def _forward(kind, x, kernel):
    return product(kind, x, kernel), (x, kernel)


def _backward(kind, operands, dy):
    x, kernel = operands
    up = thresholds(dy) if kind == "int8" else None
    dy_8, dy_scale = quantized(dy, 1, GRADIENT[kind], up)
    kernel_8, kernel_scale = quantized(kernel, 1, FORWARD[kind])
    dx = jnp.einsum("no,io->ni", dy_8, kernel_8, preferred_element_type=SUM[kind])
    dx = dx.astype(jnp.float32) * dy_scale * kernel_scale.T
    if kernel.dtype == jnp.int8:  # integers have no gradient
        return dx.astype(x.dtype), np.zeros(kernel.shape, jax.dtypes.float0)

    x_8, x_scale = quantized(x, 0, FORWARD[kind])
    dy_8, dy_scale = quantized(dy, 0, GRADIENT[kind], up)
    dkernel = jnp.einsum("ni,no->io", x_8, dy_8, preferred_element_type=SUM[kind])
    dkernel = dkernel.astype(jnp.float32) * x_scale.T * dy_scale
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


product.defvjp(_forward, _backward)


def quantized(
    x: Shaped[Array, "a b"], axis: int, dtype, up: Float[Array, "a b"] | None = None
) -> tuple[Shaped[Array, "a b"], Float[Array, "_ _"]]:
    """Return (8-bit values, float32 scale) whose product is about `x`; `axis` shares a scale.

    A vector with a value that is not finite has such a scale, which makes its products NaN.
    Integers with `up` round up where their fraction and `up` are at least 1, else to the nearest.
    """
    if x.dtype == dtype:
        return x, jnp.ones([1 if n == axis else size for n, size in enumerate(x.shape)])
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32)
    largest = jnp.maximum(largest, SMALLEST)
    x = x.astype(jnp.float32)
    if dtype != jnp.int8:
        most = float(jnp.finfo(dtype).max)
        return (x * (most / largest)).astype(dtype), largest / most
    # With more than 133,144 values in a vector, products of 127 x 127 could overflow the int32 sum.
    most = min(127, math.isqrt((2**31 - 1) // x.shape[axis]))
    x = x * (most / largest)  # a multiplication: TPUs divide in several steps
    # The largest value may come out above `most`, by the ulps of the device's division.
    x = jnp.rint(x) if up is None else jnp.clip(jnp.floor(x + up), -most, most)
    return x.astype(dtype), largest / most


def thresholds(x: Float[Array, "a b"]) -> Float[Array, "a b"]:
    """Return numbers of [0, 1) that look random: multiples of 2^-16, from each value and its place.

    The model has no key, and the numbers must be the same when a step is repeated. The bits of a
    gradient differ from update to update; the place makes equal values of one array round
    independently. The mixing is the finalizer of MurmurHash3.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    for axis, odd in enumerate((0x9E3779B1, 0x85EBCA77)):
        bits = bits + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(odd)
    for shift, odd in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(odd)
    return (bits >> 16).astype(jnp.float32) / 2**16
