"""Numbers that hold for every model, clip and machine here, each written once; without JAX.

Letters beyond the legend: D is the model width.
"""

from typing import NamedTuple

FPS = 8  # frames a second of training clips and of what is generated (spec 8.2)

TIME_FACTOR, SPACE_FACTOR = 4, 8  # frames and pixels of a side that one latent stands for (spec 3)
PATCH = 2  # latents of a token's side (spec 2.1)
CELL = SPACE_FACTOR * PATCH  # pixels of a token's side
LATENT_CHANNELS = 16  # of the VAE, and of what the transformer predicts

MESH_AXES = ("data", "fsdp", "context", "tensor")


class Activation(NamedTuple):
    """What a block pays to keep one activation for its backward pass, and what that saves."""

    values: int  # kept: values of the model width D a token, in the compute dtype
    matrices: int  # not multiplied again: of the 12 D x D matrices of a block


# The names that a block gives to its activations, those first that save the most computing for a
# kept byte. "attention" saves the attention itself, which is no matrix of the block.
ACTIVATIONS = {
    "attention": Activation(1, 0),
    "mlp out": Activation(1, 4),
    "attention out": Activation(1, 1),
    "mlp": Activation(4, 4),
    "qkv": Activation(3, 3),
}
BLOCK_MATRICES = 12  # q, k, v and out; up and down of the MLP, four each


def to_signed(pixels):
    """Return 8-bit pixels as float32 in [-1, 1]; a NumPy or JAX array of any shape."""
    return pixels.astype("float32") / 127.5 - 1


def to_bytes(video):
    """Return values of [-1, 1] as 8-bit pixels: cut to the range, and truncated, not rounded.

    The inverse of `to_signed`, for a NumPy or JAX array of any shape. Truncated as the reference
    does it (spec 10.1).
    """
    return ((video / 2 + 0.5).clip(0, 1) * 255).astype("uint8")
