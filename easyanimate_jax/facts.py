"""Facts and rules that hold in every room, each written once; without JAX.

`check_fields` is the rule of all configs: a number has a range, and a word comes from a set.

Letters beyond the legend: D is the model width.
"""

import dataclasses
from collections.abc import Iterator
from numbers import Integral, Real
from types import NoneType
from typing import Literal, NamedTuple, get_args, get_origin

FPS = 8  # frames a second of training clips and of what is generated (spec 8.2)

TIME_FACTOR, SPACE_FACTOR = 4, 8  # frames and pixels of a side that one latent stands for (spec 3)
PATCH = 2  # latents of a token's side (spec 2.1)
CELL = SPACE_FACTOR * PATCH  # pixels of a token's side
LATENT_CHANNELS = 16  # of the VAE, and of what the transformer predicts

MESH_AXES = ("data", "fsdp", "context", "tensor")

DTypes = Literal["bfloat16", "float16", "float32"]  # that networks compute in
MAX_STEPS = 2**31 - 1  # a run counts its steps in 32 bits
MAX_SEED = 2**32 - 1
SEEDS = f"[0, {MAX_SEED}]"  # the range of a seed, for `check_fields`


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


def check_fields(config, **ranges: str) -> None:
    """Refuse a dataclass with a number outside its range, or a word that its Literal lacks.

    `ranges` names the range of every field that holds numbers, as "[0, 1)": 0 belongs to it, 1 does
    not. Several are joined as "-1 or [1, inf)". A range holds for each number of a tuple, and only
    for whole numbers where the field's type says int. NaN and infinity are always outside. None
    passes where the type admits it. Raises ValueError that names class, field, value and range, and
    TypeError where a number has no range or a range no number.
    """
    types = {field.name: set(_leaves(field.type)) for field in dataclasses.fields(config)}
    numbers = {name for name, leaves in types.items() if leaves & {int, float}}
    if numbers != set(ranges):
        raise TypeError(f"{type(config).__name__}: numbers or ranges alone: {numbers ^ {*ranges}}")
    for name, leaves in types.items():
        words = [word for leaf in leaves for word in get_args(leaf)]
        if name in numbers:
            kind, noun = (Real, "a number") if float in leaves else (Integral, "a whole number")
            allowed = [_Range.read(text) for text in ranges[name].split(" or ")]
            repair = " or ".join(one.words(noun) for one in allowed)
        elif words:
            repair = f"one of {', '.join(map(repr, words))}"
        else:
            continue
        whole = getattr(config, name)
        for value in _values(whole):
            if (value is None and NoneType in leaves) or (type(value) is str and str in leaves):
                continue
            if name not in numbers:
                good = value in words
            else:
                good = isinstance(value, kind) and not isinstance(value, bool)
                good = good and any(one.holds(value) for one in allowed)
            if not good:
                of = getattr(config, "name", None)  # which one of a list, such as of stages
                raise ValueError(
                    f"{type(config).__name__}.{name} {'is' if value is whole else 'holds'} "
                    f"{value!r}; use {repair}{f' (in {of!r})' if isinstance(of, str) else ''}"
                )


class _Range(NamedTuple):
    """An interval as mathematics writes it: brackets include an end, parentheses leave it out."""

    left: str
    low: str
    high: str
    right: str

    @classmethod
    def read(cls, text: str) -> "_Range":
        """Return the interval of a text such as "[0, 1)", or of a single number."""
        if text[0] not in "[(":
            return cls("[", text, text, "]")
        low, high = text[1:-1].split(", ")
        return cls(text[0], low, high, text[-1])

    def holds(self, value) -> bool:
        low, high = float(self.low), float(self.high)
        ends = [low] * (self.left == "[") + [high] * (self.right == "]")
        return low < value < high or value in ends

    def words(self, noun: str) -> str:
        if self.low == self.high:
            return self.low
        if self.left == "[" and self.right == "]":
            return f"{noun} from {self.low} to {self.high}"
        ends = []
        if self.low != "-inf":
            ends.append(f"of {self.low} or more" if self.left == "[" else f"above {self.low}")
        if self.high != "inf":
            ends.append(f"of {self.high} or less" if self.right == "]" else f"below {self.high}")
        return f"{noun} {' and '.join(ends) or 'that is finite'}"


def _leaves(kind) -> Iterator:
    """Yield the plain types and Literals that an annotation is made of."""
    if get_origin(kind) is Literal or not get_args(kind):
        yield kind
        return
    for part in get_args(kind):
        yield from _leaves(part)


def _values(value) -> Iterator:
    """Yield what stands in nested tuples."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _values(part)
    else:
        yield value
