"""The request for one sample, the prompt file, and the checks of both.

Nothing here needs a checkpoint or JAX. A field that is None is open: `inputs.complete` fills it
from the run.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from easyanimate_jax.data.buckets import check_size
from easyanimate_jax.facts import CELL, FPS, MAX_SEED
from easyanimate_jax.storage.stores import place

FILES = ("image", "end_image", "video", "mask", "control", "trajectory", "camera", "reference")
WORDS = ("prompt", "negative_prompt", "operator")
NUMBERS = ("height", "width", "frames", "segment", "overlap", "fps", "spot", "seed")
LINE_KEYS = (*WORDS, *FILES, *NUMBERS, "strength")
PIXELS = ("image", "end_image", "video", "control", "reference")
STARTS = ("control", "camera", "trajectory", "reference")
ALONE = (  # pairs that exclude each other
    ("image", "video"),
    ("end_image", "video"),
    ("segment", "video"),
    ("control", "camera"),
    ("control", "trajectory"),
    ("camera", "trajectory"),
    *((a, b) for a in STARTS for b in ("image", "end_image", "video", "segment")),
)
NEEDS = (  # the first needs the second
    ("mask", "video"),
    ("strength", "video"),
    ("operator", "control"),
    ("spot", "trajectory"),
    ("overlap", "segment"),
)
RANGES = (
    ("steps", 1, 1000),
    ("guidance", 0, 100),
    ("rescale", 0, 1),
    ("picture_noise", 0, 1),
    ("seed", 0, MAX_SEED),
    ("strength", 0, 1),
    ("frames", 1, 100_001),  # 3.5 hours at 8 frames a second
    ("spot", 1, 1344),
    ("fps", 1, 120),
    ("overlap", 1, 100),
)
SAMPLING = (  # the same for all lines of a prompt file
    *("steps", "times", "sampler", "eta", "shift"),
    *("guidance", "rescale", "guided", "guidance_every"),
    *("teacache", "magcache", "taylorseer", "cache_interval"),
)
OVERLAP = 4  # frames that neighbouring segments of a long video share
LEAST_TILE = 64  # pixels; a quarter of a tile is blended with its neighbour
CACHE_INTERVAL = 2  # Sampling.cache_interval of generation/denoising.py, which imports JAX
PICTURE_NOISE = 0.0563  # SAMPLING_NOISE of diffusion/conditioning.py, which imports JAX


@dataclass(frozen=True)
class SampleRequest:
    """One video or picture: its texts, files, size and sampling options."""

    prompt: str | None = None
    """Text to show; may be empty."""
    negative_prompt: str = ""
    """Text to avoid."""
    image: str | None = None
    """Picture: the first frame."""
    end_image: str | None = None
    """Picture: the last frame."""
    video: str | None = None
    """Video to change."""
    mask: str | None = None
    """File, white where the video is new."""
    strength: float | None = None
    """Change of --video: 0.7, 1 with mask."""
    control: str | None = None
    """Control video; any with --operator."""
    operator: str | None = None
    """canny, soft_edge, scribble, lines or line_art."""
    trajectory: str | None = None
    """JSON list of paths of [x, y] pixels."""
    spot: int | None = None
    """A path's radius: 50 at 1280x720."""
    camera: str | None = None
    """File of camera poses."""
    reference: str | None = None
    """Picture: the look of the video."""
    height: int | None = None
    """Multiple of 16, or the model's."""
    width: int | None = None
    """Multiple of 16, or the model's."""
    size: Literal["model", "like"] = "model"
    """like: the shape of what is given."""
    fit: Literal["crop", "stretch"] = "crop"
    """How pictures and films are fitted."""
    frames: int | None = None
    """4n+1, or 1 for a picture."""
    fps: int | None = None
    """Rate, also of films; the model's."""
    segment: int | None = None
    """Of a long video's segments, 4n+1."""
    overlap: int | None = None
    """Frames that segments share: 4."""
    steps: int | None = None
    """Denoising steps: 50, or the model's."""
    times: str | None = None
    """Of the steps: 1000,891,731,475."""
    sampler: str = ""
    """V5: ddim (default), euler, euler_a, dpm++, pndm; V5.1: euler (default), adams."""
    eta: float = 0.0
    """Share of fresh noise in ddim, 0 to 1."""
    shift: float | None = None
    """V5.1: more steps at high noise."""
    guidance: float | None = None
    """1 is no guidance: 6, or the model's."""
    rescale: float = 0.0
    """Rescaling of the guidance, 0 to 1."""
    guided: tuple[float, float] = (0.0, 1.0)
    """Share of steps with guidance."""
    guidance_every: int = 1
    """Steps per unconditional prediction."""
    teacache: float = 0.0
    """TeaCache threshold; 0 is off."""
    magcache: float = 0.0
    """MagCache threshold; 0 is off."""
    taylorseer: int = 0
    """TaylorSeer's order, 1 or 2; 0 is off."""
    cache_interval: int = CACHE_INTERVAL
    """Steps per evaluation by the two above."""
    picture_noise: float = PICTURE_NOISE
    """On given pictures: more motion."""
    seed: int = 43
    """Equal seeds give equal videos."""

    def __post_init__(self):
        for name in FILES:
            if given(self, name):
                try:
                    object.__setattr__(self, name, str(place(getattr(self, name))))
                except ValueError as error:
                    raise ValueError(f"--{option(name)}: {error}") from error


