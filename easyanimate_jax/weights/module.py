"""A module and its weights: named by dotted path, built on any mesh, saved to a folder.

A module folder holds `config.json` (class and config fields) and `weights.safetensors`, whose
tensors are named by their path in the module, for example `encoder.conv_in.kernel`.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from easyanimate_jax.facts import LATENT_CHANNELS, PATCH
from easyanimate_jax.models.storage import Kernels, quantized, store, stored_type
from easyanimate_jax.sharding import shardings
from easyanimate_jax.weights import files
from easyanimate_jax.weights.lazy import Tensor

WEIGHTS, CONFIG = "weights.safetensors", "config.json"
# Fields of earlier configs, and the only value that each supported. Their JSON still loads.
REMOVED = {
    "MMDiTConfig": {"patch": PATCH, "out_channels": LATENT_CHANNELS},
    "VAEConfig": {"latent_channels": LATENT_CHANNELS},
}


def without_removed(config_class: str, fields: Mapping) -> dict:
    """Return the fields of a config's JSON without those that its class no longer has.

    Raises ValueError, naming each field, if a removed field has an unsupported value.
    """
    removed = REMOVED.get(config_class, {})
    faults = [
        f"{name} is {fields[name]!r}, but only {value!r} was ever supported"
        for name, value in removed.items()
        if fields.get(name, value) != value
    ]
    if faults:
        raise ValueError(
            f"{config_class} of an earlier version: {', '.join(faults)}; use other weights, "
            f"because this version does not have these fields"
        )
    return {name: value for name, value in fields.items() if name not in removed}


def named_weights(module) -> dict:
    """Return dotted path -> array (or shape) for every weight of a real or abstract module."""
    leaves = jax.tree_util.tree_leaves_with_path(module)
    return {_name(path): leaf for path, leaf in leaves}


@cache
def abstract(model_class: type, config) -> nnx.Module:
    """Return `model_class(config)` with shapes in place of arrays."""
    return jax.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))


def shapes_of(module) -> dict[str, tuple[int, ...]]:
    """Return dotted path -> shape for every weight of a real or abstract module."""
    return {name: tuple(leaf.shape) for name, leaf in named_weights(module).items()}


def misfits(tensors: Mapping[str, Tensor], module) -> list[str]:
    """Return one line for each weight that is missing, has a wrong shape, or is not in `module`."""
    wanted = shapes_of(module)
    return [
        *(f"{name} is missing" for name in wanted if name not in tensors),
        *(f"{name} is not known" for name in sorted(set(tensors) - set(wanted))),
        *(
            f"{name} has shape {tensors[name].shape}, wanted {shape}"
            for name, shape in wanted.items()
            if name in tensors and tensors[name].shape != shape
        ),
    ]


def build(
    model_class: type,
    config,
    weights: Mapping[str, np.ndarray | Tensor],
    *,
    mesh: Mesh | None = None,
) -> nnx.Module:
    """Return `model_class(config)` with these weights. Raises ValueError listing all misfits."""
    module = abstract(model_class, config)
    tensors = {n: w if isinstance(w, Tensor) else Tensor.of(w) for n, w in weights.items()}
    problems = misfits(tensors, module)
    files.raise_all(
        f"weights do not fit {model_class.__name__}; use the config that they were trained with, "
        f"not {config}",
        problems,
    )
    return fill(module, tensors, problems, mesh=mesh)


def fill(
    module,
    tensors: Mapping[str, Tensor],
    problems: list[str],
    *,
    kernels: Kernels = "float32",
    exact: Sequence[str] = (),
    mesh: Mesh | None = None,
):
    """Return the abstract module with these weights, on the first device or sharded over a mesh.

    With a mesh, each device reads only its own shard from the files, so no host holds more than its
    share. `kernels` is the storage of the kernels, except of those that a pattern of `exact`
    matches; each becomes small before the next one is read. Reading may add to the list `problems`.
    Raises ValueError if that list is not empty at the end.
    """
    placed = iter(jax.tree.leaves(shardings(mesh, module)) if mesh is not None else ())

    def read(leaf, tensor):
        if mesh is not None:
            return jax.make_array_from_callback(leaf.shape, next(placed), tensor.read)
        # Not committed to a device, so that a jitted call may combine it with other arrays.
        return jnp.asarray(tensor.read())

    values = {}
    for name, leaf in named_weights(module).items():
        stored = stored_type(name, kernels, exact)
        if stored == "int8":
            layer = name.removesuffix("kernel")
            values[name], values[f"{layer}scale"] = quantized(read(leaf, tensors[name]))
        else:
            values[name] = read(leaf, tensors[name].astype(stored))
    if kernels == "int8":
        module = jax.eval_shape(partial(_stored, exact=exact), module)
    filled = with_weights(module, lambda name, _: values.pop(name))
    files.raise_all("the weights cannot be used", problems)
    if mesh is not None and kernels == "int8":
        filled = jax.device_put(filled, shardings(mesh, filled))
    return filled


def _stored(module, exact: Sequence[str]):
    store(module, "int8", exact)
    return module


def with_weights(module, value: Callable):
    """Return the module, abstract or not, with `value(name, weight)` for each weight, in order."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(module)
    return jax.tree.unflatten(structure, [value(_name(path), leaf) for path, leaf in leaves])


def save_module(folder: str | os.PathLike, module: nnx.Module) -> None:
    """Write `module` and its config to `folder`; a crash never leaves a partial file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: Tensor.of(value) for name, value in named_weights(module).items()}
    files.write_file(folder / f"{WEIGHTS}.new", tensors)
    (folder / f"{CONFIG}.new").write_text(config_text(type(module), module.config))
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / f"{name}.new", folder / name)


def config_text(model_class: type, config) -> str:
    """Return the text of config.json for a module."""
    fields = {"class": model_class.__name__, **dataclasses.asdict(config)}
    return json.dumps(fields, indent=2) + "\n"


def _name(path) -> str:
    keys = [str(next(getattr(k, a) for a in ("name", "key", "idx") if hasattr(k, a))) for k in path]
    return ".".join(keys[:-1])  # the last key is the variable's value
