"""The inputs of a loaded pipeline beside the prompt: checked, resized, one row per video."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from easyanimate_jax.data.buckets import check_size, whole_frames
from easyanimate_jax.data.pictures import cover

NEW = 240  # a mask pixel of at least this grey marks video to generate (spec 6.6)
Picture = UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "B H W 3"]
Film = UInt8[np.ndarray, "F H W 3"] | UInt8[np.ndarray, "B F H W 3"]


class Given(TypedDict, total=False):
    """The optional inputs beside a prompt. With several prompts: one for all, or one for each.

    Pixels are uint8. Pictures, films and masks are scaled to cover the output size and cropped to
    its centre, or stretched; only the first frames of a film are used. Rays must already have the
    output size.
    """

    image: Picture  # the first frame
    end_image: Picture  # the last frame
    video: Film  # the video to change
    mask: Bool[np.ndarray, "..."] | UInt8[np.ndarray, "..."]  # (H, W) or (F, H, W, 1); 1 is new
    strength: float  # 0 to 1, how much `video` changes (0.7; 1 with a mask)
    picture_noise: float  # on given pictures; more noise, more motion (0.0563)
    control: Film  # a control video
    camera: Float[np.ndarray, "F H W 6"] | Float[np.ndarray, "B F H W 6"]  # Pluecker rays
    reference: Picture  # what a controlled video looks like
    segment: int  # 4n+1; a longer video is generated in segments of so many frames
    overlap: int  # frames that segments share (4)
    fit: str  # "crop" or "stretch": how pixels take the output size ("crop")
    tile: int  # pixels of a side: decode in tiles, which needs less memory
    shift: float  # of V5.1's sampling times; larger means more steps at high noise (e)
    times: tuple[float, ...]  # of the evaluations, noise first, in place of steps
    sampler: str  # "" is the default sampler of the noise process
    eta: float  # share of fresh noise in DDIM, 0 to 1 (0)
    rescale: float  # rescaling of the guided prediction, 0 to 1 (0)
    guided: tuple[float, float]  # first and last share of the steps with guidance (0, 1)
    guidance_every: int  # steps between two unconditional predictions (1)
    teacache: float  # threshold, for example 0.08; 0 is off (0)
    magcache: float  # threshold, for example 0.1; 0 is off (0)
    taylorseer: int  # order, 1 or 2; 0 is off (0)
    cache_interval: int  # steps from one whole evaluation to the next, of the last two (2)
    progress: Callable[[int], None]  # called with the number of each finished evaluation


class Form(NamedTuple):
    """The shapes and dtypes of an input for one video; an extra leading axis is the batch."""

    argument: str  # name of the pipeline function's argument
    shapes: tuple[str, ...]
    kinds: str  # NumPy's letters of the allowed dtypes
    what: str


FORMS = {
    "image": Form("start", ("H W 3",), "u", "uint8 pixels of 0 to 255"),
    "end_image": Form("end", ("H W 3",), "u", "uint8 pixels of 0 to 255"),
    "reference": Form("reference", ("H W 3",), "u", "uint8 pixels of 0 to 255"),
    "video": Form("video", ("F H W 3",), "u", "uint8 pixels of 0 to 255"),
    "control": Form("control", ("F H W 3",), "u", "uint8 pixels of 0 to 255"),
    "mask": Form("mask", ("H W", "F H W 1"), "bu", "0 where the video stays, 1 where it is new"),
    "camera": Form("camera", ("F H W 6",), "f", "float rays"),
}


def size_of(
    given: Mapping, default: tuple[int, int, int], asked: Sequence[int | None]
) -> tuple[int, int, int]:
    """Return the output size (frames, height, width).

    A value of `asked` comes first, then the size of the inputs, then `default`. Rays set all three
    numbers; a film sets the number of frames, at most that of `default`. Raises ValueError for a
    size that the model cannot generate.
    """
    natural = list(default)
    for name in ("video", "control"):
        if name in given:
            frames = np.shape(given[name])[-4] if np.ndim(given[name]) > 3 else 1
            natural[0] = whole_frames(min(default[0], frames))
    if "camera" in given and np.ndim(given["camera"]) > 3:
        natural = np.shape(given["camera"])[-4:-1]
    size = tuple(n if a is None else a for a, n in zip(asked, natural, strict=True))
    check_size(*size)
    return size


def as_rows(given: Mapping, rows: int, size: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Return the arguments of a pipeline function, by name, for `rows` videos of one size.

    Raises ValueError for arrays of wrong dtypes or shapes.
    """
    found, fit = {}, given.get("fit", "crop")
    if fit not in ("crop", "stretch"):
        raise ValueError(f'fit is {fit!r}: use "crop" or "stretch"')
    for name, form in FORMS.items():
        if name in given:
            each = [_fit(name, one, size, fit) for one in _each(name, form, given[name], rows)]
            found[form.argument] = np.stack(each)
    return found


