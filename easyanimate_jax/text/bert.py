"""Bert, the first text encoder of V5 (spec 5.1): token ids to the last hidden states.

Its numbers equal those of transformers' BertModel without the pooler. It loads and saves folders
of transformers.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from easyanimate_jax.facts import check_fields
from easyanimate_jax.models.layers import axes, layer_norm, linear, scan_blocks, spread, stack
from easyanimate_jax.sharding import shard
from easyanimate_jax.text import weights

States = Float[Array, "B L D"]


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a Bert; the field names are those of transformers' config.json."""

    vocab_size: int
    """Number of tokens in the vocabulary."""

    hidden_size: int
    """Width of the states, a multiple of `num_attention_heads`."""

    num_hidden_layers: int
    """Number of blocks."""

    num_attention_heads: int
    """Number of attention heads in a block."""

    intermediate_size: int
    """Width inside the MLP."""

    max_position_embeddings: int
    """Largest number of tokens in a prompt."""

    type_vocab_size: int = 2
    """Number of token types; only the first is used."""

    layer_norm_eps: float = 1e-12
    """Number added to the variance in LayerNorms."""

    hidden_act: str = "gelu"
    """Activation of the MLP; only "gelu" is supported."""

    def __post_init__(self):
        check_fields(
            self,
            vocab_size="[1, inf)",
            hidden_size="[1, inf)",
            num_hidden_layers="[1, inf)",
            num_attention_heads="[1, inf)",
            intermediate_size="[1, inf)",
            max_position_embeddings="[1, inf)",
            type_vocab_size="[1, inf)",
            layer_norm_eps="(0, inf)",
        )
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}; use a Bert with 'gelu'")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} "
                f"heads; use a num_attention_heads that divides it"
            )


class BertBlock(nnx.Module):
    """Self-attention and an MLP, each added to its input before a LayerNorm."""

    def __init__(self, config: BertConfig, *, dtype: str, rngs: nnx.Rngs):
        self.num_heads = config.num_attention_heads
        D, mlp = config.hidden_size, config.intermediate_size
        self.q = linear(D, D, ("encoder width", "encoder inner"), dtype=dtype, rngs=rngs)
        self.k = linear(D, D, ("encoder width", "encoder inner"), dtype=dtype, rngs=rngs)
        self.v = linear(D, D, ("encoder width", "encoder inner"), dtype=dtype, rngs=rngs)
        self.out = linear(D, D, ("encoder inner", "encoder width"), dtype=dtype, rngs=rngs)
        self.attention_norm = layer_norm(D, eps=config.layer_norm_eps, rngs=rngs)
        self.up = linear(D, mlp, ("encoder width", "encoder inner"), dtype=dtype, rngs=rngs)
        self.down = linear(mlp, D, ("encoder inner", "encoder width"), dtype=dtype, rngs=rngs)
        self.mlp_norm = layer_norm(D, eps=config.layer_norm_eps, rngs=rngs)

    def __call__(self, x: States, mask: Bool[Array, "B L"] | None) -> States:
        q, k, v = (
            rearrange(f(x), "B L (heads K) -> B L heads K", heads=self.num_heads)
            for f in (self.q, self.k, self.v)
        )
        mask = None if mask is None else mask[:, None, None]
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask)
        attended = self.out(rearrange(attended, "B L heads K -> B L (heads K)"))
        x = self.attention_norm(x + attended).astype(x.dtype)
        mlp = self.down(jax.nn.gelu(self.up(x), approximate=False))
        return shard(self.mlp_norm(x + mlp).astype(x.dtype), "batch", None, None)


class Bert(nnx.Module):
    """The encoder: token ids to last hidden states in `dtype`.

    `mask` is True for real tokens. Released V5 passes no mask, so tokens also attend to padding
    (spec 5.1).
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        embed = lambda rows: nnx.Embed(  # noqa: E731
            rows, config.hidden_size, embedding_metadata=axes(None, "encoder width"), rngs=rngs
        )
        self.words = embed(config.vocab_size)
        self.positions = embed(config.max_position_embeddings)
        self.types = embed(config.type_vocab_size)
        self.norm = layer_norm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs)
        self.blocks = stack(
            lambda r: BertBlock(config, dtype=dtype, rngs=r), config.num_hidden_layers, rngs=rngs
        )

    def __call__(self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"] | None = None) -> States:
        positions = self.positions(jnp.arange(ids.shape[1]))[None]
        x = self.words(ids) + positions + self.types(jnp.zeros_like(ids))
        x = self.norm(spread(x)).astype(self.dtype)
        return scan_blocks(lambda block, x: block(x, mask), x, self.blocks)


def _names() -> dict[str, str]:
    """Return transformers' name for each of our variables."""
    dense = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "out": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    }
    norms = {
        "norm": "embeddings.LayerNorm",
        "blocks.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "blocks.mlp_norm": "encoder.layer.{}.output.LayerNorm",
    }
    return {
        "words.embedding": "embeddings.word_embeddings.weight",
        "positions.embedding": "embeddings.position_embeddings.weight",
        "types.embedding": "embeddings.token_type_embeddings.weight",
        **{f"{ours}.scale": f"{theirs}.weight" for ours, theirs in norms.items()},
        **{f"{ours}.bias": f"{theirs}.bias" for ours, theirs in norms.items()},
        **{f"blocks.{o}.kernel": f"encoder.layer.{{}}.{t}.weight" for o, t in dense.items()},
        **{f"blocks.{o}.bias": f"encoder.layer.{{}}.{t}.bias" for o, t in dense.items()},
    }


NAMES = _names()
# The pooler, the heads of pretraining and of classifiers, and a table that old files store.
UNUSED = ("pooler.", "cls.", "classifier.", "embeddings.position_ids")


def load_bert(folder: Path, *, dtype: str = "float32") -> Bert:
    """Load a Bert from a transformers folder, float32 weights, computation in `dtype`.

    Raises ValueError that names missing files, tensors and config values.
    """
    config = weights.config_from(BertConfig, weights.read_config(folder))
    abstract = jax.eval_shape(lambda: Bert(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return weights.load(abstract, folder, NAMES, prefixes=("bert.",), unused=UNUSED)


def save_bert(model: Bert, folder: Path) -> None:
    """Write a folder that transformers' BertModel loads."""
    about = {"model_type": "bert", "architectures": ["BertModel"], "pad_token_id": 0}
    weights.save(model, folder, NAMES, about)
