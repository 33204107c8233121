"""What every layout is read to: rows that name a file and a caption, and what is wrong."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from easyanimate_jax.data.media import File

MAX_CAPTION = 20_000  # characters; an encoder reads some hundred tokens


@dataclass(frozen=True)
class Clip:
    name: str  # `file_path` as written: the clip's identity
    path: File
    kind: str  # "video" or "image"
    captions: tuple[str, ...]
    num_frames: int
    height: int
    width: int
    fps: float  # 0 for images
    first: int = 0  # frame of the file: a clip may be a span of a film
    source: str = ""  # its name in a mixture
    control: Path | None = None  # a control video or picture, or a pose file
    quality: float = 0.0  # the share of its table's clips that it beats; 0 where nobody rated it


class Row(NamedTuple):
    """A file and one caption, unchecked: `name`, `text` and `kind` are whatever was written."""

    number: int  # of the row, from 0, or of the line of a text file, from 1
    name: object  # relative to the source's folder, if `file` is None
    text: object
    kind: object = None  # "image", "video", or None where the file decides
    file: File | None = None
    control: object = None  # relative to the source's folder


class Problem(NamedTuple):
    row: int
    file: str
    reason: str


def caption_of(text: object) -> str:
    """Why `text` cannot be a caption, or ""."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return "no text"
    if not isinstance(text, str):
        return f"text is of type {type(text).__name__}"
    if len(text) > MAX_CAPTION:
        return f"text has {len(text):,} characters; at most {MAX_CAPTION:,} are read"
    if "\0" in text:
        return "text holds the character NUL"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"text is not Unicode: {error.reason} at character {error.start}"
    return ""
