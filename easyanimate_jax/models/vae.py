"""The causal video autoencoder: 4n+1 frames of pixels <-> n+1 frames of latents, 4 x 8 x 8 smaller.

Follows section 3 of the specification (MagViT-style, released with EasyAnimate V5 and V5.1).
Nothing looks into the future and norms see one frame at a time, so a clip can be processed whole or
in chunks of four frames with equal results; `Past` is what a chunk knows of the ones before it.

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
from easyanimate_jax.models.causal_conv import CausalConv, Features, Past, by_frame, is_large
from easyanimate_jax.models.layers import axes, linear
from easyanimate_jax.models.tiles import TILE_OVERLAP, map_tiles, stitch

FIRST_LOGVAR = -6.0  # of an untrained posterior; at 0 its noise would drown the latents for long

Video = Float[Array, "B F H W 3"]
Latents = Float[Array, "B T h w C"]


@dataclass(frozen=True)
class VAEConfig:
    """The size of an autoencoder; defaults are the released V5.1 weights (spec 1.2)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level, from pixels to latents."""

    layers: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""

    groups: int = 32
    """Groups of channels that the group norms normalise together."""

    attention: bool = False
    """Attention within a frame in the middle of encoder and decoder: V5 has it, V5.1 has not."""

    unshuffle: int = 1
    """Side in pixels of the squares that are folded into channels in front of the encoder, and
    unfolded behind the decoder. Each doubling replaces one spatial halving, for small models that
    train in minutes."""

    norm: Literal["group", "rms"] = "group"
    """Normalisation: "group" over a frame, or "rms" at every position by itself, so that crops and
    whole frames look alike."""

    latent_mean: tuple[float, ...] = (0.0,)
    """Number that is taken off raw latents for diffusion: one, or one for each channel."""

    latent_scale: tuple[float, ...] = (0.7125,)
    """Number that latents are then multiplied by: one, or one for each channel (spec 1.2)."""

    dtype: DTypes = "bfloat16"
    """Type that the autoencoder computes in."""

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
                f"VAEConfig: channels {self.channels} has {len(self.channels)} levels; "
                f"unshuffle={self.unshuffle} needs {levels}."
            )
        for name in ("latent_mean", "latent_scale"):
            if len(getattr(self, name)) not in (1, LATENT_CHANNELS):
                raise ValueError(
                    f"VAEConfig: {name} has {len(getattr(self, name))} entries; give 1, or one for "
                    f"each of {LATENT_CHANNELS} latent channels."
                )

    @property
    def space_halvings(self) -> int:
        return int(math.log2(SPACE_FACTOR // self.unshuffle))

    def strides(self, level: int) -> tuple[int, int]:
        """(time, space) stride of the downsampler after `level`: time last, space last."""
        left = len(self.channels) - 1 - level
        return (2 if left <= 2 else 1), (2 if left <= self.space_halvings else 1)

    def factors(self, level: int) -> tuple[int, int]:
        """(time, space) factor of the upsampler after `level`: space first, time last."""
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
            # Flat patches of black, grey and white differ in amplitude: the 1 lets it through.
            power = jnp.mean(x * x, axis=-1, keepdims=True)
            return (x * jax.lax.rsqrt(power + 1.0) * scale).astype(dtype)
        x = rearrange(x, "B F H W (groups C) -> B F H W groups C", groups=self.groups)
        # The variance is given: standardize's own is E[x^2] - E[x]^2, which cancels.
        variance = jnp.var(x, axis=(2, 3, 5), keepdims=True)
        x = jax.nn.standardize(x, axis=(2, 3, 5), variance=variance, epsilon=1e-6)
        x = rearrange(x, "B F H W groups C -> B F H W (groups C)")
        return (x * scale + self.bias[...].reshape(1, 1, 1, 1, -1)).astype(dtype)


class ResBlock(nnx.Module):
    def __init__(self, d_in: int, d_out: int, config: VAEConfig, *, rngs: nnx.Rngs):
        dtype = config.dtype
        self.norm1 = FrameNorm(d_in, config)
        self.conv1 = CausalConv(d_in, d_out, dtype=dtype, rngs=rngs)
        self.norm2 = FrameNorm(d_out, config)
        zero = nnx.initializers.zeros  # blocks begin as identities: deep stacks then train at once
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
    def __init__(self, channels: int, strides: tuple[int, int], *, dtype, rngs: nnx.Rngs):
        self.conv = CausalConv(channels, channels, strides, dtype=dtype, rngs=rngs)

    def __call__(self, x: Features, past: Past) -> Features:
        return self.conv(x, past)


class Upsampler(nnx.Module):
    """Nearest in space, conv, then every frame twice; but the first of a clip stays single."""

    def __init__(self, channels: int, factors: tuple[int, int], *, dtype, rngs: nnx.Rngs):
        self.factors = factors
        self.conv = CausalConv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Features, past: Past) -> Features:
        time, space = self.factors
        x = self.conv(jnp.repeat(jnp.repeat(x, space, axis=2), space, axis=3), past)
        x = jnp.repeat(x, time, axis=1)
        return x[:, time - 1 :] if past.starts else x


class DownBlock(nnx.Module):
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
        """At the full size: where the memory of a decode goes."""
        x = self.up_blocks[-1](x, past)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)), past)


class CausalVAE(nnx.Module):
    """The autoencoder: float pixels (B, F, H, W, 3) in [-1, 1] to raw latents z, and back.

    F is 4n+1, H and W are multiples of 8; z is float32 (B, n+1, H/8, W/8, 16). `encode` and
    `decode` run a clip whole; `chunked_*` in groups of four frames and `tiled_*` in overlapping
    windows need less memory. Chunks change nothing; tiles change seams slightly. All raise
    ValueError, while they are traced, for shapes and types that do not fit.
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
        """Return the reconstruction of a video by the mode of its posterior, not clamped."""
        mean, _ = self.encode(video)
        return self.decode(mean)

    def encode(self, video: Video) -> tuple[Latents, Latents]:
        """Return mean and log-variance of z. A sample is `mean + exp(logvar / 2) * noise`."""
        check_pixels(video)
        return _split(self._moments(video, Past()))

    def decode(self, z: Latents) -> Video:
        """Return the pixels of raw latents, float32, not clamped to [-1, 1]."""
        check_latents(z)
        return self._pixels(z, Past())

    def chunked_encode(self, video: Video) -> tuple[Latents, Latents]:
        """Return what `encode` does, four frames at a time."""
        check_pixels(video)
        return _split(_in_chunks(self._moments, video, TIME_FACTOR))

    def chunked_decode(self, z: Latents) -> Video:
        """Return what `decode` does, one latent frame at a time."""
        check_latents(z)
        return _in_chunks(self._pixels, z, 1)

    def tiled_encode(self, video: Video, tile: int = 384) -> tuple[Latents, Latents]:
        """Windows of `tile` x `tile` pixels, blended in latent space (spec 3.6)."""
        check_pixels(video)
        step = int(tile * (1 - TILE_OVERLAP))
        tiles = map_tiles(lambda window: _encode_tile(self, window), video, tile, step)
        latent_tile = tile // SPACE_FACTOR
        return _split(stitch(tiles, latent_tile, int(latent_tile * (1 - TILE_OVERLAP))))

    def tiled_decode(self, z: Latents, tile: int = 384) -> Video:
        """Windows of `tile` x `tile` pixels; the lower right one is mixed in twice (spec 3.6)."""
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
        """Return the latents that diffusion works on, of raw ones."""
        mean, scale = self._statistics()
        return (z - mean) * scale

    def denormalize(self, latents: Latents) -> Latents:
        """Return the raw latents of those that diffusion works on."""
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


