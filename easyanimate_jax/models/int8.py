"""Kernels of the blocks as 8-bit integers: a quarter of the bytes of float32, for sampling only.

Only weights are quantized. qwix rounds each output channel of a kernel to 255 levels with its own
scale, and a layer dequantizes the kernel before it multiplies. Activations keep the model's dtype.
"""

import jax
import jax.numpy as jnp
import qwix


def store(name: str, weight: jax.Array) -> jax.Array | qwix.QArray:
    """Return the weight in its stored form: kernels of blocks as int8, all others unchanged.

    `name` is dotted. A kernel such as `blocks.0.video.mlp.up.kernel` has shape (layers, in, out).
    """
    if not (name.startswith("blocks.") and name.endswith(".kernel")):
        return weight
    return qwix.quantize(weight, jnp.int8, channelwise_axes=(0, 2))
