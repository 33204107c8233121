"""The multimodal diffusion transformer: text and video tokens, own weights, joint attention.

Follows section 2 of the specification. The 7B models share weights between text and video in
their upper blocks; the 12B models do not. The transformer reads tokens, a grid and lengths.
`patchify` converts latent videos to tokens, and `unpatchify` converts them back.

Letters beyond the legend: E, the width of the time embedding.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as name
from jaxtyping import Array, Float, Int

from easyanimate_jax.facts import ACTIVATIONS, AUTO, LATENT_CHANNELS, PATCH, DTypes, check_fields
from easyanimate_jax.models.borders import check_mesh, check_rows, check_tokens
from easyanimate_jax.models.layers import layer_norm, linear, rms_norm, scan_blocks, sinusoid, stack
from easyanimate_jax.models.modulated_norm import modulated_norm
from easyanimate_jax.models.products import Products
from easyanimate_jax.models.qkvo import QKVO, attend
from easyanimate_jax.models.rope import Angles, rotary_angles
from easyanimate_jax.sharding import by_device, token_axis

Video = Float[Array, "B N D"]
Text = Float[Array, "B L D"]
Gate = Float[Array, "B 1 D"]
Time = Float[Array, "B E"]

TEXT_NORM_EPS = 1e-6
STREAM = ("batch", "tokens", None)


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes, dtype and memory choices of a transformer; spec 1.1 has the released sizes."""

    depth: int
    """Number of blocks."""

    mmdit_depth: int
    """Number of first blocks with separate weights for text; the others share the video's."""

    heads: int
    """Number of attention heads; the model width is `heads` times `head_width`."""

    text_widths: tuple[int, ...]
    """Width of the states of each text encoder."""

    text_norm: bool
    """Normalise text states before their projection, as V5.1 does; V5 does not (spec 1.1)."""

    round_time: bool
    """Round the timestep to `dtype`, as released weights expect (spec 2.9)."""

    head_width: int = 64
    """Width of one attention head, a multiple of 16."""

    in_channels: int = LATENT_CHANNELS
    """Number of input channels: the noisy latents and the condition of the task (spec 0)."""

    time_width: int = 512
    """Width of the time embedding (spec 2.2)."""

    norm_eps: float = 1e-5
    """Number added to the variance in the blocks' LayerNorms (spec 1.1)."""

    dtype: DTypes = "bfloat16"
    """Dtype of the computation; training stores the weights in float32."""

    products: Products = "full"
    """Type of the matrix products of the blocks' dense layers, forward and backward: `dtype` with
    "full", else 8 bits with scales (models/products.py). Modulation and attention stay full."""

    save: Literal["auto"] | tuple[str, ...] = "auto"
    """Names of `ACTIVATIONS` that stay in device memory for the backward pass; those in neither
    `save` nor `offload` are computed again. "auto" takes for each stage of a run the fastest choice
    that fits the memory."""

    offload: tuple[str, ...] = ()
    """Names of `ACTIVATIONS` that wait in host memory for the backward pass."""

    def __post_init__(self):
        check_fields(
            self,
            depth="[1, inf)",
            mmdit_depth="[0, inf)",
            heads="[1, inf)",
            text_widths="[1, inf)",
            head_width="[16, inf)",
            in_channels="[1, inf)",
            time_width="[2, inf)",
            norm_eps="(0, inf)",
        )
        if self.head_width % 16:
            raise ValueError(
                f"MMDiTConfig: head_width={self.head_width}: rotary angles split a head into 1/4, "
                f"3/8 and 3/8, in pairs; use a multiple of 16."
            )
        if self.mmdit_depth > self.depth:
            raise ValueError(
                f"MMDiTConfig: mmdit_depth={self.mmdit_depth} of depth={self.depth}: "
                f"the first `mmdit_depth` of all blocks have text weights; use 0 to {self.depth}."
            )
        named = () if self.save == AUTO else self.save
        if set(named + self.offload) - set(ACTIVATIONS) or set(named) & set(self.offload):
            raise ValueError(
                f"MMDiTConfig: save={self.save} and offload={self.offload}: each takes names of "
                f"{tuple(ACTIVATIONS)}; use each name in only one of them, or save='auto'."
            )

    @property
    def kept(self) -> tuple[str, ...]:
        """Return the names that `save` keeps; of "auto", those outside of a run."""
        return ("attention",) if self.save == AUTO else self.save

    @property
    def width(self) -> int:
        """Return the model width D."""
        return self.heads * self.head_width


