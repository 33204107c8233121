"""Facts that the whole package shares, each written once; the module does not import JAX.

`check_fields` is the rule for all configs: a number has a range, and a choice has a set of words.
"""

import dataclasses
from collections.abc import Iterator
from numbers import Integral, Real
from types import NoneType
from typing import Literal, NamedTuple, get_args, get_origin

FPS = 8  # frames per second of training clips and of generated videos (spec 8.2)

TIME_FACTOR, SPACE_FACTOR = 4, 8  # frames, and pixels per side, that one latent encodes (spec 3)
PATCH = 2  # latents per side of a token (spec 2.1)
CELL = SPACE_FACTOR * PATCH  # pixels per side of a token
LATENT_CHANNELS = 16  # channels of the VAE's latents and of the transformer's prediction

MESH_AXES = ("data", "fsdp", "context", "tensor")

DTypes = Literal["bfloat16", "float16", "float32"]  # dtypes of the computation
TrackerName = Literal["tensorboard", "wandb", "trackio"]  # where a run's numbers are shown
AUTO = "auto"  # in place of a setting that the compiler's figures of a stage decide
MAX_STEPS = 2**31 - 1  # the largest 32-bit step counter
MAX_SEED = 2**32 - 1
SEEDS = f"[0, {MAX_SEED}]"  # the range of a seed, for `check_fields`


class Activation(NamedTuple):
    """The memory that one saved activation of a block costs, and the computation that it saves."""

    values: int  # memory per token: vectors of model width D, in the compute dtype
    matrices: int  # computation saved: products with the 12 D x D matrices of a block


# The names that a block gives to its activations, sorted by the computation saved per byte. Saving
# "attention" saves the attention itself, which is not one of these matrices.
ACTIVATIONS = {
    "attention": Activation(1, 0),
    "mlp out": Activation(1, 4),
    "attention out": Activation(1, 1),
    "qkv": Activation(3, 3),
    "mlp": Activation(4, 4),
}
BLOCK_MATRICES = 12  # q, k, v and out; up and down of the MLP, four each


def to_signed(pixels):
    """Return 8-bit pixels as float32 in [-1, 1], for a NumPy or JAX array of any shape."""
    return pixels.astype("float32") / 127.5 - 1


def to_bytes(video):
    """Return values in [-1, 1] as 8-bit pixels, for a NumPy or JAX array of any shape.

    This is the inverse of `to_signed`. Values are clipped to the range, then truncated rather than
    rounded, as in the reference (spec 10.1).
    """
    return ((video / 2 + 0.5).clip(0, 1) * 255).astype("uint8")


def check_fields(config, **ranges: str) -> None:
    """Raise ValueError if a number of a dataclass is out of range or a word is not in its Literal.

    `ranges` gives a range for each field with numbers, such as "[0, 1)", which includes 0 and
    excludes 1. Join several ranges as "-1 or [1, inf)". A range applies to each number of a tuple,
    and fields of type int accept whole numbers only. A word of the field's Literal passes too. NaN
    and infinity are always out of range. None passes if the field's type allows it. The error names
    class, field, value and range. Raises TypeError if a field with numbers has no range, or if a
    range has no such field.
    """
    types = {field.name: set(_leaves(field.type)) for field in dataclasses.fields(config)}
    numbers = {name for name, leaves in types.items() if leaves & {int, float}}
    if numbers != set(ranges):
        raise TypeError(
            f"{type(config).__name__}: give one range for each field with numbers; wrong are "
            f"{numbers ^ {*ranges}}"
        )
    for name, leaves in types.items():
        words = [word for leaf in leaves for word in get_args(leaf)]
        if name in numbers:
            kind, noun = (Real, "a number") if float in leaves else (Integral, "a whole number")
            allowed = [_Range.read(text) for text in ranges[name].split(" or ")]
            repair = " or ".join([one.words(noun) for one in allowed] + list(map(repr, words)))
        elif words:
            repair = f"one of {', '.join(map(repr, words))}"
        else:
            continue
        whole = getattr(config, name)
        for value in _values(whole):
            if (value is None and NoneType in leaves) or (type(value) is str and str in leaves):
                continue
            if type(value) is str and value in words:
                continue
            if name not in numbers:
                good = value in words
            else:
                good = isinstance(value, kind) and not isinstance(value, bool)
                good = good and any(one.holds(value) for one in allowed)
            if not good:
                of = getattr(config, "name", None)  # names one of several, such as a stage
                raise ValueError(
                    f"{type(config).__name__}.{name} {'is' if value is whole else 'holds'} "
                    f"{value!r}; use {repair}{f' (in {of!r})' if isinstance(of, str) else ''}"
                )


class _Range(NamedTuple):
    """An interval in mathematical notation: brackets include an end, parentheses exclude it."""

    left: str
    low: str
    high: str
    right: str

    @classmethod
    def read(cls, text: str) -> "_Range":
        """Return the interval of a text such as "[0, 1)", or of a single number such as "-1"."""
        if text[0] not in "[(":
            return cls("[", text, text, "]")
        low, high = text[1:-1].split(", ")
        return cls(text[0], low, high, text[-1])

    def holds(self, value) -> bool:
        """Return True if the interval includes `value`."""
        low, high = float(self.low), float(self.high)
        ends = [low] * (self.left == "[") + [high] * (self.right == "]")
        return bool(low < value < high or value in ends)

    def words(self, noun: str) -> str:
        """Return the interval in words, such as "a number from 0 to 1" for the noun "a number"."""
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
    """Yield the plain types and Literals inside an annotation."""
    if get_origin(kind) is Literal or not get_args(kind):
        yield kind
        return
    for part in get_args(kind):
        yield from _leaves(part)


def _values(value) -> Iterator:
    """Yield the values inside nested tuples and lists."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _values(part)
    else:
        yield value
