"""The mesh and the one table that maps named axes to it.

Weights and activations name their axes where they are made (`models/layers.py`); only this file
knows which mesh axis a name means. A new strategy is a new row, or a new mesh shape.
"""

import math
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": None,
    "embed": ("fsdp", "context"),  # context devices hold their share of the weights too
    "heads": "tensor",
    "mlp": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "tokens": "context",
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; `fsdp=-1` takes every device the other axes leave."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """The mesh shape on `num_devices` devices. Raises ValueError where they do not divide."""
        given = self.data * self.context * self.tensor
        fsdp = num_devices // given if self.fsdp == -1 else self.fsdp
        if given * fsdp != num_devices:
            raise ValueError(
                f"{self} asks for {given} x fsdp devices, and there are {num_devices}. "
                f"Choose data, context and tensor whose product divides {num_devices}."
            )
        return (self.data, fsdp, self.context, self.tensor)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh with axes `MESH_AXES`, in Auto mode: XLA inserts the collectives."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation; a no-op when no mesh is set, so models run anywhere."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def spec(*axes: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions have these names."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def num_parts(axis: str) -> int:
    """Into how many shards the current mesh splits an activation axis."""
    names = RULES[axis]
    names = (names,) if isinstance(names, str) else names
    return math.prod(jax.sharding.get_abstract_mesh().shape.get(name, 1) for name in names)


def batch_sharding(mesh: Mesh, ndim: int, batch_dim: int = 0) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(*[None] * batch_dim, RULES["batch"]))


def shardings(mesh: Mesh, tree):
    """NamedShardings for a tree of annotated NNX variables (abstract or real).

    A leaf without axis names is replicated. Raises ValueError, naming every weight that the mesh
    does not divide, before XLA would.
    """
    problems = []

    def place(path, leaf):
        axes = getattr(leaf, "out_sharding", None) if hasattr(leaf, "get_metadata") else None
        value = leaf.get_value() if hasattr(leaf, "get_value") else leaf
        if not axes:
            return NamedSharding(mesh, PartitionSpec())
        partition = spec(*axes)
        for size, names in zip(np.shape(value), partition, strict=True):
            names = (names,) if isinstance(names, str) else names or ()
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                problems.append(
                    f"{jax.tree_util.keystr(path)} has shape {np.shape(value)}: {size} does not "
                    f"split into {parts} shards over mesh axes {names}"
                )
        return NamedSharding(mesh, partition)

    is_variable = lambda x: hasattr(x, "get_metadata")  # noqa: E731
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.tree.map(lambda _: place(path, leaf), leaf),
        tree,
        is_leaf=is_variable,
    )
    if problems:
        raise ValueError(
            "; ".join(problems) + ". Change the mesh in the config, or the rule in sharding.py."
        )
    return placed