def check_pixels(video) -> None:
    """Raise ValueError where an array is no video that the VAE can read."""
    if video.ndim != 5 or video.shape[-1] != 3 or not jnp.issubdtype(video.dtype, jnp.floating):
        raise ValueError(
            f"a video of {video.dtype} and shape {video.shape}: the VAE reads floats in [-1, 1] of "
            f"shape (rows, frames, height, width, 3); of 8-bit pixels give pixels / 127.5 - 1"
        )
    check_video(video.shape)


def check_latents(z) -> None:
    """Raise ValueError where an array is no raw latents that the VAE can decode."""
    if z.ndim != 5 or z.shape[-1] != LATENT_CHANNELS or 0 in z.shape:
        raise ValueError(
            f"latents of shape {z.shape}: the VAE decodes (rows, latent frames, height / "
            f"{SPACE_FACTOR}, width / {SPACE_FACTOR}, {LATENT_CHANNELS}), channels last"
        )


def check_video(shape: tuple[int, ...]) -> None:
    """Raise ValueError where (B, F, H, W, 3) does not fit the 4 x 8 x 8 compression."""
    _, frames, height, width, _ = shape
    if frames % TIME_FACTOR != 1:
        nearest = max(round((frames - 1) / TIME_FACTOR), 0) * TIME_FACTOR + 1
        raise ValueError(
            f"a video of {frames} frames: frames must be 4n+1 (frame 0, then fours); use {nearest}."
        )
    if height % SPACE_FACTOR or width % SPACE_FACTOR:
        raise ValueError(
            f"a video of {height} x {width} pixels: both must be multiples of {SPACE_FACTOR}; "
            f"crop it to {height // SPACE_FACTOR * SPACE_FACTOR} x "
            f"{width // SPACE_FACTOR * SPACE_FACTOR}."
        )


def _split(moments):
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def _in_chunks(network, x, size):
    """Frame 0 by itself, then `size` frames at a time; the backward pass keeps only the tails."""
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


# Jitted, so that a clip's many equal windows are one program, also inside a larger one.
@jax.jit
def _encode_tile(vae, video):
    return _in_chunks(vae._moments, video, TIME_FACTOR)


@jax.jit
def _decode_tile(vae, z):
    return vae.chunked_decode(z)
