"""The causal video autoencoder: 4n+1 frames of pixels <-> n+1 latent frames, 8 x 8 times smaller.

Follows section 3 of the specification (MagViT-style, released with EasyAnimate V5 and V5.1). A
frame depends only on itself and on earlier frames, and norms use one frame at a time. A clip can
therefore be processed whole or in chunks of four frames with equal results; `Past` carries the
state from chunk to chunk.

Letters: z are raw latents, as the decoder reads them; `latents` are normalised for diffusion.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from easyanimate_jax.facts import (
    LATENT_CHANNELS,
    SPACE_FACTOR,
    TIME_FACTOR,
    DTypes,
    check_fields,
)
from easyanimate_jax.models.borders import check_latents, check_pixels
from easyanimate_jax.models.causal_conv import CausalConv, Features, Past, by_frame, is_large
from easyanimate_jax.models.layers import axes, linear
from easyanimate_jax.models.tiles import TILE_OVERLAP, map_tiles, stitch

FIRST_LOGVAR = -6.0  # log-variance of an untrained posterior; at 0 its noise would hide the latents

Video = Float[Array, "B F H W 3"]
Latents = Float[Array, "B T h w C"]


@dataclass(frozen=True)
class VAEConfig:
    """The size of an autoencoder; defaults are the released V5.1 weights (spec 1.2)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Number of channels of each level, from pixels to latents."""

    layers: int = 2
    """Number of residual blocks in a level of the encoder; the decoder has one more."""

    groups: int = 32
    """Number of channel groups of a group norm."""

    attention: bool = False
    """Attend within each frame in the middle of encoder and decoder, as V5 does; V5.1 does not."""

    unshuffle: int = 1
    """Side in pixels of the squares that become channels before the encoder and pixels again after
    the decoder. Each doubling replaces one level that halves height and width; small models with 8
    train in minutes."""

    norm: Literal["group", "rms"] = "group"
    """Normalisation: "group" over a frame, or "rms" at each position by itself, which treats crops
    like whole frames."""

    latent_mean: tuple[float, ...] = (0.0,)
    """Mean that is subtracted from raw latents for diffusion: one number, or one per channel."""

    latent_scale: tuple[float, ...] = (0.7125,)
    """Factor that latents are then multiplied by: one number, or one per channel (spec 1.2)."""

    dtype: DTypes = "bfloat16"
    """Dtype of the computation; weights are stored in float32."""

    def __post_init__(self):
        check_fields(
            self,
            channels="[1, inf)",
            layers="[1, inf)",
            groups="[1, inf)",
            unshuffle="1 or 2 or 4 or 8",
            latent_mean="(-inf, inf)",
            latent_scale="(0, inf)",
        )
        levels = 1 + max(int(math.log2(TIME_FACTOR)), self.space_halvings)
        if len(self.channels) != levels:
            raise ValueError(
                f"VAEConfig: channels {self.channels} has {len(self.channels)} levels; give "
                f"{levels} numbers, which unshuffle={self.unshuffle} needs."
            )
        for name in ("latent_mean", "latent_scale"):
            if len(getattr(self, name)) not in (1, LATENT_CHANNELS):
                raise ValueError(
                    f"VAEConfig: {name} has {len(getattr(self, name))} entries; give 1, or one for "
                    f"each of the {LATENT_CHANNELS} latent channels."
                )

    @property
    def space_halvings(self) -> int:
        """Return the number of levels that halve height and width."""
        return int(math.log2(SPACE_FACTOR // self.unshuffle))

    def strides(self, level: int) -> tuple[int, int]:
        """Return the (time, space) stride after `level`: the last levels reduce time and space."""
        left = len(self.channels) - 1 - level
        return (2 if left <= 2 else 1), (2 if left <= self.space_halvings else 1)

    def factors(self, level: int) -> tuple[int, int]:
        """Return the (time, space) factor after `level`: space grows first, time last."""
        left = len(self.channels) - 1 - level
        return (2 if left <= 2 else 1), (2 if level < self.space_halvings else 1)


class FrameNorm(nnx.Module):
    """Group norm over single frames, or RMS norm over single positions; float32 inside."""

    def __init__(self, channels: int, config: VAEConfig):
        self.groups = config.groups if config.norm == "group" else None
        self.scale = nnx.Param(jnp.ones(channels), **axes(None))
        if self.groups:
            self.bias = nnx.Param(jnp.zeros(channels), **axes(None))

    def __call__(self, x: Features) -> Features:
        dtype, x = x.dtype, x.astype(jnp.float32)
        scale = self.scale[...].reshape(1, 1, 1, 1, -1)
        if self.groups is None:
            # Flat patches of black, grey and white differ only in amplitude: adding 1 preserves it.
            power = jnp.mean(x * x, axis=-1, keepdims=True)
            return (x * jax.lax.rsqrt(power + 1.0) * scale).astype(dtype)
        x = rearrange(x, "B F H W (groups C) -> B F H W groups C", groups=self.groups)
        # standardize would compute E[x^2] - E[x]^2, which loses digits; so the variance is given.
        variance = jnp.var(x, axis=(2, 3, 5), keepdims=True)
        x = jax.nn.standardize(x, axis=(2, 3, 5), variance=variance, epsilon=1e-6)
        x = rearrange(x, "B F H W groups C -> B F H W (groups C)")
        return (x * scale + self.bias[...].reshape(1, 1, 1, 1, -1)).astype(dtype)


class ResBlock(nnx.Module):
    """Two normalised convolutions around a shortcut."""

    def __init__(self, d_in: int, d_out: int, config: VAEConfig, *, rngs: nnx.Rngs):
        dtype = config.dtype
        self.norm1 = FrameNorm(d_in, config)
        self.conv1 = CausalConv(d_in, d_out, dtype=dtype, rngs=rngs)
        self.norm2 = FrameNorm(d_out, config)
        zero = nnx.initializers.zeros  # blocks start as identities, so deep stacks train at once
        self.conv2 = CausalConv(d_out, d_out, dtype=dtype, rngs=rngs, init=zero)
        if d_in != d_out:
            self.shortcut = linear(d_in, d_out, (None, None), dtype=dtype, rngs=rngs)
        else:
            self.shortcut = None

    def __call__(self, x: Features, past: Past) -> Features:
        y = self.conv1(jax.nn.silu(self.norm1(x)), past)
        y = self.conv2(jax.nn.silu(self.norm2(y)), past)
        return (self.shortcut(x) if self.shortcut else x) + y


class FrameAttention(nnx.Module):
    """One head of attention over the positions of a frame (V5 only)."""

    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.group_norm = FrameNorm(channels, config)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            linear(channels, channels, (None, None), dtype=config.dtype, rngs=rngs)
            for _ in range(4)
        )

    def __call__(self, x: Features) -> Features:
        y = rearrange(self.group_norm(x), "B F H W C -> (B F) (H W) 1 C")
        y = jax.nn.dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out(y).reshape(x.shape)


class MidBlock(nnx.Module):
    """Two residual blocks at the smallest size, with attention between them for V5."""

    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.convs = nnx.List([ResBlock(channels, channels, config, rngs=rngs) for _ in range(2)])
        attends = range(config.attention)
        self.attentions = nnx.List([FrameAttention(channels, config, rngs=rngs) for _ in attends])

    def __call__(self, x: Features, past: Past) -> Features:
        x = self.convs[0](x, past)
        for attention in self.attentions:
            x = attention(x)
        return self.convs[1](x, past)


class Downsampler(nnx.Module):
    """A convolution with (time, space) strides."""

    def __init__(self, channels: int, strides: tuple[int, int], *, dtype, rngs: nnx.Rngs):
        self.conv = CausalConv(channels, channels, strides, dtype=dtype, rngs=rngs)

    def __call__(self, x: Features, past: Past) -> Features:
        return self.conv(x, past)


class Upsampler(nnx.Module):
    """Repeat pixels, convolve, then repeat frames, except for the first frame of a clip."""

    def __init__(self, channels: int, factors: tuple[int, int], *, dtype, rngs: nnx.Rngs):
        self.factors = factors
        self.conv = CausalConv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Features, past: Past) -> Features:
        time, space = self.factors
        x = self.conv(jnp.repeat(jnp.repeat(x, space, axis=2), space, axis=3), past)
        x = jnp.repeat(x, time, axis=1)
        return x[:, time - 1 :] if past.starts else x


class DownBlock(nnx.Module):
    """A level of the encoder: residual blocks, then a downsampler except in the last level."""

    def __init__(self, d_in: int, d_out: int, level: int, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [d_in] + [d_out] * (config.layers - 1)
        self.convs = nnx.List([ResBlock(width, d_out, config, rngs=rngs) for width in widths])
        if level < len(config.channels) - 1:
            strides = config.strides(level)
            self.downsampler = Downsampler(d_out, strides, dtype=config.dtype, rngs=rngs)
        else:
            self.downsampler = None

    def __call__(self, x: Features, past: Past) -> Features:
        for conv in self.convs:
            x = conv(x, past)
        return self.downsampler(x, past) if self.downsampler else x


class UpBlock(nnx.Module):
    """A level of the decoder: residual blocks, then an upsampler except in the last level."""

    def __init__(self, d_in: int, d_out: int, level: int, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [d_in] + [d_out] * config.layers
        self.convs = nnx.List([ResBlock(width, d_out, config, rngs=rngs) for width in widths])
        if level < len(config.channels) - 1:
            factors = config.factors(level)
            self.upsampler = Upsampler(d_out, factors, dtype=config.dtype, rngs=rngs)
        else:
            self.upsampler = None

    def __call__(self, x: Features, past: Past) -> Features:
        for conv in self.convs:
            x = conv(x, past)
        return self.upsampler(x, past) if self.upsampler else x


class Encoder(nnx.Module):
    """The network from pixels to the mean and log-variance of latents."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.unshuffle, widths = config.unshuffle, config.channels
        pixels = 3 * config.unshuffle**2
        self.conv_in = CausalConv(pixels, widths[0], dtype=config.dtype, rngs=rngs)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.down_blocks = nnx.List(
            [DownBlock(*pair, level, config, rngs=rngs) for level, pair in enumerate(pairs)]
        )
        self.mid_block = MidBlock(widths[-1], config, rngs=rngs)
        self.conv_norm_out = FrameNorm(widths[-1], config)
        moments = 2 * LATENT_CHANNELS
        self.conv_out = CausalConv(widths[-1], moments, dtype=config.dtype, rngs=rngs)

    def __call__(self, video: Video, past: Past) -> Latents:
        s = self.unshuffle
        x = rearrange(video, "B F (H y) (W x) C -> B F H W (y x C)", y=s, x=s)
        x = self.conv_in(x, past)
        for block in self.down_blocks:
            x = block(x, past)
        x = self.mid_block(x, past)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)), past)


