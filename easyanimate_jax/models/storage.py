"""How kernels that are not trained are stored: in 32 or 16 bits, or those of the blocks in 8.

Eight bits are integers: each output channel of a kernel is rounded to 255 levels with its own
scale. A layer multiplies the integers, in the model's dtype, and then its output by the scale: a
factor of an output channel leaves the sum over the inputs. Activations keep the model's dtype.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from easyanimate_jax.models.layers import axes, linears, matches

Kernels = Literal["float32", "bfloat16", "float16", "int8"]


def stored_type(name: str, kernels: Kernels, exact: Sequence[str] = ()) -> str:
    """Return the dtype in which the weight of this dotted name is stored.

    Weights that a pattern of `exact` matches are stored in float32.
    """
    if not name.endswith(".kernel") or matches(name, exact):
        return "float32"
    if kernels == "int8" and not name.startswith("blocks."):
        return "float32"
    return kernels


@jax.jit
def quantized(
    kernel: Float[Array, "layers in out"],
) -> tuple[Int8[Array, "layers in out"], Float[Array, "layers out"]]:
    """Return the integers of a kernel and the float32 scale of each output channel."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(kernel).max(axis=1), jnp.finfo(jnp.float32).tiny) / 127
    return jnp.rint(kernel / scale[:, None]).astype(jnp.int8), scale


def store(model: nnx.Module, kernels: Kernels, exact: Sequence[str] = ()) -> None:
    """Change the kernels of a transformer's dense layers, real or abstract, to another storage.

    Kernels that a pattern of `exact` matches stay in float32.
    """
    for name, layer in linears(model):
        stored = stored_type(f"{name}.kernel", kernels, exact)
        if stored != "int8":
            layer.kernel.set_value(layer.kernel.get_value().astype(stored))
            continue
        integers, scale = quantized(layer.kernel.get_value())
        stack, _, name_out = layer.kernel.get_metadata()["out_sharding"]
        layer.kernel.set_value(integers)
        layer.scale = nnx.Param(scale, **axes(stack, name_out))
