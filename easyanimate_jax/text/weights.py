"""Read and write folders of text encoders as transformers does: config.json, model.safetensors.

Each encoder has a table `NAMES` from its variables to transformers' names, with `{}` for the number
of the layer. Loading transposes kernels and stacks layers. It does not need torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from flax import nnx

from easyanimate_jax.weights import files
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.module import named_weights, shapes_of, with_weights
from easyanimate_jax.weights.prefixes import unwrapped
from easyanimate_jax.weights.table import Rule, Table, to_ours, to_theirs


def read_config(folder: Path) -> dict:
    """Return the values of a folder's config.json. Raises ValueError if the file is missing."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: {folder} is not a folder of a text encoder; give one that "
            f"transformers saved"
        )
    return json.loads(path.read_text("utf-8"))


def config_from(cls, values: Mapping):
    """Return the dataclass `cls` from the values of a config.json, which may hold other keys."""
    names = {field.name for field in fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def load(
    abstract: nnx.Module,
    folder: Path,
    names: Mapping[str, str],
    prefixes: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
):
    """Return a module like `abstract` with the weights of `folder`, as float32 NumPy arrays.

    Some files put a prefix such as `bert.` before every name; `prefixes` lists those to strip.
    `unused` are the beginnings of the names of tensors that the encoder does not need: heads,
    poolers, other towers. Raises one ValueError that names all tensors that are missing, that do
    not fit, or that are not known.
    """
    problems, tensors = [], {}
    for name, tensor in unwrapped(files.open_weights(folder, problems), problems).items():
        prefix = next(p for p in (*prefixes, "") if name.startswith(p))
        tensors[name.removeprefix(prefix)] = tensor
    shapes = shapes_of(abstract)
    rules = table(shapes, names)
    wanted = {name for rule in rules.values() for name in rule.names}
    theirs = {name: tensor for name, tensor in tensors.items() if name in wanted}
    unknown = [n for n in tensors if n not in wanted and not n.startswith(unused)]
    if unknown:
        kind = type(abstract).__name__
        problems.append(
            f"it holds {len(unknown)} tensors that are not {kind}'s (the first is {unknown[0]}): "
            f"give the folder of a {kind}, with the config.json that names all of its layers"
        )
    ours = to_ours(files.checked(theirs, problems, "float32"), rules, shapes, problems)
    files.raise_all(f"{folder}: weights do not fit", problems)
    model = with_weights(abstract, lambda name, _: ours[name].read())
    files.raise_all(f"{folder}: weights cannot be used", problems)
    return model


def save(model: nnx.Module, folder: Path, names: Mapping[str, str], config: Mapping) -> None:
    """Write `model` to a folder that transformers and `load` can read."""
    ours = {name: Tensor.of(value) for name, value in named_weights(model).items()}
    theirs = to_theirs(ours, table(shapes_of(model), names))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_file(folder / "model.safetensors", theirs, {"format": "pt"})
    text = json.dumps({**config, **asdict(model.config)}, indent=2)
    (folder / "config.json").write_text(text, "utf-8")


def table(shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> Table:
    """Return the conversion rules of an encoder: names with `{}` have one tensor per layer."""
    rules = {}
    for ours, shape in shapes.items():
        theirs, stacked = names[ours], "{}" in names[ours]
        layers = tuple(theirs.format(i) for i in range(shape[0])) if stacked else (theirs,)
        rules[ours] = Rule(layers, (1, 0) if ours.endswith(".kernel") else (), stacked=stacked)
    return rules