class Decoder(nnx.Module):
    """The network from raw latents to pixels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.unshuffle, widths = config.unshuffle, config.channels[::-1]
        self.conv_in = CausalConv(LATENT_CHANNELS, widths[0], dtype=config.dtype, rngs=rngs)
        self.mid_block = MidBlock(widths[0], config, rngs=rngs)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.up_blocks = nnx.List(
            [UpBlock(*pair, level, config, rngs=rngs) for level, pair in enumerate(pairs)]
        )
        self.conv_norm_out = FrameNorm(widths[-1], config)
        pixels = 3 * config.unshuffle**2
        self.conv_out = CausalConv(widths[-1], pixels, dtype=config.dtype, rngs=rngs)

    def __call__(self, z: Latents, past: Past) -> Video:
        x = self.mid_block(self.conv_in(z, past), past)
        for block in self.up_blocks[:-1]:
            x = block(x, past)
        whole = past.starts or not is_large(x)
        x = self._last(x, past) if whole else by_frame(self._last, x, past)
        s = self.unshuffle
        return rearrange(x, "B F H W (y x C) -> B F (H y) (W x) C", y=s, x=s)

    def _last(self, x: Features, past: Past) -> Features:
        """Run the last layers, at full size; they use most of a decode's memory."""
        x = self.up_blocks[-1](x, past)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)), past)


