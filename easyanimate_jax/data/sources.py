"""A folder of captioned videos and pictures, as EasyAnimate's `metadata.json` or csv describes it.

Columns (spec 8.1): `file_path` relative to the folder, `text`, `type` ("image" unless given, or
"video"). Others are ignored: sizes come from the files. Rows that name the same file are one clip
with several captions; this is how the English and the Chinese caption of a clip are given.
"""

import csv
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from easyanimate_jax.data import media


@dataclass(frozen=True)
class Clip:
    name: str  # `file_path` as written: the clip's identity
    path: Path
    kind: str  # "video" or "image"
    captions: tuple[str, ...]
    num_frames: int
    height: int
    width: int
    fps: float  # 0 for images


class Problem(NamedTuple):
    row: int  # of the metadata file, from 0
    file: str
    reason: str


def read_folder(folder: str | Path) -> tuple[list[Clip], list[Problem]]:
    """The usable clips in order of first mention, and every row that is not usable."""
    folder = Path(folder)
    rows: dict[str, list[tuple[int, str, str]]] = {}  # name -> (row, kind, caption)
    problems = []
    for number, row in enumerate(_read_rows(folder)):
        name, text, kind = (row.get(k) for k in ("file_path", "text", "type"))
        kind = kind or "image"
        if not isinstance(name, str) or not name:
            problems.append(Problem(number, "", "no file_path"))
        elif not isinstance(text, str) or not text.strip():
            problems.append(Problem(number, name, "no text"))
        elif kind not in ("image", "video"):
            problems.append(Problem(number, name, f"type {kind!r} is neither 'image' nor 'video'"))
        else:
            rows.setdefault(name, []).append((number, kind, text))

    clips = []
    with ThreadPoolExecutor() as pool:
        for (name, mentions), found in zip(
            rows.items(), pool.map(lambda name: _probe(folder, name), rows), strict=True
        ):
            if isinstance(found, ValueError):
                problems += [Problem(number, name, str(found)) for number, _, _ in mentions]
                continue
            path, header = found
            captions = []
            for number, kind, text in mentions:
                if kind != header.kind:
                    reason = f"type is {kind!r}, but the file holds {header.kind}"
                    problems.append(Problem(number, name, reason))
                else:
                    captions.append(text)
            if captions:
                _, num_frames, height, width, fps = header
                clips.append(
                    Clip(name, path, header.kind, tuple(captions), num_frames, height, width, fps)
                )
    problems.sort()
    if not clips:
        listed = "".join(f"\n  row {p.row} {p.file}: {p.reason}" for p in problems[:20])
        raise ValueError(f"{folder} describes no usable clip ({len(problems)} bad rows){listed}")
    return clips, problems


def _probe(folder: Path, name: str) -> tuple[Path, media.Probe] | ValueError:
    try:
        path = media.safe_path(folder, name)
        return path, media.probe(path)
    except ValueError as error:
        return error


def _read_rows(folder: Path) -> Iterator[dict]:
    as_json, as_csv = folder / "metadata.json", folder / "metadata.csv"
    if as_json.is_file():
        try:
            rows = json.loads(as_json.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{as_json} is not JSON: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{as_json} must be a list of objects with file_path, text and type")
        yield from rows
    elif as_csv.is_file():
        with open(as_csv, newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)
    else:
        raise ValueError(f"{folder} holds neither metadata.json nor metadata.csv; write one")
