"""Convert between two layouts of the same weights with a table of names, in both directions.

A table maps each of our tensors to the foreign tensors that it is made of, one per layer of a
stack. Both sides are `Tensor`s, so this module reads no values.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from easyanimate_jax.weights.lazy import Tensor, is_float, stack


class Rule(NamedTuple):
    """The storage of one of our tensors in another layout.

    `order` lists the foreign dimensions in our order; () means the same order. `shape` is the
    foreign shape if it has more dimensions than ours; it is first folded to (first, all others).
    """

    names: tuple[str, ...]
    order: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None
    stacked: bool = False


Table = Mapping[str, Rule]
Shapes = Mapping[str, tuple[int, ...]]


def to_ours(
    theirs: Mapping[str, Tensor], table: Table, shapes: Shapes | None, problems: list[str]
) -> dict[str, Tensor]:
    """Convert foreign tensors to ours; add missing, unknown and misshapen ones to `problems`.

    `shapes` are the shapes that our tensors must have; with None only the layers must agree.
    """
    known = {name for rule in table.values() for name in rule.names}
    problems += [f"{name} is not known" for name in theirs if name not in known]
    problems += [
        f"{name} has dtype {theirs[name].dtype}; weights are floating-point numbers"
        for name in theirs
        if name in known and not is_float(theirs[name].dtype)
    ]
    ours = {}
    for name, rule in table.items():
        missing = [n for n in rule.names if n not in theirs]
        problems += [f"{n} is missing" for n in missing]
        if missing:
            continue
        layers = [theirs[n] for n in rule.names]
        wanted = their_shape(rule, shapes[name]) if shapes else layers[0].shape
        wrong = [n for n in rule.names if theirs[n].shape != wanted]
        problems += [f"{n} has shape {theirs[n].shape}, wanted {wanted}" for n in wrong]
        dtypes = {layer.dtype for layer in layers}
        if len(dtypes) > 1:
            problems.append(
                f"{rule.names[0]} and the same weight in other layers have dtypes "
                f"{sorted(map(str, dtypes))}; choose one with --dtype"
            )
        elif not wrong:
            parts = [_permute(layer, rule) for layer in layers]
            ours[name] = stack(parts) if rule.stacked else parts[0]
    return ours


def to_theirs(ours: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Convert a complete set of our tensors; the inverse of `to_ours`."""
    theirs = {}
    for name, rule in table.items():
        back = np.argsort(rule.order).tolist()
        for i, their_name in enumerate(rule.names):
            tensor = ours[name].layer(i) if rule.stacked else ours[name]
            tensor = tensor.transpose(back) if rule.order else tensor
            theirs[their_name] = tensor.reshape(rule.shape) if rule.shape else tensor
    return theirs


def their_shape(rule: Rule, ours: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of each foreign tensor, from the shape of ours."""
    if rule.shape:
        return rule.shape
    layer = ours[1:] if rule.stacked else ours
    return tuple(layer[axis] for axis in np.argsort(rule.order)) if rule.order else tuple(layer)


def contradictions(
    fields: Mapping, supported: Mapping[str, tuple], told: Mapping, names: Sequence[str]
) -> list[str]:
    """Return one line for each unsupported field and each field that contradicts the tensors.

    `fields` is a config.json. `supported` holds the values that a field may have, the usual one
    first. `told` is the config.json that follows from the tensors; it is compared in the fields
    `names`. A missing field is no fault.
    """
    problems = [
        f"config.json: {name} is {fields[name]!r}, and only {values[0]!r} is supported"
        for name, values in supported.items()
        if name in fields and fields[name] not in values
    ]
    problems += [
        f"config.json: {name} is {fields[name]!r}, and the tensors have {told[name]!r}"
        for name in names
        if name in fields and fields[name] != told[name]
    ]
    return problems


def _permute(tensor: Tensor, rule: Rule) -> Tensor:
    if rule.shape:
        tensor = tensor.reshape((rule.shape[0], int(np.prod(rule.shape[1:]))))
    return tensor.transpose(rule.order) if rule.order else tensor
