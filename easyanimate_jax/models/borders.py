"""Checks of the arguments of the transformer and the VAE: shapes, dtypes and the mesh.

The checks run while JAX traces a model, so a compiled program does not pay for them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from easyanimate_jax.diffusion.tasks import all_numbers
from easyanimate_jax.facts import LATENT_CHANNELS, PATCH, SPACE_FACTOR, TIME_FACTOR
from easyanimate_jax.sharding import token_axis


def check_tokens(tokens, time, texts: Sequence, in_channels: int, widths: Sequence[int]) -> None:
    """Raise ValueError if tokens, times or texts do not fit the transformer or each other.

    `widths` are the widths of the states of the transformer's text encoders.
    """
    width = in_channels * PATCH**2
    if tokens.ndim != 3 or tokens.shape[-1] != width:
        raise ValueError(
            f"tokens have shape {tokens.shape}, and the model reads (rows, tokens, {width}), "
            f"{in_channels} channels x {PATCH} x {PATCH}: concatenate the noisy latents and the "
            f"condition of its task; input channels and tasks are {all_numbers()}"
        )
    shapes = [text.shape for text in texts]
    if [shape[-1] for shape in shapes if len(shape) == 3] != list(widths):
        raise ValueError(
            f"texts have shapes {shapes}, and the model reads {len(widths)} of shape (rows, "
            f"length, width) with widths {tuple(widths)}: give the states of its text encoders in "
            f"their order"
        )
    check_rows(tokens=tokens, time=time, **{f"texts[{i}]": text for i, text in enumerate(texts)})


def check_rows(**arrays) -> None:
    """Raise ValueError if the arrays do not have the same number of rows."""
    rows = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"the numbers of rows {rows} differ: give one row for each video")


def check_mesh(rows: int, num_tokens: int, heads: int) -> None:
    """Raise ValueError if the current mesh does not divide the rows, tokens or heads."""
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
            f"{sizes}: pad them to a multiple and give the number of real tokens in `lengths`, "
            f"{repair}"
        )
    if heads % mesh.shape["tensor"]:
        raise ValueError(
            f"{heads} heads do not split into tensor = {mesh.shape['tensor']} parts on the mesh "
            f"{sizes}: choose a `tensor` that divides {heads}"
        )


def check_pixels(video) -> None:
    """Raise ValueError if an array is not a video that the VAE can encode."""
    if video.ndim != 5 or video.shape[-1] != 3 or not jnp.issubdtype(video.dtype, jnp.floating):
        raise ValueError(
            f"video has dtype {video.dtype} and shape {video.shape}: the VAE reads floats in "
            f"[-1, 1] of shape (rows, frames, height, width, 3); convert 8-bit pixels with "
            f"pixels / 127.5 - 1"
        )
    check_video(video.shape)


def check_latents(z) -> None:
    """Raise ValueError if an array does not hold raw latents that the VAE can decode."""
    if z.ndim != 5 or z.shape[-1] != LATENT_CHANNELS or 0 in z.shape:
        raise ValueError(
            f"latents of shape {z.shape}: the VAE decodes (rows, latent frames, height / "
            f"{SPACE_FACTOR}, width / {SPACE_FACTOR}, {LATENT_CHANNELS}), channels last; give "
            f"latents of that shape"
        )


def check_video(shape: tuple[int, ...]) -> None:
    """Raise ValueError if a shape (B, F, H, W, 3) does not fit the 4 x 8 x 8 compression."""
    _, frames, height, width, _ = shape
    if frames % TIME_FACTOR != 1:
        nearest = max(round((frames - 1) / TIME_FACTOR), 0) * TIME_FACTOR + 1
        raise ValueError(
            f"a video of {frames} frames: frames must be 4n+1 (frame 0, then groups of four); "
            f"use {nearest}."
        )
    if height % SPACE_FACTOR or width % SPACE_FACTOR:
        raise ValueError(
            f"a video of {height} x {width} pixels: both must be multiples of {SPACE_FACTOR}; "
            f"crop it to {height // SPACE_FACTOR * SPACE_FACTOR} x "
            f"{width // SPACE_FACTOR * SPACE_FACTOR}."
        )
