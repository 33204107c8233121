"""Read folders and tables: metadata.json, .jsonl, .csv, parquet, videos.txt, files side by side."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from easyanimate_jax.data.paths import open_regular, safe_path
from easyanimate_jax.data.sources.rows import Problem, Row

NAMES = ("file_path", "path", "video_path", "video", "image_path", "image", "file", "file_name")
TEXTS = ("text", "caption", "prompt", "captions")
MEDIA = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".mts", ".m2ts", ".flv", ".mjpeg"),
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".apng", ".avif", ".heic", ".tif", ".tiff"),
)


def metadata(path: Path) -> Iterator[Row | Problem]:
    """Yield the rows of EasyAnimate's table, or of a table with usual column names.

    Raises ValueError if the file is not a table; a bad row yields a `Problem`.
    """
    if path.suffix.lower() == ".csv":
        yield from _csv(path)
    elif path.suffix.lower() == ".jsonl":
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                yield _json_row(number, line)
    else:
        try:
            table = json.loads(open_regular(path).read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(table, list):
            raise ValueError(f"{path} must be a list of objects with file_path, text and type")
        for number, row in enumerate(table):
            yield _row(number, row)


def parquet(path: Path) -> Iterator[Row | Problem]:
    """Yield the rows of a table with a path column and a column of one or several captions.

    Raises ValueError for an unreadable table.
    """
    try:
        file = pyarrow.parquet.ParquetFile(path)
        have = file.schema_arrow.names
        columns = [name for name in (*NAMES, *TEXTS, "type") if name in have]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                for text in _captions(row):
                    yield _row(number, row | {"text": text})
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a readable parquet table: {error}") from error


def lists(folder: Path) -> Iterator[Row | Problem]:
    """Yield the rows of `videos.txt` and `prompt.txt` (or `prompts.txt`), one line per clip.

    Raises ValueError if there is no file of prompts.
    """
    prompts = next(
        (folder / n for n in ("prompt.txt", "prompts.txt") if (folder / n).is_file()), None
    )
    if prompts is None:
        raise ValueError(f"{folder / 'videos.txt'} has no prompt.txt beside it; write one")
    names, texts = list(_lines(folder / "videos.txt")), list(_lines(prompts))
    for number in range(max(len(names), len(texts))):
        name = names[number].strip() if number < len(names) else ""
        text = texts[number] if number < len(texts) else None
        if name or (text and text.strip()):
            yield Row(number + 1, name, text)


def side_by_side(folder: Path, links: str | Path | None) -> Iterator[Row | Problem]:
    """Yield every media file below the folder with the text file of its name, in sorted order.

    A row's number is its position in that order. Raises ValueError if there are no media files.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in MEDIA)
    if not files:
        raise ValueError(
            f"{folder} holds neither metadata.json, .jsonl or .csv, nor videos.txt, tars, a TFDS "
            f"data set, or media files with a .txt beside them; add one of these"
        )
    for number, path in enumerate(files):
        name = path.relative_to(folder)
        try:
            text = safe_path(folder, str(name.with_suffix(".txt")), links)
            yield Row(number, str(name), open_regular(text).read().decode("utf-8-sig").strip())
        except ValueError as error:
            yield Problem(number, str(name), f"no text: {error}")


def _csv(path: Path) -> Iterator[Row | Problem]:
    # Bytes that are not UTF-8 become surrogates: only their row is refused, not the file.
    lines = csv.DictReader(_lines(path, "surrogateescape", keep_ends=True))
    while True:
        number = lines.line_num + 1
        try:
            row = next(lines, None)
        except csv.Error as error:
            yield Problem(number, "", f"not CSV: {error}")
            continue
        if row is None:
            return
        yield _row(lines.line_num, row)


def _lines(path: Path, errors: str = "surrogateescape", keep_ends: bool = False) -> Iterator[str]:
    with open_regular(path) as file:
        for number, line in enumerate(file):
            text = line.decode("utf-8-sig" if number == 0 else "utf-8", errors)
            yield text if keep_ends else text.rstrip("\r\n")


def _json_row(number: int, line: str) -> Row | Problem:
    try:
        return _row(number, json.loads(line))
    except (ValueError, RecursionError) as error:
        return Problem(number, "", f"not JSON: {error}")


def _row(number: int, row: object) -> Row | Problem:
    """Return a row of a table.

    EasyAnimate treats a row without `type` as a picture. In other tables the file decides.
    """
    if not isinstance(row, dict):
        return Problem(number, "", f"the row is of type {type(row).__name__}, not an object")
    name = next((row[key] for key in NAMES if row.get(key) is not None), None)
    text = next((row[key] for key in TEXTS if row.get(key) is not None), None)
    kind = row.get("type") or ("image" if "file_path" in row else None)
    return Row(number, name, text, kind, control=row.get("control_file_path") or None)


def _captions(row: dict) -> list:
    text = next((row[key] for key in TEXTS if row.get(key) is not None), None)
    return text if isinstance(text, list) and text else [text]
