"""Encoder folders in transformers' layout (config.json, model.safetensors), read and written.

Each encoder lists its tensors in a `NAMES` table: path in our module -> transformers' name, with
`{}` for the layer. Kernels are transposed, layers are stacked; no torch is involved.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  teaches numpy the bfloat16 of released files
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file


def read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {folder} is not a folder of a text encoder")
    return json.loads(path.read_text("utf-8"))


def config_from(cls, values: Mapping):
    """The dataclass `cls` from a config.json, whose keys its fields are named after."""
    names = {field.name for field in fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def load(abstract: nnx.Module, folder: Path, names: Mapping[str, str], prefixes=("",)):
    """The module shaped like `abstract` with the weights of `folder`, as float32 numpy arrays.

    Some files put a name such as `bert.` before every tensor: `prefixes` lists what to strip.
    """
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118  not a mapping
                prefix = next(p for p in (*prefixes, "") if key.startswith(p))
                tensors[key.removeprefix(prefix)] = np.float32(file.get_tensor(key))
    problems = []

    def fetch(path, leaf):
        name, transpose = _look_up(path, names)
        layers = [name.format(i) for i in range(leaf.shape[0])] if "{}" in name else [name]
        missing = [layer for layer in layers if layer not in tensors]
        if missing:
            problems.append(f"{missing[0]} is missing")
            return leaf
        found = [tensors[layer].T if transpose else tensors[layer] for layer in layers]
        value = np.stack(found) if "{}" in name else found[0]
        if value.shape != leaf.shape:
            problems.append(f"{name} has shape {value.shape}, config.json asks for {leaf.shape}")
        return value

    model = jax.tree_util.tree_map_with_path(fetch, abstract)
    if problems:
        raise ValueError(f"{folder}: weights do not fit: {'; '.join(problems)}")
    return model


def save(model: nnx.Module, folder: Path, names: Mapping[str, str], config: Mapping) -> None:
    """Write `model` so that transformers, or `load`, reads it back."""
    tensors = {}
    for path, value in jax.tree_util.tree_leaves_with_path(model):
        (name, transpose), value = _look_up(path, names), np.asarray(value)
        for i, layer in enumerate(value if "{}" in name else value[None]):
            tensors[name.format(i)] = np.ascontiguousarray(layer.T if transpose else layer)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps({**config, **asdict(model.config)}, indent=2)
    (folder / "config.json").write_text(text, "utf-8")


def _look_up(path, names: Mapping[str, str]) -> tuple[str, bool]:
    """transformers' name of the variable at `path`, and whether it is stored transposed."""
    *parts, _ = (key.name for key in path)  # the last key is the variable's value
    return names[".".join(parts)], parts[-1] == "kernel"
