"""LoRA files and a transformer: adapters for a model, merged weights, and files of trained ones.

In the model, the matrices of equal layers of all blocks are stacked: `down` is (layers, in, rank),
`up` is (layers, rank, out). A layer that a file does not name has zeros there.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from easyanimate_jax.models.layers import linears
from easyanimate_jax.models.lora import Adapter, LoRAConfig, chosen
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.sharding import shardings
from easyanimate_jax.storage.stores import Place, place
from easyanimate_jax.weights import files
from easyanimate_jax.weights.defaults import Defaults, of_run
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.lora import LoRA, Pair, read
from easyanimate_jax.weights.mmdit_table import dense_layers
from easyanimate_jax.weights.module import abstract

logger = logging.getLogger(__name__)

MULTIPLE = 16  # of the rank in a model, so that other files seldom need another program
RELEASED = {(48, 48): "12B", (36, 18): "7B"}  # blocks, blocks with text weights (spec 1.1)


class Weighted(NamedTuple):
    """A LoRA, the factor of its product, and its name in messages."""

    lora: LoRA
    weight: float
    name: str


def named_weight(text: str) -> tuple[str, float]:
    """Return (path, weight) of FILE or FILE:WEIGHT; without one the weight is 1."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0


def open_loras(wanted: Iterable[tuple[str | Place, float]]) -> list[Weighted]:
    """Read LoRA files, given as (path, weight).

    Raises ValueError as `lora.read` does, and for a weight that is not finite.
    """
    loras = []
    for path, weight in wanted:
        if not math.isfinite(weight):
            raise ValueError(f"{path} has weight {weight}; give a number such as 0.8")
        path = place(path)
        loras.append(Weighted(read(path), weight, str(path)))
    return loras


def stacked(loras: Sequence[Weighted], config: MMDiTConfig) -> dict[str, tuple]:
    """Return {our layer: (down, up)}, float32 and stacked, whose product is that of all LoRAs.

    `up` includes the weights and alpha / rank. The ranks of several LoRAs are put side by side.
    Raises ValueError, which lists all layers that the model lacks or that have another width.
    """
    check(loras, config)
    shapes, names = _shapes(config), dense_layers(config)
    used = {name for one in loras for name in one.lora.pairs}
    return {
        ours: _side_by_side(loras, theirs, shapes[ours], ours.startswith("blocks."))
        for ours, theirs in names.items()
        if used.intersection(theirs)
    }


def check(loras: Sequence[Weighted], config: MMDiTConfig) -> None:
    """Raise ValueError, which lists all misfits, for LoRAs that are not for a model of `config`."""
    problems: list[str] = []
    shapes = _shapes(config)
    places = {name: ours for ours, theirs in dense_layers(config).items() for name in theirs}
    for one in loras:
        problems += _misfits(one, config, places, shapes)
    files.raise_all("the LoRA does not fit the model", problems)


def _shapes(config: MMDiTConfig) -> dict[str, tuple[int, int]]:
    """Return {our dense layer: (in, out)}."""
    layers = linears(abstract(MMDiT, config))
    return {name: layer.kernel.get_value().shape[-2:] for name, layer in layers}


def _misfits(one: Weighted, config: MMDiTConfig, places: Mapping, shapes: Mapping) -> list[str]:
    blocks = [int(n.split(".")[1]) for n in one.lora.pairs if n.startswith("transformer_blocks.")]
    texts = [
        int(name.split(".")[1])
        for name in one.lora.pairs
        if ".attn2." in name or ".txt_ff." in name
    ]
    size = (max(blocks, default=-1) + 1, max(texts, default=-1) + 1)
    here = (config.depth, config.mmdit_depth)
    if size != here and size in RELEASED and here in RELEASED:
        return [f"{one.name} is for a model of {RELEASED[size]}, and this one is {RELEASED[here]}"]
    problems = []
    for name, pair in one.lora.pairs.items():
        if name not in places:
            problems.append(f"{one.name} changes {name}, which this model does not have")
            continue
        d_in, d_out = shapes[places[name]]
        found = pair.down.shape[1], pair.up.shape[0]
        if found != (d_in, d_out):
            problems.append(
                f"{one.name} changes {name} from {found[0]} to {found[1]} values, and the layer "
                f"of this model goes from {d_in} to {d_out}"
            )
    return problems