class AdaLN(nnx.Module):
    """One LayerNorm for both streams; the time gives each its own shift, scale and gate."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.dtype = config.dtype
        self.linear = modulation(config, 6, rngs=rngs)
        self.norm = layer_norm(config.width, eps=config.norm_eps, rngs=rngs)

    def __call__(
        self, video: Video, text: Text, time: Time
    ) -> tuple[tuple[Video, Text], tuple[Video, Text], tuple[Gate, Gate]]:
        """Return the modulated streams, the streams themselves, and their gates."""
        shift, scale, gate, t_shift, t_scale, t_gate = split_modulation(self.linear(time), 6)
        v, video = modulated_norm(self.norm, video, shift, scale)
        t, text = modulated_norm(self.norm, text, t_shift, t_scale)
        return (v, t), (video, text), (gate, t_gate)


def modulation(config: MMDiTConfig, parts: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Return the layer from the time to `parts` vectors of width D; zero at first, as in DiT."""
    return linear(
        config.time_width,
        parts * config.width,
        ("mlp", "embed"),
        dtype=config.dtype,
        rngs=rngs,
        kernel_init=nnx.initializers.zeros,
    )


def split_modulation(x: Float[Array, "B parts_D"], parts: int) -> Float[Array, "parts B 1 D"]:
    """Split the result of `modulation` into vectors that broadcast over tokens."""
    return rearrange(x, "B (parts D) -> parts B 1 D", parts=parts)


class MLP(nnx.Module):
    """Two dense layers with a tanh-approximated GELU; the hidden width is 4 D."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        D = config.width
        dense = partial(linear, dtype=config.dtype, products=config.products, rngs=rngs)
        self.up = dense(D, 4 * D, ("embed", "mlp"))
        self.down = dense(4 * D, D, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        up = name(self.up(x), "mlp")
        return name(self.down(jax.nn.gelu(up, approximate=True)), "mlp out")


class Stream(nnx.Module):
    """The weights of one modality in a block."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.attention = QKVO(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)


class MMDiTBlock(nnx.Module):
    """Joint attention and an MLP, each after an AdaLN and added with a gate (spec 2.3)."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.norm1 = AdaLN(config, rngs=rngs)
        self.norm2 = AdaLN(config, rngs=rngs)
        self.video = Stream(config, rngs=rngs)
        self.text = Stream(config, rngs=rngs)

    def __call__(
        self,
        video: Video,
        text: Text,
        time: Time,
        angles: Angles,
        lengths: Int[Array, "B"],
        *,
        num_text: int,
        axis: str | None,
    ) -> tuple[Video, Text]:
        """Return both streams; with `axis`, of a device's tokens. `num_text` counts all text."""
        (v, t), (video, text), (v_gate, t_gate) = self.norm1(video, text, time)
        weights = self.video.attention, self.text.attention
        v, t = attend(*weights, v, t, angles, lengths, num_text, axis)
        video, text = video + v_gate * v, text + t_gate * t

        (v, t), (video, text), (v_gate, t_gate) = self.norm2(video, text, time)
        video = video + v_gate * self.video.mlp(v)
        return video, text + t_gate * self.text.mlp(t)


