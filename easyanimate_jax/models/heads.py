"""Attention on a TPU from the projections to the input of the last product, without idle copies.

Splash reads queries, keys and values with tokens along the lanes, (B heads K S), and writes its
result with a head along the lanes, (B heads S K). XLA would move every array several times between
these layouts and that of the products, because it cannot join text and video, normalise heads,
rotate and transpose at once. Here a Pallas kernel reads a projection once and writes Splash's
operand: video first, then text, then zeros up to whole blocks. Another one reads Splash's result or
a gradient and writes the tokens. Arrays of tokens are (B D S) here: tokens along the lanes.

With x a head's projection and g the gradient of n * scale + bias, after the inverse rotation:

    n = (x - mean) * rstd        dx = rstd * (g * scale - mean(g * scale) - n * mean(g * scale * n))

The kernels compute in float32 and round once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

BLOCKS = (512, 256, 128)  # tokens of a block; the first that divides the video and the sequence
HEADS = (8, 6, 4, 3, 2, 1)  # heads of a block

Joined = Float[Array, "B heads S K"]


class Layout(NamedTuple):
    """The places of video and text in a joined sequence, and how kernels read it."""

    video: int  # tokens, a multiple of `block`
    text: int  # tokens, right behind the video
    total: int  # with the zeros behind the text, a multiple of `block`
    block: int
    heads: int
    eps: float  # of the norms of heads
    interpret: bool = False  # run the kernels on any platform

    @property
    def grouped(self) -> int:
        """Return the number of heads of a block."""
        return next(n for n in HEADS if self.heads % n == 0)


def layout(video: int, text: int, heads: int, eps: float, granule: int, interpret=False):
    """Return the layout of a sequence; None if the video does not end at the end of a block.

    The total is a multiple of `granule`.
    """
    block = next((n for n in BLOCKS if video % n == 0 and granule % n == 0), None)
    total = -(-(video + text) // granule) * granule
    return block and Layout(video, text, total, block, heads, eps, interpret)


class HeadNorm(NamedTuple):
    """The weight and the bias of a LayerNorm over heads, float32 of shape (K,)."""

    scale: Array
    bias: Array


Norms = tuple[HeadNorm, HeadNorm]  # of video and text


def join_normalised(
    place: Layout,
    video: Float[Array, "B D N"],
    text: Float[Array, "B D L"],
    norms: Norms,
    angles: tuple[Float[Array, "B K N"], Float[Array, "B K N"]],
    factor: float,
) -> Joined:
    """Return the joined heads of a projection: normalised, the video rotated, times `factor`.

    `norms` are those of video and text. `angles` are (cosines, sines) from `signed_angles`.
    """
    video = _normalised_part(place, 0, factor, video, norms[0], angles, None)
    return _normalised_part(place, place.video, factor, text, norms[1], None, video)


def join(place: Layout, video: Float[Array, "B D N"], text: Float[Array, "B D L"]) -> Joined:
    """Return the joined heads of a projection as they are."""
    return _join(place, video, text)


def part(place: Layout, joined: Joined) -> tuple[Float[Array, "B D N"], Float[Array, "B D L"]]:
    """Return the tokens of (video, text), with their heads side by side."""
    return _part(place, joined)


def signed_angles(angles) -> tuple[Float[Array, "B K N"], Float[Array, "B K N"]]:
    """Return cosines and sines for both numbers of each pair, those of the first with a minus.

    `angles` are cosines and sines (B N K/2). A pair (x0, x1) turns to (x0 cos - x1 sin, x1 cos +
    x0 sin).
    """
    cos, sin = (jnp.repeat(a.swapaxes(1, 2), 2, axis=1) for a in angles)
    sign = jnp.where(jnp.arange(sin.shape[1]) % 2 == 0, -1.0, 1.0)
    return cos, sin * sign[None, :, None]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normalised_part(place, first, factor, x, norm, angles, into):
    """Write the heads of `x` from token `first` of a joined sequence; return the sequence.

    `into` is the sequence so far; without it, all but these tokens is undefined.
    """
    out = _write(place, first, factor, x, norm, angles, into)
    return out.swapaxes(2, 3)  # Splash turns it back, so nothing moves


def _normalised_part_forward(place, first, factor, x, norm, angles, into):
    out = _normalised_part(place, first, factor, x, norm, angles, into)
    return out, (x, norm, angles, into is not None)


def _normalised_part_backward(place, first, factor, kept, d_out):
    x, norm, angles, inside = kept
    dx, with_n, of_d = _read_normalised(place, first, factor, x, norm, angles, d_out)
    d_norm = HeadNorm(with_n.sum(axis=(0, 2)), of_d.sum(axis=(0, 2)))
    d_angles = angles and jax.tree.map(jnp.zeros_like, angles)
    return dx, d_norm, d_angles, d_out if inside else None


_normalised_part.defvjp(_normalised_part_forward, _normalised_part_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _join(place, video, text):
    joined = None
    for first, x in ((0, video), (place.video, text)):
        joined = _write(place, first, 1.0, x, None, None, joined).swapaxes(2, 3)
    return joined


_join.defvjp(lambda *args: (_join(*args), None), lambda place, _, d: _part(place, d))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _part(place, joined):
    return tuple(
        _to_tokens(place, first, count, joined)
        for first, count in ((0, place.video), (place.video, place.text))
    )


def _part_backward(place, _, gradients):
    joined = None
    for first, d in zip((0, place.video), gradients, strict=True):
        joined = _to_heads(place, first, d, joined)
    return (joined,)


_part.defvjp(lambda place, joined: (_part(place, joined), None), _part_backward)


def _write(place, first, factor, x, norm, angles, into):
    """Return the sequence (B heads K S) with heads at their place; without `norm` as they are."""
    B, D, count = x.shape
    K, call = D // place.heads, _Call(place, first, count, D // place.heads)
    ends = place.total if first else place.video
    weights = [] if norm is None else [norm.scale[:, None], norm.bias[:, None]]
    turns = [] if angles is None else list(angles)
    return call.run(
        partial(_write_kernel, place.eps, factor, call, norm is not None, angles is not None),
        "heads_fwd",
        (B, (ends - first) // place.block, place.heads // place.grouped),
        [x, *weights, *turns],
        [call.tokens, *[call.weight] * len(weights), *[call.angles] * len(turns)],
        jax.ShapeDtypeStruct((B, place.heads, K, place.total), x.dtype),
        call.lanes,
        into=None if into is None else into.swapaxes(2, 3),
    )


def _write_kernel(eps, factor, call, normal, rotated, x, *refs):
    y, out = _split(x, call), refs[-1]
    if normal:
        y = _normalised(y, eps)[0] * refs[0][...][None] + refs[1][...][None]
    if rotated:
        cos, sin = refs[2:4]
        y = y * cos[...] + _swapped(y) * sin[...]
    out[0] = _only_real(call, y * factor).astype(out.dtype)


def _read_normalised(place, first, factor, x, norm, angles, d_out):
    """Return the gradients of the tokens, and of weight and bias per token: (B K count) float32."""
    B, D, count = x.shape
    call = _Call(place, first, count, D // place.heads)
    more = [] if angles is None else list(angles)
    operands = [x, d_out, norm.scale[:, None], *more]
    specs = [call.tokens, call.heads, call.weight, *[call.angles] * len(more)]
    sums = jax.ShapeDtypeStruct((B, D // place.heads, count), jnp.float32)
    return call.run(
        partial(_read_kernel, place.eps, factor, call, angles is not None),
        "heads_bwd",
        (B, pl.cdiv(count, place.block), place.heads // place.grouped),
        operands,
        specs,
        [jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums],
        [call.tokens, call.angles, call.angles],
    )


def _read_kernel(eps, factor, call, rotated, x, d_out, scale, *refs):
    dx, with_n, of_d = refs[-3:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        with_n[...] = jnp.zeros_like(with_n)
        of_d[...] = jnp.zeros_like(of_d)

    g = d_out[0].astype(jnp.float32).swapaxes(1, 2) * factor
    if rotated:
        cos, sin = refs[:2]
        g = g * cos[...] - _swapped(g) * sin[...]
    n, rstd = _normalised(_split(x, call), eps)
    with_n[0] += (g * n).sum(axis=0)
    of_d[0] += g.sum(axis=0)
    g = g * scale[...][None]
    mean, mean_n = (value.mean(axis=1, keepdims=True) for value in (g, g * n))
    dx[0] = (rstd * (g - mean - n * mean_n)).astype(dx.dtype).reshape(dx.shape[1:])


def _to_tokens(place, first, count, joined):
    """Return `count` tokens (B D count) of joined heads (B heads S K), from token `first`."""
    B, _, _, K = joined.shape
    call = _Call(place, first, count, K)

    def kernel(heads, out):
        turned = heads[0].astype(jnp.float32).swapaxes(1, 2)
        out[0] = turned.astype(out.dtype).reshape(out.shape[1:])

    return call.run(
        kernel,
        "heads_part",
        (B, pl.cdiv(count, place.block), place.heads // place.grouped),
        [joined],
        [call.heads],
        jax.ShapeDtypeStruct((B, place.heads * K, count), joined.dtype),
        call.tokens,
    )


def _to_heads(place, first, x, into):
    """Write tokens (B D count) from token `first` of joined heads (B heads S K); return these."""
    B, D, count = x.shape
    call = _Call(place, first, count, D // place.heads)
    ends = place.total if first else place.video

    def kernel(tokens, *refs):
        turned = _only_real(call, _split(tokens, call)).swapaxes(1, 2)
        refs[-1][0] = turned.astype(refs[-1].dtype)

    return call.run(
        kernel,
        "heads_join",
        (B, (ends - first) // place.block, place.heads // place.grouped),
        [x],
        [call.tokens],
        jax.ShapeDtypeStruct((B, place.heads, place.total, D // place.heads), x.dtype),
        call.heads,
        into=into,
    )


class _Call:
    """The blocks of a kernel over `count` tokens that lie at token `first` of a sequence."""

    def __init__(self, place: Layout, first: int, count: int, K: int):
        self.place, self.first, self.count, self.K = place, first, count, K
        begin, last = first // place.block, pl.cdiv(count, place.block) - 1
        block, heads = place.block, place.grouped
        tokens = (1, heads * K, block)

        def inside(b):  # behind the last token the sequence has zeros
            return jnp.minimum(b, last)

        self.tokens = pl.BlockSpec(tokens, lambda row, b, h: (row, h, inside(b)))
        self.angles = pl.BlockSpec((1, K, block), lambda row, b, h: (row, 0, inside(b)))
        self.weight = pl.BlockSpec((K, 1), lambda row, b, h: (0, 0))
        self.heads = pl.BlockSpec((1, heads, block, K), lambda row, b, h: (row, h, begin + b, 0))
        self.lanes = pl.BlockSpec((1, heads, K, block), lambda row, b, h: (row, h, 0, begin + b))

    def run(self, kernel, name, grid, operands, specs, shapes, out_specs, into=None):
        """Return the kernel's results; it writes the one of `into` over that array."""
        aliases = {}
        if into is not None:
            aliases = {len(operands): 0}
            operands, specs = [*operands, into], [*specs, pl.BlockSpec(memory_space=pl.ANY)]
        order = ("parallel", "parallel", "arbitrary")
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=specs,
            out_specs=out_specs,
            out_shape=shapes,
            input_output_aliases=aliases,
            compiler_params=pltpu.CompilerParams(dimension_semantics=order),
            name=name,
            interpret=self.place.interpret,
        )(*operands)


