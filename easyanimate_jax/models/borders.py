"""What the transformer refuses, by name: arguments that do not fit its config or the mesh.

They are checked while it is traced, so a running program pays nothing.
"""

from collections.abc import Sequence

import jax

from easyanimate_jax.diffusion.tasks import all_numbers
from easyanimate_jax.facts import PATCH
from easyanimate_jax.sharding import token_axis


def check_tokens(tokens, time, texts: Sequence, in_channels: int, widths: Sequence[int]) -> None:
    """Raise ValueError where tokens, times or texts do not fit a transformer, or each other."""
    width = in_channels * PATCH**2
    if tokens.ndim != 3 or tokens.shape[-1] != width:
        raise ValueError(
            f"tokens have shape {tokens.shape}, and the model reads (rows, tokens, {width}), that "
            f"is {in_channels} channels x {PATCH} x {PATCH}: give the condition of its task beside "
            f"the noisy latents; tasks are {all_numbers()}"
        )
    shapes = [text.shape for text in texts]
    if [shape[-1] for shape in shapes if len(shape) == 3] != list(widths):
        raise ValueError(
            f"texts have shapes {shapes}, and the model reads {len(widths)} of (rows, length, "
            f"width), of widths {tuple(widths)}: give the states of its own text encoders, in order"
        )
    check_rows(tokens=tokens, time=time, **{f"texts[{i}]": text for i, text in enumerate(texts)})


def check_rows(**arrays) -> None:
    """Raise ValueError where arrays do not have the same number of rows."""
    rows = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"the rows of {rows} differ: give one for each video")


def check_mesh(rows: int, num_tokens: int, heads: int) -> None:
    """Raise ValueError where the current mesh does not divide what a transformer computes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return
    sizes, repair = dict(mesh.shape), "or change the mesh"
    axis = token_axis(mesh, rows)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ValueError(
            f"{rows} rows do not split into data x fsdp = {parts} parts on the mesh {sizes}: give "
            f"a multiple of {parts} rows, {repair}"
        )
    if axis and num_tokens % mesh.shape[axis]:
        raise ValueError(
            f"{num_tokens} tokens do not split into {axis} = {mesh.shape[axis]} parts on the mesh "
            f"{sizes}: fill them up to a multiple and say in `lengths` how many are real, {repair}"
        )
    if heads % mesh.shape["tensor"]:
        raise ValueError(
            f"{heads} heads do not split into tensor = {mesh.shape['tensor']} parts on the mesh "
            f"{sizes}: choose a tensor that divides {heads}"
        )
