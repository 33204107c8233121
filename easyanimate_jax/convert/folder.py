"""A model as a folder: `config.json` (class and config fields) and `weights.safetensors`.

Weights are keyed by their dotted path in the module, e.g. `encoder.conv_in.kernel`.
"""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from easyanimate_jax.models.vae import CausalVAE, VAEConfig


def flat_weights(module: nnx.Module) -> dict[str, np.ndarray]:
    """Dotted path -> array, for every weight of `module`."""
    flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(module)))
    return {".".join(map(str, path)): np.asarray(value) for path, value in flat.items()}


def build(model_class: type, config, weights: dict[str, np.ndarray]) -> nnx.Module:
    """`model_class(config)` with these weights. Raises ValueError listing all that do not fit."""
    module = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    state = nnx.state(module)
    wanted = nnx.traversals.flatten_mapping(nnx.to_pure_dict(state))
    names = {path: ".".join(map(str, path)) for path in wanted}
    problems = [f"{name} is missing" for name in names.values() if name not in weights]
    problems += [f"{name} is not known" for name in sorted(set(weights) - set(names.values()))]
    problems += [
        f"{names[path]} has shape {weights[names[path]].shape}, wanted {value.shape}"
        for path, value in wanted.items()
        if names[path] in weights and weights[names[path]].shape != value.shape
    ]
    if problems:
        raise ValueError(
            f"weights do not fit {model_class.__name__}: {'; '.join(problems)}. "
            f"Use the config that the weights were trained with: this one is {config}."
        )
    arrays = {path: jax.numpy.asarray(weights[name]) for path, name in names.items()}
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(arrays))
    nnx.update(module, state)
    return module


def save_module(folder: str | os.PathLike, module: nnx.Module) -> None:
    """Write `module` with its config; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(flat_weights(module), folder / "weights.safetensors.new")
    config = {"class": type(module).__name__, **dataclasses.asdict(module.config)}
    (folder / "config.json.new").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("weights.safetensors", "config.json"):
        os.replace(folder / f"{name}.new", folder / name)


def load_vae(folder: str | os.PathLike) -> CausalVAE:
    return _load(folder, CausalVAE, VAEConfig)


def load_mmdit(folder: str | os.PathLike):
    from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig

    return _load(folder, MMDiT, MMDiTConfig)


def _load(folder, model_class, config_class):
    folder = Path(folder)
    fields = json.loads((folder / "config.json").read_text())
    saved = fields.pop("class")
    if saved != model_class.__name__:
        raise ValueError(f"{folder} holds a {saved}; wanted a {model_class.__name__}.")
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    weights = load_file(folder / "weights.safetensors")
    return build(model_class, config_class(**fields), weights)
