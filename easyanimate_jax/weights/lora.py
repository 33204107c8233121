"""Read and write EasyAnimate's LoRA files (spec 11.1): kohya's names in two layouts, and ours.

Theirs: `lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`.
Ours: `blocks.0.video.attention.q.down` (layers, in, rank), `.up` (layers, rank, out) and `.alpha`
(layers,). The layers of one kind are stacked like the weights that they change; modules outside the
blocks have no leading `layers` dimension. A file may omit modules, but a module must have all three
tensors in all of its layers.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.weights import files
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.mmdit_table import MODEL, TEXTS, TO_DIFFUSERS, block_modules
from easyanimate_jax.weights.module import abstract, shapes_of
from easyanimate_jax.weights.table import Rule, Table, to_ours, to_theirs

Layout = Literal["original", "diffusers"]

PREFIX = "lora_unet__"  # the root module has no name, hence two underscores
PARTS = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"}
BLOCK = re.compile(PREFIX + r"transformer_blocks_(\d+)_(attn2_|txt_ff_)?")


class Target(NamedTuple):
    """The fields of a model's config that determine the names of its modules."""

    depth: int
    mmdit_depth: int
    text_norm: bool


def read(path: str | Path, config: MMDiTConfig) -> dict[str, np.ndarray]:
    """Read a LoRA file in either layout; return arrays by our names, for a model of `config`.

    Raises ValueError listing all tensors that do not fit.
    """
    problems = []
    theirs = files.checked(files.open_weights(Path(path), problems), problems)
    ours = from_torch(theirs, _target(config), problems)
    problems += _other_widths(ours, config)
    arrays = {name: tensor.read() for name, tensor in ours.items()}
    files.raise_all(path, problems)
    return arrays


def write(
    path: str | Path, arrays: Mapping[str, np.ndarray], config: MMDiTConfig, layout: Layout
) -> None:
    """Write arrays with our names as a LoRA file; the inverse of `read`."""
    ours = {name: Tensor.of(array) for name, array in arrays.items()}
    files.write_file(Path(path), to_torch(ours, _target(config), layout), {"format": "pt"})


def is_lora(names) -> bool:
    """Return True if the names are those of a LoRA file."""
    return any(name.startswith("lora_") for name in names)


def target_of(tensors: Mapping[str, Tensor]) -> Target:
    """Return the model that a file was made for, as far as its names show."""
    blocks = [m for m in map(BLOCK.match, _in_original_names(tensors)) if m]
    return Target(
        depth=1 + max((int(m[1]) for m in blocks), default=-1),
        mmdit_depth=1 + max((int(m[1]) for m in blocks if m[2]), default=-1),
        text_norm=any(name.startswith(f"{PREFIX}{text}_1.") for text in TEXTS for name in tensors),
    )


def from_torch(
    tensors: Mapping[str, Tensor], target: Target, problems: list[str]
) -> dict[str, Tensor]:
    """Convert a LoRA in either layout to ours; add all misfits to `problems`."""
    theirs, rules = _in_original_names(tensors), table(target)
    present = {
        name.rsplit(".", 1)[0]
        for name, rule in rules.items()
        if any(n in theirs for n in rule.names)
    }
    rules = {name: rule for name, rule in rules.items() if name.rsplit(".", 1)[0] in present}
    flat = [n for n, t in theirs.items() if n.endswith(".weight") and len(t.shape) != 2]
    problems += [f"{name} has shape {theirs[name].shape}; wanted a matrix" for name in flat]
    if flat:
        return {}
    ours = to_ours(theirs, rules, None, problems)
    for name in sorted(present):
        down, up = ours.get(f"{name}.down"), ours.get(f"{name}.up")
        if down and up and down.shape[-1] != up.shape[-2]:
            problems.append(f"{name}: down has rank {down.shape[-1]}, and up {up.shape[-2]}")
    return ours


def to_torch(tensors: Mapping[str, Tensor], target: Target, layout: Layout) -> dict[str, Tensor]:
    """Convert our tensors to those of a LoRA file; the inverse of `from_torch`."""
    rules = table(target)
    theirs = to_theirs(tensors, {name: rules[name] for name in tensors})
    return theirs if layout == "original" else _renamed(theirs, TO_DIFFUSERS)


def table(target: Target) -> Table:
    """Return the table of our LoRA tensors and the original's names, for every linear layer."""
    modules = {ours: [theirs] for ours, theirs in MODEL.items() if ours != "patches"}
    for i, text in enumerate(TEXTS):
        modules[f"texts.{i}.linear"] = [f"{text}.1" if target.text_norm else text]
    modules |= block_modules(target.depth, target.mmdit_depth)
    return {
        f"{ours}.{part}": Rule(
            tuple(PREFIX + _mangled(name) + suffix for name in theirs),
            () if part == "alpha" else (1, 0),
            stacked=ours.startswith("blocks."),
        )
        for ours, theirs in modules.items()
        if not ours.endswith("norm")
        for part, suffix in PARTS.items()
    }


def _target(config: MMDiTConfig) -> Target:
    return Target(config.depth, config.mmdit_depth, config.text_norm)


def _other_widths(ours: Mapping[str, Tensor], config: MMDiTConfig) -> list[str]:
    """Return one line for each module whose kernel in a model of `config` has another shape."""
    kernels, faults = shapes_of(abstract(MMDiT, config)), []
    for name in sorted({name.rpartition(".")[0] for name in ours}):
        down, up = ours.get(f"{name}.down"), ours.get(f"{name}.up")
        wanted = kernels[f"{name}.kernel"][-2:]
        if down and up and (made := (down.shape[-2], up.shape[-1])) != wanted:
            faults.append(
                f"{name}: the LoRA changes a kernel of shape {made}, and the model has {wanted}; "
                f"use a LoRA that was trained for this model"
            )
    return faults


def _in_original_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _renamed(tensors, {theirs: ours for ours, theirs in TO_DIFFUSERS.items()})


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(f"_{_mangled(old)}.", f"_{_mangled(new)}.")
        renamed[name] = tensor
    return renamed


def _mangled(name: str) -> str:
    return name.replace(".", "_")
