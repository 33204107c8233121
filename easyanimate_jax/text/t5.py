"""The encoder of T5 v1.1 and mT5, the second text encoder of V5 (spec 5.1).

Its numbers equal those of transformers' T5EncoderModel: an RMSNorm before each part, a gated GELU,
one table of relative position biases for all layers, and unscaled attention logits. It loads and
saves folders of transformers.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from easyanimate_jax.facts import check_fields
from easyanimate_jax.models.layers import axes, linear, rms_norm, scan_blocks, spread, stack
from easyanimate_jax.sharding import shard
from easyanimate_jax.text import weights

States = Float[Array, "B L D"]


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5; the field names are those of transformers' config.json."""

    vocab_size: int
    """Number of tokens in the vocabulary."""

    d_model: int
    """Width of the states."""

    d_kv: int
    """Width of one attention head."""

    d_ff: int
    """Width inside the MLP."""

    num_layers: int
    """Number of blocks."""

    num_heads: int
    """Number of attention heads in a block."""

    relative_attention_num_buckets: int = 32
    """Number of buckets for the distances between tokens."""

    relative_attention_max_distance: int = 128
    """Distance in tokens; all distances from it on share one bucket."""

    layer_norm_epsilon: float = 1e-6
    """Number added to the mean square in RMS norms."""

    feed_forward_proj: str = "gated-gelu"
    """Kind of the MLP; only "gated-gelu" is supported."""

    def __post_init__(self):
        check_fields(
            self,
            vocab_size="[1, inf)",
            d_model="[1, inf)",
            d_kv="[1, inf)",
            d_ff="[1, inf)",
            num_layers="[1, inf)",
            num_heads="[1, inf)",
            relative_attention_num_buckets="[4, inf)",
            relative_attention_max_distance="[1, inf)",
            layer_norm_epsilon="(0, inf)",
        )
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(
                f"feed_forward_proj is {self.feed_forward_proj!r}; use T5 v1.1 or mT5, which have "
                f"'gated-gelu'"
            )


class T5Block(nnx.Module):
    """Self-attention and a gated MLP, each after an RMSNorm and added to its input."""

    def __init__(self, config: T5Config, *, dtype: str, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        D, inner, mlp = config.d_model, config.num_heads * config.d_kv, config.d_ff
        dense = lambda *a: linear(*a, use_bias=False, dtype=dtype, rngs=rngs)  # noqa: E731
        self.attention_norm = rms_norm(D, eps=config.layer_norm_epsilon, rngs=rngs)
        self.q = dense(D, inner, ("encoder width", "encoder inner"))
        self.q.kernel[...] *= config.d_kv**-0.5  # replaces the scale of the logits
        self.k = dense(D, inner, ("encoder width", "encoder inner"))
        self.v = dense(D, inner, ("encoder width", "encoder inner"))
        self.out = dense(inner, D, ("encoder inner", "encoder width"))
        self.mlp_norm = rms_norm(D, eps=config.layer_norm_epsilon, rngs=rngs)
        self.gate = dense(D, mlp, ("encoder width", "encoder inner"))
        self.up = dense(D, mlp, ("encoder width", "encoder inner"))
        self.down = dense(mlp, D, ("encoder inner", "encoder width"))

    def __call__(
        self, x: States, bias: Float[Array, "1 heads L L"], mask: Bool[Array, "B L"] | None
    ) -> States:
        y = self.attention_norm(x).astype(x.dtype)
        q, k, v = (
            rearrange(f(y), "B L (heads K) -> B L heads K", heads=self.num_heads)
            for f in (self.q, self.k, self.v)
        )
        mask = None if mask is None else mask[:, None, None]
        attended = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        x = x + self.out(rearrange(attended, "B L heads K -> B L (heads K)"))
        y = self.mlp_norm(x).astype(x.dtype)
        x = x + self.down(jax.nn.gelu(self.gate(y), approximate=True) * self.up(y))
        return shard(x, "batch", None, None)


class T5(nnx.Module):
    """The encoder: token ids to last hidden states in `dtype`.

    `mask` is True for real tokens. Released V5 passes no mask, so tokens also attend to padding
    (spec 5.1).
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.words = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_metadata=axes(None, "encoder width"),
            rngs=rngs,
        )
        self.distances = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            embedding_metadata=axes(None, "encoder inner"),
            rngs=rngs,
        )
        self.blocks = stack(
            lambda r: T5Block(config, dtype=dtype, rngs=r), config.num_layers, rngs=rngs
        )
        self.norm = rms_norm(config.d_model, eps=config.layer_norm_epsilon, rngs=rngs)

    def __call__(self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"] | None = None) -> States:
        buckets = relative_buckets(
            ids.shape[1],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        bias = rearrange(self.distances(buckets), "query key heads -> 1 heads query key")
        x = spread(self.words(ids).astype(self.dtype))
        x = scan_blocks(lambda block, x: block(x, bias.astype(x.dtype), mask), x, self.blocks)
        return self.norm(x).astype(self.dtype)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "L L"]:
    """Return the bucket of each (query, key) distance: exact if short, else logarithmic.

    Each sign of the distance has half of the buckets.
    """
    positions = np.arange(length)
    distance = positions[None, :] - positions[:, None]
    half = num_buckets // 2
    exact = half // 2
    near = np.abs(distance)
    # float32 as in the reference: near integers, rounding decides the bucket
    scale = np.float32(math.log(max_distance / exact))
    far = np.log(np.maximum(near, 1).astype(np.float32) / exact) / scale * (half - exact)
    far = np.minimum(exact + far.astype(np.int64), half - 1)
    return np.where(distance > 0, half, 0) + np.where(near < exact, near, far)


def _names() -> dict[str, str]:
    """Return transformers' name for each of our variables."""
    block = {
        "attention_norm.scale": "layer.0.layer_norm",
        "q.kernel": "layer.0.SelfAttention.q",
        "k.kernel": "layer.0.SelfAttention.k",
        "v.kernel": "layer.0.SelfAttention.v",
        "out.kernel": "layer.0.SelfAttention.o",
        "mlp_norm.scale": "layer.1.layer_norm",
        "gate.kernel": "layer.1.DenseReluDense.wi_0",
        "up.kernel": "layer.1.DenseReluDense.wi_1",
        "down.kernel": "layer.1.DenseReluDense.wo",
    }
    return {
        "words.embedding": "shared.weight",
        "distances.embedding": (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        "norm.scale": "encoder.final_layer_norm.weight",
        **{f"blocks.{o}": f"encoder.block.{{}}.{t}.weight" for o, t in block.items()},
    }


NAMES = _names()
UNUSED = ("decoder.", "lm_head.", "encoder.embed_tokens.")  # the last is `shared` again


def load_t5(folder: Path, *, dtype: str = "float32") -> T5:
    """Load the encoder from a transformers folder of T5 v1.1 or mT5, float32 weights.

    It computes in `dtype`. Raises ValueError that names missing files, tensors and config values.
    """
    config = weights.config_from(T5Config, weights.read_config(folder))
    abstract = jax.eval_shape(lambda: T5(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return weights.load(abstract, folder, NAMES, unused=UNUSED)


def save_t5(model: T5, folder: Path) -> None:
    """Write a folder that transformers' T5EncoderModel loads."""
    about = {"model_type": "t5", "architectures": ["T5EncoderModel"], "is_encoder_decoder": False}
    weights.save(model, folder, NAMES, about)