class CausalVAE(nnx.Module):
    """The autoencoder: float pixels (B, F, H, W, 3) in [-1, 1] to raw latents z, and back.

    F is 4n+1, H and W are multiples of 8; z is float32 (B, n+1, H/8, W/8, 16). `encode` and
    `decode` process a clip whole. `chunked_*` use groups of four frames and `tiled_*` overlapping
    tiles; both need less memory. Chunks give equal results; tiles change pixels near their seams
    slightly. All raise ValueError, while JAX traces them, for wrong shapes and dtypes.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config, C = config, LATENT_CHANNELS
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv, self.post_quant_conv = (
            linear(
                width,
                width,
                (None, None),
                dtype=config.dtype,
                rngs=rngs,
                kernel_init=lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype),
            )
            for width in (2 * C, C)
        )
        self.quant_conv.bias[...] = jnp.repeat(jnp.array([0.0, FIRST_LOGVAR]), C)

    def __call__(self, video: Video) -> Video:
        """Return the reconstruction from the posterior's mean, float32, not clamped to [-1, 1]."""
        mean, _ = self.encode(video)
        return self.decode(mean)

    def encode(self, video: Video) -> tuple[Latents, Latents]:
        """Return the mean and log-variance of z; a sample is `mean + exp(logvar / 2) * noise`."""
        check_pixels(video)
        return _split(self._moments(video, Past()))

    def decode(self, z: Latents) -> Video:
        """Return the pixels of raw latents, float32, not clamped to [-1, 1]."""
        check_latents(z)
        return self._pixels(z, Past())

    def chunked_encode(self, video: Video) -> tuple[Latents, Latents]:
        """Return the result of `encode`, computed on four frames at a time."""
        check_pixels(video)
        return _split(_in_chunks(self._moments, video, TIME_FACTOR))

    def chunked_decode(self, z: Latents) -> Video:
        """Return the result of `decode`, computed on one latent frame at a time."""
        check_latents(z)
        return _in_chunks(self._pixels, z, 1)

    def tiled_encode(self, video: Video, tile: int = 384) -> tuple[Latents, Latents]:
        """Encode tiles of `tile` x `tile` pixels and blend them in latent space (spec 3.6)."""
        check_pixels(video)
        step = int(tile * (1 - TILE_OVERLAP))
        tiles = map_tiles(lambda window: _encode_tile(self, window), video, tile, step)
        latent_tile = tile // SPACE_FACTOR
        return _split(stitch(tiles, latent_tile, int(latent_tile * (1 - TILE_OVERLAP))))

    def tiled_decode(self, z: Latents, tile: int = 384) -> Video:
        """Decode tiles of `tile` x `tile` pixels; blend the lower right one twice (spec 3.6)."""
        check_latents(z)
        size = tile // SPACE_FACTOR
        step = int(size * (1 - TILE_OVERLAP))
        tiles = map_tiles(lambda window: _decode_tile(self, window), z, size, step)
        video = stitch(tiles, tile, int(tile * (1 - TILE_OVERLAP)))
        corner = _decode_tile(self, z[:, :, -size:, -size:])
        _, _, height, width, _ = corner.shape
        weight = jnp.minimum(
            jnp.linspace(0, 1, height).reshape(1, 1, -1, 1, 1),
            jnp.linspace(0, 1, width).reshape(1, 1, 1, -1, 1),
        )
        mixed = video[:, :, -height:, -width:] * (1 - weight) + corner * weight
        return video.at[:, :, -height:, -width:].set(mixed)

    def normalize(self, z: Latents) -> Latents:
        """Return raw latents normalised for diffusion."""
        mean, scale = self._statistics()
        return (z - mean) * scale

    def denormalize(self, latents: Latents) -> Latents:
        """Return the raw latents of normalised ones: the inverse of `normalize`."""
        mean, scale = self._statistics()
        return latents / scale + mean

    def _statistics(self):
        config = self.config
        return (
            jnp.asarray(statistic, jnp.float32).reshape(1, 1, 1, 1, -1)
            for statistic in (config.latent_mean, config.latent_scale)
        )

    def _moments(self, video, past):
        return self.quant_conv(self.encoder(video, past)).astype(jnp.float32)

    def _pixels(self, z, past):
        return self.decoder(self.post_quant_conv(z), past).astype(jnp.float32)


def _split(moments):
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def _in_chunks(network, x, size):
    """Process frame 0, then `size` frames at a time; the backward pass stores only the tails."""
    past = Past()
    first = network(x[:, :1], past)

    @jax.checkpoint
    def body(tails, chunk):
        past = Past(tails)
        y = network(chunk, past)
        return past.tails, y

    chunks = rearrange(x[:, 1:], "B (n F) H W C -> n B F H W C", F=size)
    _, rest = jax.lax.scan(body, past.tails, chunks)
    return jnp.concatenate([first, rearrange(rest, "n B F H W C -> B (n F) H W C")], axis=1)


# Jitted, so that all equal tiles of a clip share one program, even inside a larger program.
@jax.jit
def _encode_tile(vae, video):
    return _in_chunks(vae._moments, video, TIME_FACTOR)


@jax.jit
def _decode_tile(vae, z):
    return vae.chunked_decode(z)