def _side_by_side(loras, theirs: Sequence[str], shape: tuple[int, int], is_stacked: bool) -> tuple:
    """Return (down, up) of one of our layers from the pairs of all LoRAs."""
    parts = [
        [(one.lora.pairs[n], one.weight) for one in loras if n in one.lora.pairs] for n in theirs
    ]
    most = max(sum(pair.rank for pair, _ in layer) for layer in parts)
    rank = -(-most // MULTIPLE) * MULTIPLE
    down = np.zeros((len(theirs), shape[0], rank), np.float32)
    up = np.zeros((len(theirs), rank, shape[1]), np.float32)
    for number, layer in enumerate(parts):
        first = 0
        for pair, weight in layer:
            part = slice(first, first + pair.rank)
            down[number, :, part] = pair.down.astype(np.float32).T
            scale = np.float32(weight * pair.alpha / pair.rank)
            up[number, part] = scale * pair.up.astype(np.float32).T
            first += pair.rank
    return (down, up) if is_stacked else (down[0], up[0])


def add(model: MMDiT, loras: Sequence[Weighted], *, mesh: Mesh | None = None) -> None:
    """Put the adapters of LoRAs beside the layers of a model. Raises ValueError as `stacked`.

    A LoRA of weight 0 is checked and left out, so that the model keeps its bits.
    """
    check(loras, model.config)
    used = [one for one in loras if one.weight]
    arrays, layers = stacked(used, model.config), dict(linears(model))
    for name, (down, up) in arrays.items():
        adapter = Adapter(layers[name], jnp.asarray(down), jnp.asarray(up), 1.0)
        if mesh is not None:
            adapter = jax.device_put(adapter, shardings(mesh, adapter))
        layers[name].adapter = adapter
    for one in loras:
        logger.info("%s", summary(one))


def to_continue(
    path: str | Place, config: MMDiTConfig, lora: LoRAConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {our layer: (down, up)} of a LoRA file from which a run trains on.

    Raises ValueError for a file that does not fit the model, that changes a layer without an
    adapter, or whose rank is above that of `lora`.
    """
    (one,) = open_loras([(path, 1.0)])
    arrays = stacked([one], config)
    most = max(pair.rank for pair in one.lora.pairs.values())
    if most > lora.rank:
        raise ValueError(
            f"init_lora: {path} has rank {most}, and lora.rank is {lora.rank}: use {most} or more"
        )
    trained = chosen(dict(linears(abstract(MMDiT, config))), lora)
    if others := sorted(set(arrays) - set(trained)):
        raise ValueError(
            f"init_lora: {path} also changes {', '.join(others)}: name these layers in lora.targets"
        )
    return {name: (down[..., :most], up[..., :most, :]) for name, (down, up) in arrays.items()}


def summary(one: Weighted) -> str:
    """Return one line on a LoRA that is used: its layers, ranks and weight."""
    ranks = sorted({pair.rank for pair in one.lora.pairs.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{one.name}: {len(one.lora.pairs)} layers, {rank}, weight {one.weight:g}"


def merged(
    tensors: Mapping[str, Tensor], config: MMDiTConfig, loras: Sequence[Weighted]
) -> dict[str, Tensor]:
    """Return a transformer's weights, by our names, with LoRAs added to the kernels.

    The sum is made in float32 and rounded once, when a tensor is read. Raises ValueError as
    `stacked` does.
    """
    changed = dict(tensors)
    for name, (down, up) in stacked(loras, config).items():
        key = f"{name}.kernel"
        changed[key] = _sum(tensors[key], down, up)
    return changed


def _sum(kernel: Tensor, down: np.ndarray, up: np.ndarray) -> Tensor:
    def read(box):
        *stack, rows, columns = box
        product = down[(*stack, rows)] @ up[(*stack, slice(None), columns)]
        return (kernel.read(box).astype(np.float32) + product).astype(kernel.dtype)

    return Tensor(kernel.shape, kernel.dtype, read)


def of_training(tensors: Mapping[str, Tensor], config: MMDiTConfig, meta: Mapping) -> LoRA:
    """Return the LoRA of a checkpoint of adapters; `meta` is the checkpoint's metadata.

    `tensors` are its arrays, named such as `time.up.adapter.down`.
    """
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in meta["config"]["lora"].items()
        if name != "class"
    }
    lora, pairs = LoRAConfig(**fields), {}
    for ours, theirs in dense_layers(config).items():
        if f"{ours}.adapter.down" not in tensors:
            continue
        down, up = (tensors[f"{ours}.adapter.{part}"].read() for part in ("down", "up"))
        for number, name in enumerate(theirs):
            layer = (number,) if ours.startswith("blocks.") else ()
            pairs[name] = Pair(down[layer].T, up[layer].T, lora.scale * lora.rank)
    sampling = {"sampling": own._asdict()} if (own := of_run(meta)) != Defaults() else {}
    told = {
        "ss_base_model_version": f"easyanimate_v5{'.1' if config.text_norm else ''}",
        "ss_steps": str(meta["step"]),
        "ss_seed": str(meta["seed"]),
        "ss_learning_rate": str(meta["config"]["stages"][-1]["learning_rate"]),
        "ss_output_name": Path(meta["config"]["run"]).name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": Path(meta["config"]["run"]).name,
        "modelspec.architecture": "easyanimate/lora",
        "easyanimate_jax": json.dumps(
            {
                "base": meta["base"],
                "init": Path(meta["config"]["init"]).name,
                "depth": config.depth,
                "mmdit_depth": config.mmdit_depth,
                "text_norm": config.text_norm,
                "lora": fields,
                "step": meta["step"],
                **sampling,
            }
        ),
    }
    return LoRA(pairs, told)
