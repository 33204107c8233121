"""The blocks' kernels as eight-bit integers: a quarter of the weights' bytes, for sampling alone.

Weight-only: qwix rounds every output channel of a kernel to 255 levels of its own, and a layer
takes them back to numbers just before it multiplies. What is computed stays in the model's dtype.
"""

import jax
import jax.numpy as jnp
import qwix


def store(name: str, weight: jax.Array) -> jax.Array | qwix.QArray:
    """What is kept of the weight of that dotted name: `blocks.0...kernel` is (layers, in, out)."""
    if not (name.startswith("blocks.") and name.endswith(".kernel")):
        return weight
    return qwix.quantize(weight, jnp.int8, channelwise_axes=(0, 2))
