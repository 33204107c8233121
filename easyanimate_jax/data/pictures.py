"""Convert any picture to 8-bit RGB, by these rules.

orientation    follow the EXIF tag
large          scale down to `MAX_SIDE`; refuse more than `MOST_SIDE` pixels a side
grey           scale 16 bits; floats must be from 0 to 1
transparent    blend with white; for a mask, the alpha channel is the mask
colours        look up palettes; convert profiles (Display P3, CMYK) to sRGB
several        an animation is a film, see `Animation`
"""

import io
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps, features

from easyanimate_jax.data.times import Timeline

MAX_SIDE = 4096  # pixels a side of the result
MOST_SIDE = 12_000  # pixels a side of the file
BACKGROUND = (255, 255, 255, 255)  # RGBA behind transparent pixels
SHORTEST, REPLACED = 10.0, 100.0  # ms; like browsers, show frames of up to 10 ms for 100 ms
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", *(("AVIF",) if features.check("avif") else ()))
ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")  # further images of a JPEG are depth or gain maps

Picture = UInt8[np.ndarray, "H W 3"]


def open_picture(name: object, file) -> Image.Image:
    """Open a picture without decoding it. Raises ValueError, naming `name`, if it is unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            image = Image.open(file, formats=FORMATS)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable picture ({error})") from error
    if max(image.size) > MOST_SIDE:
        raise ValueError(
            f"{name} is {image.height}x{image.width}; use at most {MOST_SIDE} pixels a side"
        )
    if image.format == "TIFF" and image.n_frames > 1:
        raise ValueError(f"{name} holds {image.n_frames} pages; save one page as its own file")
    return image


def is_animated(image: Image.Image) -> bool:
    """Return True if the open file is an animation."""
    return image.format in ANIMATED and getattr(image, "n_frames", 1) > 1


def size_of(image: Image.Image) -> tuple[int, int]:
    """Return the (height, width) of the result of `to_rgb`, from the header."""
    # EXIF orientations with a quarter turn; Pillow says the size of a turned TIFF, and turns it.
    turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) >= 5
    width, height = image.size[::-1] if turned else image.size
    return fit_side(height, width, MAX_SIDE)


def fit_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Return (height, width) scaled so that the longer side has at most `side` pixels."""
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def fill(
    picture: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Scale to cover (height, width), bilinear with antialias, then crop the centre (spec 8.3)."""
    if picture.shape[:2] == (height, width):
        return picture
    rows, columns, top, left = cover(*picture.shape[:2], height, width)
    resized = Image.fromarray(picture).resize((columns, rows), Image.Resampling.BILINEAR)
    return np.asarray(resized)[top : top + height, left : left + width]


def cover(h: int, w: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return the scaled size of (h, w) that covers (height, width), and the corner of the crop."""
    tall = height * w > width * h
    rows, columns = (height, w * height // h) if tall else (h * width // w, width)
    return rows, columns, round((rows - height) / 2), round((columns - width) / 2)


def to_rgb(name: object, image: Image.Image, mask: bool = False) -> Picture:
    """Return the picture as RGB. For a `mask` with an alpha channel, return that channel as grey.

    Raises ValueError, naming `name`, if the picture does not decode or its levels are undefined.
    """
    try:
        image = _upright(image)
        if image.mode[0] in "IF":
            image = _eight_bits(name, image)
        clear = image.has_transparency_data
        profile = image.info.get("icc_profile")
        if clear:
            image = image.convert("RGBA")
            alpha = np.asarray(image)[..., 3]
            if mask and alpha.min() < 255:
                return np.repeat(alpha[..., None], 3, axis=-1)
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
            image = image.convert("RGB")
        return np.array(_srgb(image, profile))
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name}: the picture does not decode ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    """Decode a picture, scale it down and rotate it as EXIF says."""
    size = fit_side(image.height, image.width, MAX_SIDE)[::-1]
    if size != image.size:
        if image.format == "JPEG":
            image.draft(None, size)  # decodes at 1/2, 1/4 or 1/8 of the size
        info = image.info
        if image.mode in ("1", "P", "PA"):  # these modes cannot represent interpolated levels
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if image.mode.startswith("I;"):
            image = image.convert("I")
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        image.info = info
    return ImageOps.exif_transpose(image)


def _eight_bits(name: object, image: Image.Image) -> Image.Image:
    """Return a grey picture of more than 8 bits as 8 bits."""
    levels = np.asarray(image)
    low, high = levels.min(), levels.max()
    most = 1.0 if image.mode == "F" else 65535
    if not (low >= 0 and high <= most):
        raise ValueError(
            f"{name} has grey levels from {low} to {high}, where {most:g} is white; scale them "
            f"from 0 to {most:g}, or save it with eight bits"
        )
    grey = Image.fromarray(np.rint(levels * (255 / most)).astype(np.uint8))
    hidden = image.info.get("transparency")
    if hidden is not None:
        grey.putalpha(Image.fromarray(np.where(levels == hidden, 0, 255).astype(np.uint8)))
    return grey


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(given):
                srgb = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(image, given, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):  # a damaged profile is ignored
            pass
    return image.convert("RGB")


class Animation:
    """A GIF, APNG, animated WebP or AVIF, with the interface of a film."""

    def __init__(self, name: object, image: Image.Image):
        self.name, self.image = name, image
        self.skipped = int(bool(image.info.get("default_image")))  # the still image of an APNG
        tick = Fraction(1, 100) if image.format == "GIF" else Fraction(1, 1_000_000)
        stamps, time = [], 0.0
        for number in range(self.skipped, image.n_frames):
            self._seek(number)
            stamps.append(round(Fraction(time) / 1000 / tick))
            lasts = float(image.info.get("duration") or 0)
            time += lasts if lasts > SHORTEST else REPLACED
        self.timeline = Timeline(
            np.array(stamps, np.int64), tick, np.zeros((0, 2), np.int64), False
        )

    def walk(self, first: int, last: int) -> Iterator[tuple[int, tuple[int, int], Callable]]:
        """Yield (number, size, function that returns RGB) of every frame up to `last`."""
        for number in range(last + 1):
            self._seek(number + self.skipped)
            yield number, size_of(self.image), self._draw

    def _draw(self, size: tuple[int, int] | None) -> Picture:
        picture = to_rgb(self.name, self.image.copy())
        return fill(picture, *size) if size else picture

    def _seek(self, number: int) -> None:
        try:
            self.image.seek(number)
            self.image.load()
        except (OSError, SyntaxError, EOFError) as error:
            raise ValueError(f"{self.name}: frame {number} does not decode ({error})") from error


def picture_kind(name: Path | object, head: bytes) -> str | None:
    """Return "image" for the first bytes of an AVIF, None for those of an mp4 or mov film.

    Raises ValueError for HEIC, and for AVIF if Pillow has no decoder for it.
    """
    brands = {head[8:12]} | {head[i : i + 4] for i in range(16, len(head) - 3, 4)}
    if brands & {b"avif", b"avis"}:
        if "AVIF" not in FORMATS:
            raise ValueError(f"{name} is an AVIF picture; save it as PNG or JPEG")
        return "image"
    if head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        raise ValueError(f"{name} is a HEIC picture; save it as PNG or JPEG")
    return None
