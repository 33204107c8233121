"""Low-rank adapters beside dense layers (LoRA, Hu et al. 2021, arXiv 2106.09685).

An adapter adds `scale * (x @ down) @ up` to the output of its layer. The layer's own weights stay
as they are, so they can be frozen, in bfloat16 or in 8-bit integers, and shared by many adapters.
Adapters of stacked blocks are stacked too: `down` is (layers, in, rank), `up` (layers, rank, out).
Their in and out axes have the names of the kernel's axes, so the table in sharding.py splits them.
"""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from easyanimate_jax.facts import check_fields
from easyanimate_jax.models.layers import Linear, axes, linears

# The layer of the input channels is left out, as in the reference, where it is a convolution. So
# one adapter fits the text-to-video, inpainting and control models of the same size.
LEFT_OUT = ("patches",)
GROUPS = {"all": "*", "attention": "blocks.*.attention.*", "mlp": "blocks.*.mlp.*"}


@dataclass(frozen=True)
class LoRAConfig:
    """The adapters that a run trains; the default alpha and targets are the reference's."""

    rank: int = 0
    """Rank of every adapter: the width between `down` and `up`; the reference's is 128. 0 makes no
    adapters and trains all weights."""

    alpha: float = 64.0
    """Strength of the adapters: their product is multiplied by alpha / rank."""

    targets: tuple[str, ...] = ("all",)
    """Layers with an adapter: "all", "attention", "mlp", or patterns of names such as
    "blocks.*.video.attention.q". Every entry must match a layer."""

    exclude: tuple[str, ...] = ()
    """Groups or patterns of layers that get no adapter although `targets` names them."""

    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank), which suits high ranks (arXiv 2312.03732)."""

    dropout: float = 0.0
    """Share of each adapter's rank that is left out of an update, drawn anew for every update."""

    def __post_init__(self):
        check_fields(self, rank="[0, 4096]", alpha="(0, inf)", dropout="[0, 1)")
        if not self.targets:
            raise ValueError('LoRAConfig: targets=(): name at least one layer, or use ("all",)')

    @property
    def scale(self) -> float:
        """Return the factor of an adapter's product."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class Adapter(nnx.Module):
    """The two matrices beside the kernel of a layer, and the factor of their product."""

    def __init__(
        self,
        layer: Linear,
        down: Float[Array, "*layers in rank"],
        up: Float[Array, "*layers rank out"],
        scale: float,
    ):
        *stack, name_in, name_out = layer.kernel.get_metadata()["out_sharding"]
        self.scale, self.dtype = scale, layer.dtype
        self.down = nnx.Param(down, **axes(*stack, name_in, None))
        self.up = nnx.Param(up, **axes(*stack, None, name_out))

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        down, up = (w.get_value().astype(self.dtype) for w in (self.down, self.up))
        return self.scale * ((x.astype(self.dtype) @ down) @ up)


def attach(model: nnx.Module, config: LoRAConfig, *, key: PRNGKeyArray) -> None:
    """Put a new adapter beside every target layer of a real or abstract module.

    Its product is zero, as in the reference: `down` is random, `up` is zero. Raises ValueError,
    which lists the layers' names, for a target that matches none.
    """
    layers = dict(linears(model))
    for number, name in enumerate(chosen(layers, config)):
        *stack, d_in, d_out = layers[name].kernel.get_value().shape
        bound = d_in**-0.5  # the reference's Kaiming uniform with a = sqrt(5)
        shape = (*stack, d_in, config.rank)
        key_of_layer = jax.random.fold_in(key, number)
        down = jax.random.uniform(key_of_layer, shape, minval=-bound, maxval=bound)
        up = jnp.zeros((*stack, config.rank, d_out))
        layers[name].adapter = Adapter(layers[name], down, up, config.scale)


def fill(model: nnx.Module, start: Mapping[str, tuple[Array, Array]]) -> None:
    """Give new adapters the product of others, {layer: (down, up)} of a rank that is not larger.

    The rest of each rank stays new, so it is trained too. The factor of the product is in `up`.
    """
    layers = dict(linears(model))
    for name, (down, up) in start.items():
        adapter, rank = layers[name].adapter, down.shape[-1]
        values = adapter.down.get_value(), adapter.up.get_value()
        adapter.down.set_value(values[0].at[..., :rank].set(down))
        adapter.up.set_value(values[1].at[..., :rank, :].set(up / adapter.scale))


def chosen(names: Mapping, config: LoRAConfig) -> list[str]:
    """Return the names of the layers that get an adapter, sorted.

    Raises ValueError for an entry of `targets` or `exclude` that matches no layer.
    """

    def matching(entry):
        found = fnmatch.filter(names, GROUPS.get(entry, entry))
        if not found:
            raise ValueError(
                f"LoRAConfig: {entry!r} matches no dense layer; the layers are "
                f"{', '.join(sorted(names))}; groups are {', '.join(GROUPS)}"
            )
        return set(found)

    wanted = set().union(*map(matching, config.targets))
    left_out = set(LEFT_OUT).union(*map(matching, config.exclude))
    if not wanted - left_out:
        raise ValueError(
            f"LoRAConfig: targets {config.targets} without exclude {config.exclude} and "
            f"{LEFT_OUT} leave no layer"
        )
    return sorted(wanted - left_out)


def is_adapter(path: tuple, _) -> bool:
    """Return whether the variable at a path belongs to an adapter; a filter for `nnx.split`."""
    return "adapter" in path


def without_some(adapters, key: PRNGKeyArray, dropout: float):
    """Return adapters of which the share `dropout` of the ranks is zero and the rest is scaled up.

    Every layer of every module has its own draw. Rows of a batch share it, so the result depends on
    neither the mesh nor the microbatch.
    """

    if not dropout:
        return adapters
    leaves, structure = jax.tree_util.tree_flatten_with_path(adapters)
    dropped = []
    for number, (path, leaf) in enumerate(leaves):
        if path[-2].key == "up":
            shape = *leaf.shape[:-1], 1
            kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - dropout, shape)
            leaf = leaf * kept / (1 - dropout)
        dropped.append(leaf)
    return jax.tree.unflatten(structure, dropped)
