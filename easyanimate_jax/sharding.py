"""The mesh and the one table that maps named axes to it.

Weights and activations name their axes where they are made (`models/layers.py`); only this file
knows which mesh axis a name means. A new strategy is a new row, or a new mesh shape.

`shardings(mesh, model)` gives the sharding of every weight, and refuses a mesh that does not divide
one. Flax's own `nnx.get_named_sharding(model, mesh)` gives the same where it knows the table:

    with nnx.logical_axis_rules(tuple(RULES.items())):
        nnx.get_named_sharding(model, mesh)

`jax.experimental.mesh_utils` is used because `jax.make_mesh` takes neither several slices nor an
axis that is part of a torus direction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from easyanimate_jax.facts import MESH_AXES, check_fields

AnyMesh = Mesh | AbstractMesh  # the latter of devices that need not be there

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Weights are split over both of their dimensions, so that gathering them stays an all-gather
    # and summing their gradients a reduce-scatter: over one long axis that spans all directions
    # of a torus the TPU compiler makes an all-reduce of them.
    "layers": None,
    "embed": "fsdp",
    "heads": ("context", "tensor"),
    "mlp": ("context", "tensor"),
    # weights of the text encoders, which XLA gathers by itself: split over the width alone
    "encoder width": ("fsdp", "context"),
    "encoder inner": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "tokens": "context",
    "picture": MESH_AXES,  # rows or columns of pixels, where the VAE has a video to itself
}
ALL_ROWS = ("data", "fsdp", "context")  # over these the devices hold different samples or tokens


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices."""

    data: int = 1
    """Devices that hold copies of the weights and different rows; the only axis that may cross the
    network between TPU slices."""

    fsdp: int = -1
    """Devices that share out the weights and hold different rows; -1 takes every device that the
    other axes leave."""

    context: int = 1
    """Devices that share out the tokens of a row, or rows where there are enough of them."""

    tensor: int = 1
    """Devices that share out the heads of attention and the columns of the MLP."""

    def __post_init__(self):
        check_fields(
            self, data="[1, inf)", fsdp="-1 or [1, inf)", context="[1, inf)", tensor="[1, inf)"
        )

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """The mesh shape on `num_devices` devices. Raises ValueError where they do not divide."""
        given = self.data * self.context * self.tensor
        if min(self.data, self.context, self.tensor) < 1 or (self.fsdp < 1 and self.fsdp != -1):
            raise ValueError(f"{self}: an axis has 1 device or more; fsdp=-1 takes those left.")
        if self.fsdp == -1 and num_devices % given:
            raise ValueError(
                f"{self} asks for {given} x fsdp devices, and there are {num_devices}. "
                f"Choose data, context and tensor whose product divides {num_devices}."
            )
        fsdp = num_devices // given if self.fsdp == -1 else self.fsdp
        if given * fsdp != num_devices:
            raise ValueError(
                f"{self} asks for {given * fsdp} devices, and there are {num_devices}. "
                f"Choose axes whose product is {num_devices}, or fsdp=-1 for those that are left."
            )
        return (self.data, fsdp, self.context, self.tensor)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh with axes `MESH_AXES`, in Auto mode: XLA inserts the collectives.

    Devices of several TPU slices are laid out so that only `data` crosses the slow network between
    slices. Raises ValueError where `data` is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    auto = (AxisType.Auto,) * len(MESH_AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        # An axis that no direction of the torus fits, such as 8 of 16x16, takes part of one.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=auto)
    if shape[0] % num_slices:
        raise ValueError(
            f"{config} has data={shape[0]} on {num_slices} slices: only `data` may cross slices; "
            f"use a multiple of {num_slices}."
        )
    inside = (shape[0] // num_slices, *shape[1:])
    across = (num_slices, *(1,) * (len(shape) - 1))
    grid = mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )
    return Mesh(grid, MESH_AXES, axis_types=auto)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation; a no-op without a mesh, so models run anywhere, and on a device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(mesh, x.shape, axes))


