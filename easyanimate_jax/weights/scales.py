"""Apply the scales of weights in 8 bits, or refuse them by name.

Programs that store a weight in 8 bits store its scale beside it: `X.weight` is to be multiplied by
`X.scale_weight` or `X.weight_scale`, one number for the tensor or one for each row. A file may also
hold a marker `scaled_fp8`, and scales of a layer's inputs, which only products in 8 bits need.
Without its scale such a weight is wrong by any factor, so every file of weights passes here.
"""

import json
from collections.abc import Mapping

import numpy as np

from easyanimate_jax.weights.lazy import Tensor, is_float

SCALES = ("scale_weight", "weight_scale")
INPUTS = ("scale_input", "input_scale")
FORMAT = "comfy_quant"  # JSON in bytes, such as {"format": "float8_e4m3fn"}
MARKER = "scaled_fp8"  # an 8-bit tensor without values
# Parts of the last word of names that other ways to store a quantized weight use.
OTHERS = ("scale", "absmax", "quant", "qweight", "qzeros", "zero_point", "g_idx", "scb")


def scaled(tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, Tensor]:
    """Return the tensors without scales and markers; a weight with a scale becomes float32.

    Scales and quantized weights that are not understood are added to `problems`.
    """
    scales, unused = {}, set()
    for name, tensor in tensors.items():
        layer, dot, last = name.rpartition(".")
        weight = f"{layer}{dot}weight"
        if last == MARKER or (weight in tensors and last in INPUTS):
            unused.add(name)
        elif weight in tensors and last == FORMAT:
            unused.add(name)
            problems += _other_formats(name, tensor)
        elif weight in tensors and last in SCALES and weight not in scales:
            scales[weight] = name
        elif ".weight." in name or (
            any(word in last.lower() for word in OTHERS)
            and (last != "scale" or weight in tensors)  # "scale" alone is a norm of ours
        ):
            problems.append(
                f"{name} belongs to a quantized weight of a kind that is not read; use weights in "
                f"float32, bfloat16, float16, or in 8 bits with one scale a tensor or a row"
            )
    found = {}
    for name, tensor in tensors.items():
        if name in scales:
            problems += _misfits(name, tensor, tensors[scales[name]])
            found[name] = _product(tensor, tensors[scales[name]])
        elif name not in unused and name not in scales.values():
            whole = not is_float(tensor.dtype)
            short = name.endswith("weight") and tensor.dtype.itemsize == 1
            if short and (whole or scales or unused):
                problems.append(
                    f"{name} has dtype {tensor.dtype} and no scale; use a whole copy of the weights"
                )
            found[name] = tensor
    return found


def _other_formats(name: str, tensor: Tensor) -> list[str]:
    try:
        told = json.loads(tensor.read().tobytes())["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        told = "no format"
    known = isinstance(told, str) and told.startswith("float8")
    return [] if known else [f"{name} says {told!r}; only float8 with one scale is read"]


def _misfits(name: str, weight: Tensor, scale: Tensor) -> list[str]:
    if weight.dtype.itemsize != 1 or not is_float(scale.dtype):
        return [
            f"{name} has dtype {weight.dtype} and a scale of dtype {scale.dtype}; only weights in "
            f"8 bits have scales, which are floating-point numbers"
        ]
    sizes = [size for size in scale.shape if size != 1]
    by_row = sizes == list(scale.shape[:1]) == list(weight.shape[:1])
    if weight.shape and (not sizes or by_row):
        return []
    return [
        f"{name} has shape {weight.shape} and a scale of shape {scale.shape}; a scale is one "
        f"number, or one for each row"
    ]


def _product(weight: Tensor, scale: Tensor) -> Tensor:
    def read(box):
        factors = scale.read().astype(np.float32).reshape(-1)
        factors = factors if factors.size == 1 else factors[box[0]]
        values = weight.read(box).astype(np.float32)
        return values * factors.reshape(-1, *[1] * (values.ndim - 1))

    return Tensor(weight.shape, np.float32, read)