def _each(name: str, form: Form, value, rows: int) -> list[np.ndarray]:
    """Return a list with one array per video."""
    value = np.asarray(value)
    shapes = " or ".join(f"({', '.join(shape.split())})" for shape in form.shapes)
    wanted = f"give {form.what} of shape {shapes}, or one for each of {rows} prompts"
    if value.dtype.kind not in form.kinds or (value.dtype.kind == "u" and value.itemsize > 1):
        raise ValueError(f"{name} has dtype {value.dtype}: {wanted}")
    for shape in form.shapes:
        sizes = shape.split()
        fixed = [(i - len(sizes), int(n)) for i, n in enumerate(sizes) if n.isdigit()]
        extra = value.ndim - len(sizes)
        if extra not in (0, 1) or any(value.shape[i] != n for i, n in fixed):
            continue
        if extra == 0:
            return [value] * rows
        if len(value) == rows:
            return list(value)
    raise ValueError(f"{name} has shape {value.shape}: {wanted}")


def _fit(name: str, value: np.ndarray, size: tuple[int, int, int], fit: str) -> np.ndarray:
    """Return one input in the output size."""
    frames, height, width = size
    if name in ("image", "end_image", "reference"):
        return fitted(value[None], height, width, Image.Resampling.BICUBIC, fit)[0]
    if name == "mask" and value.ndim == 2:
        value = np.repeat(value[None, ..., None], frames, axis=0)
    if len(value) < frames:
        raise ValueError(
            f"{name} has {len(value)} frames, and the video to make has {frames}; use frames="
            f"{whole_frames(len(value))}"
        )
    value = value[:frames]
    if name == "camera":
        if value.shape[1:3] != (height, width):
            raise ValueError(
                f"camera has rays of {value.shape[1]}x{value.shape[2]} pixels, and the video is "
                f"{height}x{width}: compute the rays at that size"
            )
        return value.astype(np.float32)
    if name != "mask":
        return fitted(value, height, width, Image.Resampling.BILINEAR, fit)
    if value.max() > 1:
        raise ValueError(f"mask holds {value.max()}: use 1 where the video is new, and 0 elsewhere")
    grey = value[..., 0].astype(np.uint8) * 255
    grey = fitted(grey, height, width, Image.Resampling.BILINEAR, fit)
    return (grey >= NEW).astype(np.uint8)[..., None]


def fitted(
    frames: np.ndarray, height: int, width: int, how: Image.Resampling, fit: str
) -> np.ndarray:
    """Return uint8 frames, (F, h, w, 3) or (F, h, w), in another size.

    "crop" scales them to cover the size and cuts off what is outside, the same on both sides;
    "stretch" ignores their shape, as the reference does.
    """
    rows, columns, top, left = height, width, 0, 0
    if fit == "crop":
        rows, columns, top, left = cover(*frames.shape[1:3], height, width)
    scaled = (np.asarray(Image.fromarray(x).resize((columns, rows), how)) for x in frames)
    return np.stack([x[top : top + height, left : left + width] for x in scaled])
