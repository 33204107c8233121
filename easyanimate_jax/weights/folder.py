"""Load a transformer or a VAE from disk in any supported layout.

Supported are PyTorch weights in the original's and in diffusers' layout (files and folders), our
own folders (`config.json` with a class, `weights.safetensors`), whole pipelines that have such
folders as `transformer` and `vae`, and folders of training runs.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from jax.sharding import Mesh

from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.models.storage import Kernels
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.weights import adapters, files, mmdit_table, run_folder, vae_table
from easyanimate_jax.weights.at_hand import at_hand
from easyanimate_jax.weights.identity import weights_print
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.module import CONFIG, WEIGHTS, abstract, fill, misfits, without_removed
from easyanimate_jax.weights.prefixes import unwrapped

logger = logging.getLogger(__name__)

Weights = Literal["ema", "raw"]

KINDS: dict[str, ModuleType] = {"transformer": mmdit_table, "vae": vae_table}


class Model(NamedTuple):
    """A config, its weights by our names, and LoRAs; the weights are not read yet."""

    config: MMDiTConfig | VAEConfig
    tensors: dict[str, Tensor]
    loras: tuple[adapters.Weighted, ...] = ()


def load_mmdit(
    path: str | Place,
    *,
    dtype: str | None = None,
    kernels: Kernels = "float32",
    mesh: Mesh | None = None,
    in_channels: int | None = None,
    weights: Weights = "ema",
    step: int | None = None,
    allow_pickle: bool = False,
    loras: Sequence[adapters.Weighted] = (),
) -> MMDiT:
    """Return the transformer of a file, a folder of any layout, or a run.

    A file or folder may be in a store: `gs://BUCKET/NAME`, `s3://BUCKET/NAME`.

    `dtype` is the compute dtype; None keeps the config's, which is bfloat16 for foreign weights.
    `kernels` is the dtype in which kernels are stored; "int8" stores those of the blocks, which
    cannot be trained then. With a mesh, each device reads only its own shard. `in_channels` adapts
    the patch embedding to another task (spec 2.9) and logs the changes. `weights` and `step` select
    a checkpoint of a run. `allow_pickle` permits torch's own files. `loras` are put beside the
    layers (`weights.adapters.open_loras`). Raises ValueError listing all problems.
    """
    problems, options = [], {"weights": weights, "step": step}
    model = open_model(path, "transformer", problems, allow_pickle=allow_pickle, **options)
    files.raise_all(path, problems)
    model = _widened(model, in_channels)
    loaded = _load(MMDiT, model, problems, dtype, kernels, mesh)
    adapters.add(loaded, (*model.loras, *loras), mesh=mesh)
    return loaded


def load_start(
    path: str | Place,
    config: MMDiTConfig,
    *,
    mesh: Mesh,
    step: int | None = None,
    kernels: Kernels = "float32",
    exact: Sequence[str] = (),
) -> MMDiT:
    """Return the transformer of `path` for a training of `config` that starts from it.

    `config` replaces the one that is found with the weights, which must fit it; the input channels
    are adapted (spec 2.9), and adapters of the path are added to its kernels. `kernels` is the
    storage of the kernels, except of those that a pattern of `exact` matches. Raises ValueError as
    `load_mmdit` does.
    """
    problems = []
    model = open_model(path, "transformer", problems, step=step)
    files.raise_all(path, problems)
    model = _widened(model, config.in_channels)
    faults = misfits(model.tensors, abstract(MMDiT, config))
    files.raise_all(f"{path} does not fit {config}", faults)
    merged = adapters.merged(model.tensors, model.config, model.loras)
    empty = abstract(MMDiT, config)
    return fill(empty, merged, problems, kernels=kernels, exact=exact, mesh=mesh)


def _widened(model: Model, in_channels: int | None) -> Model:
    """Return the model with so many input channels, and log what changed."""
    if in_channels is None or in_channels == model.config.in_channels:
        return model
    config, tensors, lines = mmdit_table.widen(model.tensors, model.config, in_channels)
    for line in lines:
        logger.info(line)
    return model._replace(config=config, tensors=tensors)


def load_vae(
    path: str | Place,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    allow_pickle: bool = False,
) -> CausalVAE:
    """Return the VAE of a file, a folder of any layout, or a run.

    The options and errors are those of `load_mmdit`.
    """
    problems = []
    model = open_model(path, "vae", problems, allow_pickle=allow_pickle)
    files.raise_all(path, problems)
    return _load(CausalVAE, model, problems, dtype, "float32", mesh)


def vae_config(path: str | Place) -> VAEConfig:
    """Return the config of the VAE of a file or folder. Raises ValueError as `load_vae` does."""
    problems = []
    model = open_model(path, "vae", problems)
    files.raise_all(path, problems)
    return model.config


def _load(model_class, model: Model, problems, dtype, kernels: Kernels, mesh):
    config = dataclasses.replace(model.config, dtype=dtype) if dtype else model.config
    module = abstract(model_class, config)
    return fill(module, model.tensors, problems, kernels=kernels, mesh=mesh)


def open_model(
    path: str | Place,
    name: Literal["transformer", "vae"],
    problems: list[str],
    *,
    dtype: str | None = None,
    weights: Weights = "ema",
    step: int | None = None,
    allow_pickle: bool = False,
    memory: files.Memory | None = None,
) -> Model | None:
    """Return the model `name` of a file or folder; weights are cast to `dtype` when they are read.

    A folder in a store is copied first (`weights.at_hand`). Faults are added to `problems`, now or
    during reading. Returns None if nothing can be read.
    """
    path = at_hand(path, name)
    if run_folder.is_run(path):
        if name == "vae":
            _, meta = run_folder.read_meta(path, step)
            vae = run_folder.frozen_model(path, meta["config"], "vae")
            return open_model(vae, name, problems, dtype=dtype)
        meta, tensors = run_folder.open_transformer(path, weights, step)
        if meta.get("base"):
            return _open_partial_run(path, meta, tensors, problems, dtype)
        fields = meta["config"]["model"] | {"in_channels": meta["in_channels"]}
        tensors = files.checked(tensors, problems, dtype)
        return _ours(MMDiT, _config(MMDiTConfig, fields), tensors, problems)
    if (path / name).is_dir():
        path = path / name
    if not path.exists():
        problems.append(f"{path} does not exist")
        return None
    fields = read_json(path / CONFIG, problems) if (path / CONFIG).is_file() else {}
    found = len(problems)
    own = "class" in fields
    where = path / WEIGHTS if own and (path / WEIGHTS).is_file() else path
    tensors = files.open_weights(where, problems, allow_pickle, memory)
    tensors = tensors if own else unwrapped(tensors, problems, name)
    if len(problems) > found:
        return None
    tensors = files.checked(tensors, problems, dtype)
    kind = KINDS[name]
    wanted = kind.MODEL_CLASS.__name__ if own else kind.FOREIGN_CLASS
    says = fields.get("class", fields.get("_class_name", wanted))
    if says != wanted:
        problems.append(f"{path} holds a {says}; wanted a {wanted}")
        return None
    try:
        if own:
            return _ours(kind.MODEL_CLASS, _config(kind.CONFIG_CLASS, fields), tensors, problems)
        return Model(*kind.from_torch(tensors, problems, fields))
    except ValueError as error:  # the tensors or fields give no valid config
        problems.append(str(error))
        return None


def _open_partial_run(
    path: Place, meta: Mapping, tensors: Mapping[str, Tensor], problems: list[str], dtype
) -> Model | None:
    """Return the model that a run started from, with its trained weights and its adapters."""
    init = run_folder.frozen_model(path, meta["config"], "init")
    base = open_model(init, "transformer", problems, dtype=dtype, step=meta["config"]["init_step"])
    if base is None:
        problems.append(f"{path} was trained beside the weights of {init}: put them there")
        return None
    if weights_print(init, meta["config"]["init_step"]) != meta["base"]:
        problems.append(
            f"{init} holds other weights than those beside which {path} was trained; their "
            f"fingerprint is not {meta['base']}: put the right ones there"
        )
        return None
    config, weights = base.config, base.tensors
    if config.in_channels != meta["in_channels"]:
        config, weights, _ = mmdit_table.widen(weights, config, meta["in_channels"])
    weights = adapters.merged(weights, config, base.loras)  # as at the start of the run
    own = {name: x for name, x in tensors.items() if "adapter" not in name.split(".")}
    weights |= files.checked(own, problems, dtype)
    if len(own) == len(tensors):
        return Model(config, weights)
    lora = adapters.of_training(tensors, config, meta)
    return Model(config, weights, (adapters.Weighted(lora, 1.0, str(path)),))


def read_json(path: Path, problems: list[str]) -> dict:
    """Return the JSON object in a file; on a fault return {} and add it to `problems`."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        problems.append(f"{path} cannot be read as JSON: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} holds a {type(value).__name__}, not an object")
        return {}
    return value


def _config(config_class: type, fields: Mapping):
    """Return a config from its JSON. Raises ValueError for unknown or missing fields."""
    fields = without_removed(config_class.__name__, fields)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "class"}
    known = [field.name for field in dataclasses.fields(config_class)]
    needed = [f.name for f in dataclasses.fields(config_class) if f.default is dataclasses.MISSING]
    faults = [f"{name!r} is not known" for name in fields if name not in known]
    faults += [f"{name!r} is missing" for name in needed if name not in fields]
    if faults:
        raise ValueError(f"{CONFIG} does not fit {config_class.__name__}: {', '.join(faults)}")
    return config_class(**fields)


def _ours(model_class: type, config, tensors: Mapping[str, Tensor], problems: list[str]) -> Model:
    problems += misfits(tensors, abstract(model_class, config))
    return Model(config, dict(tensors))
