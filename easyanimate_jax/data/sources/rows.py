"""The common form of all layouts: rows that name a file and a caption, and their faults."""

from dataclasses import dataclass
from typing import NamedTuple

from easyanimate_jax.data.media import File
from easyanimate_jax.storage.stores import Place, Version

NO_TEXT = "no text"
KINDS = ("image", "video")
MAX_CAPTION = 20_000  # characters; an encoder reads a few hundred tokens


@dataclass(frozen=True)
class Clip:
    """A usable clip: a file or a span of its frames, its captions, its size and its rate."""

    name: str  # `file_path` as written; it identifies the clip
    path: File
    kind: str  # "video" or "image"
    captions: tuple[str, ...]
    num_frames: int
    height: int
    width: int
    fps: float  # 0 for images
    first: int = 0  # first frame, counted in the file: a clip may be a span of a film
    source: str = ""  # name of its source in a mixture
    control: Place | None = None  # a control video or picture, or a pose file
    worse: Place | None = None  # the worse file of a pair, of the same size, length and rate
    quality: float = 0.0  # the share of its table's clips that it beats; 0 if it has no rating


class Row(NamedTuple):
    """A file and one caption, unchecked: `name`, `text` and `kind` are the values as written."""

    number: int  # number of the row, from 0, or of a text file's line, from 1
    name: object  # relative to the source's folder, if `file` is None
    text: object
    kind: object = None  # "image", "video", or None if the file decides
    file: File | None = None
    control: object = None  # relative to the source's folder
    worse: object = None  # likewise
    stamp: Version | None = None  # size and ETag of an object, if a listing told them


class Problem(NamedTuple):
    """A row that cannot be used, and the reason."""

    row: int
    file: str
    reason: str


def caption_of(text: object) -> str:
    """Return the reason why `text` cannot be a caption, or "" if it can."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return NO_TEXT
    if not isinstance(text, str):
        return f"text is of type {type(text).__name__}"
    if len(text) > MAX_CAPTION:
        return f"text has {len(text):,} characters; use at most {MAX_CAPTION:,}"
    if "\0" in text:
        return "text holds the character NUL"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"text is not Unicode: {error.reason} at character {error.start}"
    return ""
