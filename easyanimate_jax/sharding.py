"""The mesh and the one table that maps named axes to it.

The code that creates weights and activations names their axes (`models/layers.py`). Only this file
maps a name to mesh axes. A new strategy is a new row of the table, or a new mesh shape.

`shardings(mesh, model)` returns the sharding of every weight, and raises an error if the mesh does
not divide one. Flax's `nnx.get_named_sharding(model, mesh)` returns the same with this table:

    with nnx.logical_axis_rules(tuple(RULES.items())):
        nnx.get_named_sharding(model, mesh)
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from easyanimate_jax.facts import MESH_AXES, check_fields

AnyMesh = Mesh | AbstractMesh  # an AbstractMesh describes devices that need not exist

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Weights are split over both dimensions. XLA then gathers them with all-gathers and sums their
    # gradients with reduce-scatters. For one long axis over all directions of a torus, the TPU
    # compiler uses slower all-reduces instead.
    "layers": None,
    "embed": "fsdp",
    "heads": ("context", "tensor"),
    "mlp": ("context", "tensor"),
    # weights of the text encoders, which XLA gathers without `by_device`
    "encoder width": ("fsdp", "context"),
    "encoder inner": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "tokens": "context",
    "picture": MESH_AXES,  # rows or columns of pixels, when all devices process one video
}
ALL_ROWS = ("data", "fsdp", "context")  # along these, devices hold different rows or tokens


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; their product is the number of all devices."""

    data: int = 1
    """Devices that each hold a copy of the weights and different rows of the batch. Only this axis
    may cross the network between TPU slices."""

    fsdp: int = -1
    """Devices that split the weights and hold different rows of the batch; -1 uses all devices that
    the other axes leave."""

    context: int = 1
    """Devices that split the tokens of a row, or the rows if there are enough."""

    tensor: int = 1
    """Devices that split the attention heads and the columns of the MLP."""

    def __post_init__(self):
        check_fields(
            self, data="[1, inf)", fsdp="-1 or [1, inf)", context="[1, inf)", tensor="[1, inf)"
        )

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """Return the mesh shape on `num_devices` devices, in the order of `MESH_AXES`.

        Raises ValueError if the axes do not give that number.
        """
        given = self.data * self.context * self.tensor
        if min(self.data, self.context, self.tensor) < 1 or (self.fsdp < 1 and self.fsdp != -1):
            raise ValueError(f"{self}: an axis has 1 device or more; use 1, or fsdp=-1.")
        if self.fsdp == -1 and num_devices % given:
            raise ValueError(
                f"{self} asks for {given} x fsdp devices, and there are {num_devices}. "
                f"Choose data, context and tensor whose product divides {num_devices}."
            )
        fsdp = num_devices // given if self.fsdp == -1 else self.fsdp
        if given * fsdp != num_devices:
            raise ValueError(
                f"{self} asks for {given * fsdp} devices, and there are {num_devices}. "
                f"Choose axes whose product is {num_devices}, or fsdp=-1 for the remaining devices."
            )
        return (self.data, fsdp, self.context, self.tensor)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Return a mesh with axes `MESH_AXES` in Auto mode, in which XLA inserts the collectives.

    With several TPU slices, only `data` crosses the slow network between slices. `mesh_utils` does
    this; `jax.make_mesh` supports neither several slices nor an axis along part of a torus
    direction. Raises ValueError if the axes do not fit the devices, or if `data` is not a multiple
    of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    auto = (AxisType.Auto,) * len(MESH_AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        # Splitting allows an axis along part of a torus direction, such as 8 devices of 16x16.
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
    """Constrain the sharding of an activation; do nothing without a mesh or inside `by_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(mesh, x.shape, axes))


def spec(*axes: str | None) -> PartitionSpec:
    """Return the partition of a weight whose dimensions have these names."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def activation_spec(mesh, shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """Return the partition of an activation with this shape and these names of its dimensions.

    If there are enough rows, `context` also splits the rows. Each device then has all tokens of its
    rows, and attention needs no exchange. With fewer rows `context` splits the tokens.
    """
    rules = RULES
    if "batch" in axes and token_axis(mesh, shape[list(axes).index("batch")]) is None:
        rules = RULES | {"batch": ALL_ROWS, "tokens": None}
    return PartitionSpec(*(rules[axis] if axis else None for axis in axes))


def token_axis(mesh, rows: int) -> str | None:
    """Return the mesh axis that splits the tokens of `rows` rows, or None if none splits them."""
    if mesh.empty or rows % math.prod(mesh.shape[name] for name in ALL_ROWS) == 0:
        return None
    return "context"


def by_device(run, weights, activations: tuple, axes: tuple, outputs: tuple, *, dtype):
    """Run `run(weights, *activations)` on each device for its own rows and tokens.

    `axes` names the dimensions of every activation, `outputs` those of every result. `run` receives
    gathered weights in `dtype`; their gradients are summed in `dtype` and split like the weights.
    XLA handles only the mesh axis `tensor`. Returns a tuple of results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(weights, *activations)
    rows = activations[0].shape[:1]

    def place(names):
        return activation_spec(mesh, rows, names)

    def names_of(variable):
        names = variable.get_metadata()["out_sharding"]
        return names[-variable.get_value().ndim :]  # a scan removes the axis "layers"

    def manual(names):
        return PartitionSpec(*(_manual(RULES[name]) if name else None for name in names))

    def gather(variable):
        value = variable.get_value()
        names = names_of(variable)
        if any(names) and jnp.issubdtype(value.dtype, jnp.floating):  # 8-bit integers stay small
            value = value.astype(dtype)
        dims = {_manual(RULES[name]): dim for dim, name in enumerate(names) if name}
        for axis in ("context", "fsdp"):  # most data last: `fsdp` spans more torus directions
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
    """Gather along `dim`, via a new first dimension; else the compiler sums with all-reduces."""
    parts = jnp.moveaxis(jax.lax.all_gather(x, axis), 0, dim)
    return parts.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def platform() -> str:
    """Return "tpu", "gpu" or "cpu": the platform of the mesh's devices, else the default one.

    The devices of an abstract mesh need not exist on this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str | None:
    """Return the kind of the mesh's devices, which need not exist; None without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "device_kind", None)


def _manual(names: str | tuple[str, ...]) -> str | None:
    """Return the one of a weight's mesh axes that `by_device` gathers, or None."""
    names = (names,) if isinstance(names, str) else names
    return next((name for name in names if name in ALL_ROWS), None)


def moved(tree, placed):
    """Return a tree of arrays with other shardings, over the same devices; its arrays are deleted.

    One array moves after the other, from device to device, so memory holds one tree and one array.
    The meshes of a TPU order its devices differently, which `jax.device_put` can do, and no program
    that takes one order and returns another. With equal orders `jax.device_put` would pass through
    the host if one process has all devices, and a program does not.
    """

    def move(x: jax.Array, to: NamedSharding) -> jax.Array:
        if x.sharding == to:
            return x
        if x.sharding.mesh.devices.ravel().tolist() == to.mesh.devices.ravel().tolist():
            there = jax.jit(_same, out_shardings=to, donate_argnums=0)(x)
        else:
            there = jax.device_put(x, to, donate=True)
        there = jax.block_until_ready(there)
        if not x.is_deleted():  # its part of a device has another size, so it was not donated
            x.delete()
        return there

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return jax.tree.map(move, tree, placed)


def _same(x):
    return x


def is_variable(x) -> bool:
    """Return True if a node of a tree is an annotated NNX variable."""
    return hasattr(x, "get_metadata")


def num_parts(axis: str) -> int:
    """Return the number of shards into which the current mesh splits an activation axis."""
    names = RULES[axis]
    names = (names,) if isinstance(names, str) else names
    return math.prod(jax.sharding.get_abstract_mesh().shape.get(name, 1) for name in names)


def batch_sharding(mesh: Mesh, ndim: int, batch_dim: int = 0) -> NamedSharding:
    """Return the sharding that splits dimension `batch_dim` over data and fsdp, and no other."""
    return NamedSharding(mesh, PartitionSpec(*[None] * batch_dim, RULES["batch"]))


def shardings(mesh: AnyMesh, tree):
    """Return NamedShardings for a tree of annotated NNX variables, abstract or real.

    A leaf without axis names is replicated. Raises one ValueError that names every weight that the
    mesh does not divide.
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