def _split(tokens, call: _Call) -> Float[Array, "heads K block"]:
    """Return the heads of a block of tokens, float32."""
    return tokens[0].astype(jnp.float32).reshape(-1, call.K, call.place.block)


def _normalised(x: Float[Array, "heads K block"], eps: float):
    """Return (normalised heads, reciprocal of their deviation)."""
    x = x - x.mean(axis=1, keepdims=True)
    rstd = jax.lax.rsqrt((x * x).mean(axis=1, keepdims=True) + eps)
    return x * rstd, rstd


def _swapped(x: Float[Array, "heads K block"]) -> Float[Array, "heads K block"]:
    """Return the numbers with the two of each pair exchanged."""
    rows = x.reshape(-1, x.shape[-1])
    first = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) % 2 == 0
    up, down = (pltpu.roll(rows, shift, 0) for shift in (rows.shape[0] - 1, 1))
    return jnp.where(first, up, down).reshape(x.shape)


def _only_real(call: _Call, x: Float[Array, "heads K block"]) -> Float[Array, "heads K block"]:
    """Return zeros instead of what lies behind the last token, where memory is undefined."""
    if call.first == 0:  # the video ends at the end of a block
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, 1, call.place.block), 2)
    return jnp.where(pl.program_id(1) * call.place.block + lane < call.count, x, 0)
