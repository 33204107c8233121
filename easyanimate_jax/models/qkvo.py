"""The joint attention of a block: its four projections for each stream, and norms of heads."""

from functools import partial

from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as name
from jaxtyping import Array, Float, Int

from easyanimate_jax.models.attention import fused_attention, is_fused, joint_attention
from easyanimate_jax.models.heads import HeadNorm
from easyanimate_jax.models.layers import layer_norm, linear
from easyanimate_jax.models.rope import Angles, rotate

Video = Float[Array, "B N D"]
Text = Float[Array, "B L D"]

QK_NORM_EPS = 1e-6  # independent of the config's norm_eps (spec 2.4)


class QKVO(nnx.Module):
    """The four projections of an attention, and the norms of queries and keys (spec 2.4)."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        D, K = config.width, config.head_width
        dense = partial(linear, dtype=config.dtype, products=config.products, rngs=rngs)
        self.head_width = K
        self.q, self.k, self.v = (dense(D, D, ("embed", "heads")) for _ in range(3))
        self.out = dense(D, D, ("heads", "embed"))
        self.q_norm = layer_norm(K, eps=QK_NORM_EPS, rngs=rngs)
        self.k_norm = layer_norm(K, eps=QK_NORM_EPS, rngs=rngs)

    def projections(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], ...]:
        """Return the inputs of the norms of queries and keys, and the values.

        The inputs are named, and not the results: the backward pass of a norm needs its input.
        """
        return tuple(name(f(x), "qkv") for f in (self.q, self.k, self.v))

    def qkv(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S heads K"], ...]:
        """Return normalised queries, normalised keys and values."""
        q, k, v = (
            rearrange(x, "B S (heads K) -> B S heads K", K=self.head_width)
            for x in self.projections(x)
        )
        return self.q_norm(q).astype(q.dtype), self.k_norm(k).astype(k.dtype), v

    def project(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Apply the output projection to heads side by side."""
        return name(self.out(x), "attention out")


def attend(
    video_weights: QKVO,
    text_weights: QKVO,
    video: Video,
    text: Text,
    angles: Angles,
    lengths: Int[Array, "B"],
    num_text: int,
    axis: str | None,
) -> tuple[Video, Text]:
    """Let video and text attend to [text, video]; only video has rotary positions."""
    if is_fused(video.shape[1], video.shape[2] // video_weights.head_width, axis):
        weights = video_weights, text_weights
        norms = tuple(
            tuple(HeadNorm(n.scale.get_value(), n.bias.get_value()) for n in norms)
            for norms in zip(*((w.q_norm, w.k_norm) for w in weights), strict=True)
        )
        projections = video_weights.projections(video), text_weights.projections(text)
        options = {"num_text": num_text, "axis": axis, "eps": QK_NORM_EPS}
        video, text = fused_attention(*projections, norms, angles, lengths, **options)
        return video_weights.project(video), text_weights.project(text)
    q, k, v = video_weights.qkv(video)
    q, k = rotate(q, angles), rotate(k, angles)
    t_q, t_k, t_v = text_weights.qkv(text)
    text, video = (
        rearrange(x, "B S heads K -> B S (heads K)")
        for x in joint_attention(
            (t_q, q), (t_k, k), (t_v, v), lengths, num_text=num_text, axis=axis
        )
    )
    return video_weights.project(video), text_weights.project(text)