class Asked(NamedTuple):
    """A request and its place in a prompt file."""

    request: SampleRequest
    line: int | None = None  # number in the prompt file
    where: str = ""  # prefix of error messages
    evaluations: int = 0  # network evaluations of the completed request

    @contextmanager
    def named(self) -> Iterator[None]:
        """Add the line of the prompt file to ValueError and OSError, raised as ValueError."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where}{error}") from error


def read_lines(prompts: Path, common: SampleRequest) -> list[Asked]:
    """Return one request per line of a prompt file: `common` with the values of the line.

    Raises ValueError for a missing file, and for a line that is not a JSON object of known keys.
    """
    if not prompts.is_file():
        raise ValueError(f"there is no prompt file {prompts}")
    try:
        # Not splitlines: JSON strings may hold U+2028 and U+0085, at which it would split.
        lines = prompts.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts} is not UTF-8 text ({error}); save it as UTF-8") from error
    found = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        where = f"{prompts}, line {number}: "
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}not JSON ({error})") from error
        one = Asked(common, number, where)
        values = _check_line(line, where)
        with one.named():
            found.append(one._replace(request=dataclasses.replace(common, **values)))
    if not found:
        raise ValueError(f"{prompts} holds no line; write one JSON object per line")
    return found


def _check_line(line, where: str) -> dict:
    """Return a line's values. Raise ValueError for unknown keys and values of wrong types."""
    if not isinstance(line, dict) or "prompt" not in line:
        raise ValueError(f'{where}an object with a "prompt" is wanted, as {{"prompt": "..."}}')
    kinds = dict.fromkeys((*WORDS, *FILES), str) | dict.fromkeys(NUMBERS, int)
    kinds |= {"strength": (int, float)}
    for key, value in line.items():
        if key not in kinds:
            raise ValueError(f"{where}no key {key!r}; use {', '.join(LINE_KEYS)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ValueError(f"{where}{key} is {json.dumps(value)}, which is of another type")
    return line | {"strength": float(line["strength"])} if "strength" in line else line


def check(request: SampleRequest) -> None:
    """Raise ValueError for a request that no checkpoint could serve."""
    frames, height, width = request.frames, request.height, request.width
    check_size(1 if frames is None else frames, height or CELL, width or CELL)
    for name in ("height", "width"):
        if getattr(request, name) == 0:
            raise ValueError(f"--{name} 0: use {CELL} or more")
    if request.segment is not None:
        check_size(request.segment, CELL, CELL)
        shared = OVERLAP if request.overlap is None else request.overlap
        if request.segment <= 2 * shared:
            raise ValueError(
                f"--segment {request.segment}: segments share {shared} frames; use more than "
                f"{2 * shared}"
            )
    if request.size == "like" and request.height and request.width:
        raise ValueError("--size like says nothing beside --height and --width: leave it out")
    if len(times := read_times(request.times)) not in (0, request.steps or len(times)):
        raise ValueError(f"--times gives {len(times)} steps, and --steps {request.steps}: use one")
    for name, low, high in RANGES:
        check_range(name, getattr(request, name), low, high)
    for name in WORDS[:2]:
        try:
            getattr(request, name).encode()
        except UnicodeEncodeError as error:
            message = f"--{option(name)} is not UTF-8 text; save and pass it as UTF-8"
            raise ValueError(message) from error
    for one, other in ALONE:
        if given(request, one) and given(request, other):
            raise ValueError(f"--{option(one)} and --{option(other)} cannot both be given")
    for one, other in NEEDS:
        if given(request, one) and not given(request, other):
            raise ValueError(f"--{option(one)} says nothing without --{option(other)}")
    if (request.image or request.end_image) and frames == 1:
        raise ValueError(
            "--frames 1 makes one picture, and pictures are given; use 5 frames or more"
        )
    for name in FILES:
        if given(request, name) and not place(getattr(request, name)).is_file():
            raise ValueError(f"--{option(name)}: there is no file {getattr(request, name)}")


def read_times(text: str | None) -> tuple[float, ...]:
    """Return the times of `1000,891,731,475`; None are none. Raises ValueError for other texts."""
    try:
        times = tuple(float(word) for word in (text or "").split(",") if text)
    except ValueError:
        times = (math.nan,)
    if not all(map(math.isfinite, times)):
        raise ValueError(f"--times {text}: give numbers with commas, such as 1000,891,731,475")
    return times


def check_tile(tile: int | None) -> None:
    """Raise ValueError for tiles of a size that the VAE cannot decode; None is no tiles."""
    if tile is not None and (tile < LEAST_TILE or tile % CELL):
        raise ValueError(f"tile is {tile}: use a multiple of {CELL} pixels, {LEAST_TILE} or more")


def check_range(name: str, value: int | float | None, low: int, high: int) -> None:
    """Raise ValueError for a number outside its range; None is allowed."""
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"--{option(name)} {value} is not between {low} and {high}")


def without_effect(request: SampleRequest) -> list[str]:
    """Return one sentence for each option that has no effect on a completed request."""
    found = []
    if request.negative_prompt and request.guidance == 1:
        found.append("--negative-prompt has no effect with --guidance 1")
    pictures = any(given(request, name) for name in ("image", "end_image", "video"))
    if request.picture_noise != PICTURE_NOISE and not pictures:
        found.append("--picture-noise has no effect without --image, --end-image or --video")
    if request.fps != FPS and request.frames == 1:
        found.append(f"--fps {request.fps} has no effect on a picture")
    if request.fit == "stretch" and not any(given(request, name) for name in PIXELS):
        found.append("--fit stretch has no effect without a picture or a film")
    if request.cache_interval != CACHE_INTERVAL and not request.magcache + request.taylorseer:
        found.append("--cache-interval has no effect without --magcache or --taylorseer")
    if request.segment is not None and request.frames <= request.segment:
        found.append(
            f"--segment {request.segment} has no effect on a video of {request.frames} frames"
        )
    return found


def given(request: SampleRequest, name: str) -> bool:
    """Return True if the request sets this field."""
    return getattr(request, name) is not None


def option(name: str) -> str:
    """Return a field's name on the command line."""
    return name.replace("_", "-")