def spec(*axes: str | None) -> PartitionSpec:
    """The partition of a weight whose dimensions have these names."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def activation_spec(mesh, shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """The partition of an activation of this shape whose dimensions have these names.

    Rows go over `context` too where there are enough of them; then tokens stay whole, and attention
    needs no exchange. With fewer rows `context` splits the tokens.
    """
    rules = RULES
    if "batch" in axes and token_axis(mesh, shape[list(axes).index("batch")]) is None:
        rules = RULES | {"batch": ALL_ROWS, "tokens": None}
    return PartitionSpec(*(rules[axis] if axis else None for axis in axes))


def token_axis(mesh, rows: int) -> str | None:
    """The mesh axis that splits the tokens of `rows` rows; None where devices have them whole."""
    if mesh.empty or rows % math.prod(mesh.shape[name] for name in ALL_ROWS) == 0:
        return None
    return "context"


def by_device(run, weights, activations: tuple, axes: tuple, outputs: tuple, *, dtype):
    """`run(weights, *activations)` as the program of one device, on its rows and its tokens.

    `axes` names the dimensions of every activation, `outputs` those of every result. `run` sees the
    weights gathered, in `dtype`; their gradients are summed in `dtype` and split as the weights
    are. Only the mesh axis `tensor` is left to XLA.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(weights, *activations)
    rows = activations[0].shape[:1]

    def place(names):
        return activation_spec(mesh, rows, names)

    def names_of(variable):
        names = variable.get_metadata()["out_sharding"]
        return names[-variable.get_value().ndim :]  # a scan takes the axis "layers" away

    def manual(names):
        return PartitionSpec(*(_manual(RULES[name]) if name else None for name in names))

    def gather(variable):
        value = variable.get_value()
        names = names_of(variable)
        if any(names):
            value = value.astype(dtype)
        dims = {_manual(RULES[name]): dim for dim, name in enumerate(names) if name}
        for axis in ("context", "fsdp"):  # the bulk last: `fsdp` spans more torus directions
            if axis in dims:
                value = _all_gather(value, axis, dims[axis])
        return variable.replace(value)

    specs = jax.tree.map(
        lambda v: jax.tree.map(lambda _: manual(names_of(v)), v), weights, is_leaf=is_variable
    )
    return jax.shard_map(
        lambda weights, *xs: run(jax.tree.map(gather, weights, is_leaf=is_variable), *xs),
        in_specs=(specs, *map(place, axes)),
        out_specs=tuple(map(place, outputs)),
        axis_names=set(ALL_ROWS),
        check_vma=False,
    )(weights, *activations)


def _all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Over a leading dimension: of the transpose over another the compiler made an all-reduce."""
    parts = jnp.moveaxis(jax.lax.all_gather(x, axis), 0, dim)
    return parts.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def platform() -> str:
    """Of the mesh's devices, which may not be there; without a mesh of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def _manual(names: str | tuple[str, ...]) -> str | None:
    """Of a weight's mesh axes the one that `by_device` gathers."""
    names = (names,) if isinstance(names, str) else names
    return next((name for name in names if name in ALL_ROWS), None)


def is_variable(x) -> bool:
    """Whether a node of a tree is an annotated NNX variable."""
    return hasattr(x, "get_metadata")


def num_parts(axis: str) -> int:
    """Into how many shards the current mesh splits an activation axis."""
    names = RULES[axis]
    names = (names,) if isinstance(names, str) else names
    return math.prod(jax.sharding.get_abstract_mesh().shape.get(name, 1) for name in names)


def batch_sharding(mesh: Mesh, ndim: int, batch_dim: int = 0) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(*[None] * batch_dim, RULES["batch"]))


def shardings(mesh: AnyMesh, tree):
    """NamedShardings for a tree of annotated NNX variables (abstract or real).

    A leaf without axis names is replicated. Raises ValueError, naming every weight that the mesh
    does not divide, before XLA would.
    """
    problems = []

    def place(path, leaf):
        axes = getattr(leaf, "out_sharding", None) if is_variable(leaf) else None
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