class SharedBlock(MMDiTBlock):
    """A block that processes text with the weights of the video."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.norm1 = AdaLN(config, rngs=rngs)
        self.norm2 = AdaLN(config, rngs=rngs)
        self.video = Stream(config, rngs=rngs)

    @property
    def text(self) -> Stream:
        """Return the weights of the video."""
        return self.video


class TimeEmbedding(nnx.Module):
    """A sinusoid and a two-layer MLP, then the SiLU that all its consumers would apply first."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.width, self.dtype, self.round_time = config.width, config.dtype, config.round_time
        E, dtype = config.time_width, config.dtype
        self.up = linear(config.width, E, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = linear(E, E, ("mlp", None), dtype=dtype, rngs=rngs)

    def __call__(self, time: Float[Array, "B"]) -> Time:
        if self.round_time:
            # The reference casts the timestep to the dtype of the latents.
            time = time.astype(self.dtype)
        x = sinusoid(time, self.width).astype(self.dtype)
        return jax.nn.silu(self.down(jax.nn.silu(self.up(x))))


class TextProjection(nnx.Module):
    """The projection from the width of one text encoder to the model width."""

    def __init__(self, config: MMDiTConfig, text_width: int, *, rngs: nnx.Rngs):
        self.dtype = config.dtype
        self.norm = rms_norm(text_width, eps=TEXT_NORM_EPS, rngs=rngs) if config.text_norm else None
        self.linear = linear(
            text_width, config.width, (None, "embed"), dtype=config.dtype, rngs=rngs
        )

    def __call__(self, text: Float[Array, "B L width"]) -> Text:
        if self.norm is not None:
            text = self.norm(text)
        return self.linear(text.astype(self.dtype))


class Output(nnx.Module):
    """Two LayerNorms, the second modulated (shift first), and the projection to patches."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.dtype = dtype = config.dtype
        self.final_norm = layer_norm(config.width, eps=config.norm_eps, rngs=rngs)
        self.norm = layer_norm(config.width, eps=config.norm_eps, rngs=rngs)
        self.modulation = modulation(config, 2, rngs=rngs)
        sizes, zeros = (config.width, LATENT_CHANNELS * PATCH**2), nnx.initializers.zeros
        self.linear = linear(*sizes, ("embed", None), dtype=dtype, rngs=rngs, kernel_init=zeros)

    def modulated(self, video: Video, time: Time) -> Video:
        """Return the input of the projection."""
        shift, scale = split_modulation(self.modulation(time), 2)
        video = self.norm(self.final_norm(video).astype(self.dtype)).astype(self.dtype)
        return video * (1 + scale) + shift


class MMDiT(nnx.Module):
    """The transformer of one config: float32 weights, computation in `config.dtype`."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        d_in, dtype = config.in_channels * PATCH**2, config.dtype
        self.patches = linear(d_in, config.width, (None, "embed"), dtype=dtype, rngs=rngs)
        self.time = TimeEmbedding(config, rngs=rngs)
        self.texts = nnx.List(
            [TextProjection(config, width, rngs=rngs) for width in config.text_widths]
        )

        def blocks(block, depth):
            return stack(lambda rngs: block(config, rngs=rngs), depth, rngs=rngs)

        depths = {MMDiTBlock: config.mmdit_depth, SharedBlock: config.depth - config.mmdit_depth}
        self.blocks = nnx.List([blocks(block, depth) for block, depth in depths.items() if depth])
        self.output = Output(config, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "B N in"],
        grid: Int[Array, "B 3"],
        lengths: Int[Array, "B"],
        time: Float[Array, "B"],
        texts: tuple[Float[Array, "B _ _"], ...],
    ) -> Float[Array, "B N out"]:
        """Return the prediction for every token, in `config.dtype`.

        `tokens` come from `patchify`; each has 4 x in_channels values, and padding at the end makes
        N of them. For each row, `grid` gives the latent frames, token rows and token columns, and
        `lengths` the number of real tokens; padded tokens do not influence others. `time` is 0 to
        1000. `texts` are the states of each text encoder. Raises ValueError for shapes that do not
        fit the config or the current mesh.
        """
        video, text, time = self.embed(tokens, time, texts)
        check_rows(tokens=tokens, grid=grid, lengths=lengths)
        features = self.features(video, text, time, grid, lengths)
        last, dtype = self.output.linear, self.config.dtype
        (out,) = by_device(
            lambda last, x: (last(x),), last, (features,), (STREAM,), (STREAM,), dtype=dtype
        )
        return out

    def embed(
        self,
        tokens: Float[Array, "B N in"],
        time: Float[Array, "B"],
        texts: tuple[Float[Array, "B _ _"], ...],
    ) -> tuple[Video, Text, Time]:
        """Return the inputs of the first block: video tokens, text tokens, time embedding."""
        config = self.config
        check_tokens(tokens, time, texts, config.in_channels, config.text_widths)
        check_mesh(*tokens.shape[:2], config.heads)

        def enter(weights, tokens, time, *texts):
            patches, embed_time, projections = weights
            text = [project(text) for project, text in zip(projections, texts, strict=True)]
            tokens = patches(tokens.astype(self.config.dtype))
            return tokens, jnp.concatenate(text, axis=1), embed_time(time)

        whole = ("batch", None, None)
        return by_device(
            enter,
            (self.patches, self.time, self.texts),
            (tokens, time, *texts),
            (STREAM, ("batch",), *[whole] * len(texts)),
            (STREAM, whole, ("batch", None)),
            dtype=self.config.dtype,
        )

    def features(
        self,
        video: Video,
        text: Text,
        time: Time,
        grid: Int[Array, "B 3"],
        lengths: Int[Array, "B"],
    ) -> Video:
        """Return the input of the last layer, `output.linear`."""
        config, mesh = self.config, jax.sharding.get_abstract_mesh()
        axis, num_text = token_axis(mesh, video.shape[0]), text.shape[1]
        if axis is not None:  # devices also hold equal parts of the text
            text = jnp.pad(text, ((0, 0), (0, -num_text % mesh.shape[axis]), (0, 0)))
        angles = rotary_angles(grid, video.shape[1], config.head_width)

        def attend_and_mix(block, video, text, time, cos, sin, lengths):
            return block(video, text, time, (cos, sin), lengths, num_text=num_text, axis=axis)

        def run(block, streams):
            inputs = *streams, time, *angles, lengths
            names = STREAM, STREAM, ("batch", None), STREAM, STREAM, ("batch",)
            return by_device(
                attend_and_mix, block, inputs, names, (STREAM, STREAM), dtype=config.dtype
            )

        for blocks in self.blocks:
            video, text = scan_blocks(
                run, (video, text), blocks, save=config.kept, offload=config.offload
            )
        (out,) = by_device(
            lambda output, video, time: (output.modulated(video, time),),
            self.output,
            (video, time),
            (STREAM, ("batch", None)),
            (STREAM,),
            dtype=config.dtype,
        )
        return out


def patchify(latents: Float[Array, "B T h w C"]) -> Float[Array, "B N patch_C"]:
    """Return tokens in (t, y, x) order; inside a token the channel varies slowest."""
    return rearrange(latents, "B T (gh ph) (gw pw) C -> B (T gh gw) (C ph pw)", ph=PATCH, pw=PATCH)


def unpatchify(
    tokens: Float[Array | np.ndarray, "B N patch_C"], grid: tuple[int, int, int]
) -> Float[Array | np.ndarray, "B T h w C"]:
    """Return the latents of tokens without padding: the inverse of `patchify`, of JAX or NumPy."""
    T, gh, gw = grid
    split = "B (T gh gw) (C ph pw) -> B T (gh ph) (gw pw) C"
    return rearrange(tokens, split, T=T, gh=gh, gw=gw, ph=PATCH, pw=PATCH)
