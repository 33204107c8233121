"""The language model of Qwen2-VL, the text encoder of V5.1 (spec 5.2): ids to penultimate states.

Its numbers equal transformers' hidden_states[-2]: the input of the last layer, without a final
norm. The last layer, the vision tower and the head are not loaded. For text the three position
axes of M-RoPE are equal, so M-RoPE is plain RoPE, and folders of Qwen2 load as well.
"""

from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from easyanimate_jax.facts import check_fields
from easyanimate_jax.models.layers import axes, linear, rms_norm, scan_blocks, spread, stack
from easyanimate_jax.sharding import shard
from easyanimate_jax.text import weights

States = Float[Array, "B L D"]
Angles = tuple[Float[Array, "B L half"], Float[Array, "B L half"]]  # cosines, sines; half: K / 2

PAD_POSITION = 1  # of padded tokens, as in transformers before 5, which V5.1 was trained with
PREFIXES = ("language_model.",)  # after `model.`, which all versions of transformers may write
UNUSED = ("visual.", "lm_head.", "norm.")  # vision tower; head and norm follow the last layer


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes of a Qwen2; the field names are those of transformers' config.json."""

    vocab_size: int
    """Number of tokens in the vocabulary."""

    hidden_size: int
    """Width of the states, a multiple of twice `num_attention_heads`."""

    intermediate_size: int
    """Width inside the MLP."""

    num_hidden_layers: int
    """Number of blocks in the file, 2 or more; the last one is not used (spec 5.2)."""

    num_attention_heads: int
    """Number of query heads in a block."""

    num_key_value_heads: int
    """Number of key and value heads in a block; groups of query heads share one."""

    rms_norm_eps: float
    """Number added to the mean square in RMS norms."""

    rope_theta: float
    """Base of the wavelengths of the rotary angles."""

    hidden_act: str = "silu"
    """Activation of the MLP; only "silu" is supported."""

    use_sliding_window: bool = False
    """Attention within a sliding window; only False is supported."""

    def __post_init__(self):
        check_fields(
            self,
            vocab_size="[1, inf)",
            hidden_size="[1, inf)",
            intermediate_size="[1, inf)",
            num_hidden_layers="[1, inf)",
            num_attention_heads="[1, inf)",
            num_key_value_heads="[1, inf)",
            rms_norm_eps="(0, inf)",
            rope_theta="(0, inf)",
        )
        if self.hidden_act != "silu" or self.use_sliding_window:
            raise ValueError(
                f"hidden_act is {self.hidden_act!r} and use_sliding_window is "
                f"{self.use_sliding_window}; use a model with 'silu' and False, such as Qwen2-VL"
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} "
                f"heads of even width; use a num_attention_heads whose double divides it"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} keys "
                f"evenly; use a num_key_value_heads that divides {self.num_attention_heads}"
            )
        if self.num_hidden_layers < 2:
            raise ValueError(
                f"Qwen2Config.num_hidden_layers is {self.num_hidden_layers}: penultimate states "
                f"want 2 or more"
            )

    @property
    def head_width(self) -> int:
        """Return the width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class Qwen2Block(nnx.Module):
    """Grouped-query attention and a gated MLP, each after an RMSNorm and added to its input."""

    def __init__(self, config: Qwen2Config, *, dtype: str, rngs: nnx.Rngs):
        self.head_width = config.head_width
        D, mlp = config.hidden_size, config.intermediate_size
        # Keys are split over `tensor` like queries. If `tensor` is larger than the number of key
        # heads, the split cuts heads and XLA moves data. A mesh that divides both is faster.
        keys = config.num_key_value_heads * config.head_width
        dense = partial(linear, dtype=dtype, rngs=rngs)
        self.attention_norm = rms_norm(D, eps=config.rms_norm_eps, rngs=rngs)
        self.q = dense(D, D, ("encoder width", "encoder inner"))
        self.k = dense(D, keys, ("encoder width", "encoder inner"))
        self.v = dense(D, keys, ("encoder width", "encoder inner"))
        self.out = dense(D, D, ("encoder inner", "encoder width"), use_bias=False)
        self.mlp_norm = rms_norm(D, eps=config.rms_norm_eps, rngs=rngs)
        self.gate = dense(D, mlp, ("encoder width", "encoder inner"), use_bias=False)
        self.up = dense(D, mlp, ("encoder width", "encoder inner"), use_bias=False)
        self.down = dense(mlp, D, ("encoder inner", "encoder width"), use_bias=False)

    def __call__(self, x: States, angles: Angles, mask: Bool[Array, "B 1 L L"]) -> States:
        y = self.attention_norm(x).astype(x.dtype)
        q, k, v = (
            rearrange(f(y), "B L (heads K) -> B L heads K", K=self.head_width)
            for f in (self.q, self.k, self.v)
        )
        q, k = rotate(q, angles), rotate(k, angles)
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask)
        x = x + self.out(rearrange(attended, "B L heads K -> B L (heads K)"))
        y = self.mlp_norm(x).astype(x.dtype)
        x = x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))
        return shard(x, "batch", None, None)


class Qwen2(nnx.Module):
    """The encoder: token ids and numbers of real tokens to penultimate states in `dtype`.

    The tokens of a row after its `lengths` are padding. All of them get position 1 and attend to
    the real tokens only, so their states are equal. The diffusion transformer reads padding
    unmasked, and it was trained with these states.
    """

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs, dtype: str = "float32"):
        self.config, self.dtype = config, dtype
        self.words = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_metadata=axes(None, "encoder width"),
            rngs=rngs,
        )
        self.blocks = stack(
            lambda r: Qwen2Block(config, dtype=dtype, rngs=r),
            config.num_hidden_layers - 1,
            rngs=rngs,
        )

    def __call__(self, ids: Int[Array, "B L"], lengths: Int[Array, "B"]) -> States:
        place = jnp.arange(ids.shape[1])
        real = place[None] < lengths[:, None]
        positions = jnp.where(real, place[None], PAD_POSITION)
        angles = rotary_angles(positions, self.config.head_width, self.config.rope_theta)
        causal = place[:, None] >= place[None]
        mask = causal[None, None] & real[:, None, None]
        x = spread(self.words(ids).astype(self.dtype))
        return scan_blocks(lambda block, x: block(x, angles, mask), x, self.blocks)


def rotary_angles(positions: Int[Array, "B L"], head_width: int, theta: float) -> Angles:
    """Return the cosines and sines of each token's K / 2 angles, float32."""
    frequencies = np.float32(theta) ** (-np.arange(0, head_width, 2, dtype=np.float32) / head_width)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B L heads K"], angles: Angles) -> Float[Array, "B L heads K"]:
    """Rotate each pair (x[j], x[j + K / 2]) by angle j in float32; return the dtype of `x`."""
    cos, sin = (a[:, :, None] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _names() -> dict[str, str]:
    """Return transformers' name for each of our variables."""
    dense = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    return {
        "words.embedding": "embed_tokens.weight",
        **{f"blocks.{o}.kernel": f"layers.{{}}.{t}.weight" for o, t in dense.items()},
        **{f"blocks.{o}.bias": f"layers.{{}}.{dense[o]}.bias" for o in "qkv"},
        **{f"blocks.{o}.scale": f"layers.{{}}.{t}.weight" for o, t in norms.items()},
    }


NAMES = _names()


def load_qwen2(folder: Path, *, dtype: str = "float32") -> Qwen2:
    """Load the language model from a folder of Qwen2-VL or Qwen2, of any transformers version.

    Weights are float32; it computes in `dtype`. Raises ValueError that names what does not fit.
    """
    config = read_qwen2_config(folder)
    abstract = jax.eval_shape(lambda: Qwen2(config, dtype=dtype, rngs=nnx.Rngs(0)))
    unused = (*UNUSED, f"layers.{config.num_hidden_layers - 1}.")
    return weights.load(abstract, folder, NAMES, prefixes=PREFIXES, unused=unused)


def read_qwen2_config(folder: Path) -> Qwen2Config:
    """Read a config.json that is flat (before transformers 4.52) or nested.

    Raises ValueError for missing values and for rotary embeddings with another scaling.
    """
    values = weights.read_config(folder)
    values = {**values, **(values.get("text_config") or {})}
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ValueError(
            f"{folder}/config.json asks for {kind!r} rotary embeddings; use the released Qwen2-VL, "
            f"which has the default ones"
        )
    values = {**values, **rope}
    required = [field.name for field in fields(Qwen2Config) if field.default is MISSING]
    missing = [name for name in required if values.get(name) is None]
    if missing:
        raise ValueError(
            f"{folder}/config.json has no {', '.join(missing)}; give the folder of a Qwen2-VL or "
            f"Qwen2 model"
        )
    return weights.config_from(Qwen2Config, values)
