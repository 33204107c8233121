"""Read folders and tables: metadata.json, .jsonl, .csv, videos.txt, files side by side."""

import codecs
import csv
import io
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath

from easyanimate_jax.data.paths import is_there, open_regular, safe_path
from easyanimate_jax.data.sources.folders import Folder
from easyanimate_jax.data.sources.rows import Problem, Row
from easyanimate_jax.storage.stores import Place

logger = logging.getLogger(__name__)

NAMES = (
    *("file_path", "path", "video_path", "video", "image_path", "image", "file", "file_name"),
    *("filename", "filepath"),
)
TEXTS = ("text", "caption", "prompt", "captions", "txt")
KNOWN = {*NAMES, *TEXTS, "type", "control_file_path", "worse_file_path"}
MEDIA = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".mts", ".m2ts", ".flv", ".mjpeg"),
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".apng", ".avif", ".heic", ".tif", ".tiff"),
)
DELIMITERS = ",;\t|"
TEXTS_AT_ONCE = 16  # files of captions that are read at the same time
MANY = 20  # files of one ending; more are counted, not listed


def metadata(path: Place) -> Iterator[Row | Problem]:
    """Yield the rows of EasyAnimate's table, or of a table with usual column names.

    Raises ValueError if the file is not a table; a bad row yields a `Problem`.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from _csv(path)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _json_lines(path)
    else:
        try:
            with open_regular(path) as file:
                table = json.loads(file.read())  # finds UTF-16 and marks of byte order
        except (ValueError, RecursionError) as error:
            if isinstance(_first_object(path), dict):
                yield from _json_lines(path)
                return
            raise ValueError(f"{path} is not JSON: {error}") from error
        if isinstance(table, dict) and {*NAMES} & {*map(key_of, table)}:
            table = [table]  # JSON lines with a single line
        if not isinstance(table, list):
            raise ValueError(f"{path} must be a list of objects with file_path, text and type")
        for number, row in enumerate(table):
            yield row_of(number, row)


def lists(folder: Place) -> Iterator[Row | Problem]:
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


def side_by_side(folder: Folder, links: str | Path | None) -> Iterator[Row | Problem]:
    """Yield every media file below the folder with the text file of its name, in sorted order.

    A row's number is its position in that order, and its text is None without a text file. Other
    files yield a `Problem`. Raises ValueError if there are no media files.
    """
    media = [name for name in folder.names if suffix_of(name) in MEDIA]
    others = [n for n in folder.names if suffix_of(n) not in MEDIA and folder.has_file(n)]
    if not media:
        endings = ", ".join(sorted({PurePosixPath(name).suffix for name in others})) or "nothing"
        raise ValueError(
            f"{folder} holds neither metadata.json, .jsonl or .csv, nor videos.txt, tars, a TFDS "
            f"data set, or media files with a .txt beside them (endings found: {endings}); add one "
            f"of these"
        )

    def row(number: int, name: str) -> Row | Problem:
        text, caption = str(PurePosixPath(name).with_suffix(".txt")), None
        try:
            if folder.has(text):
                with open_regular(safe_path(folder.place, text, links)) as file:
                    caption = decoded(file.read()).strip()
            return Row(number, name, caption, stamp=folder.stamp(name))
        except ValueError as error:
            return Problem(number, name, f"no text: {error}")

    with ThreadPoolExecutor(TEXTS_AT_ONCE) as pool:
        for some in batched(enumerate(media)):
            yield from pool.map(lambda one: row(*one), some)
    texts = [name for name in others if suffix_of(name) == ".txt"]
    known = {PurePosixPath(name).with_suffix("") for name in {*folder.names} - {*texts}}
    lost = [name for name in texts if PurePosixPath(name).with_suffix("") not in known]
    yield from unread(folder, lost, "no film or picture has its name")
    yield from unread(folder, {*others} - {*texts})


def has_media(folder: Folder) -> bool:
    """Return True if a file below the folder has the ending of a film or picture."""
    return any(suffix_of(name) in MEDIA for name in folder.names)


def batched(items: Iterable) -> Iterator[list]:
    """Yield the items in lists, so that only so many are waited for at once."""
    items = iter(items)
    while some := list(islice(items, 16 * TEXTS_AT_ONCE)):
        yield some


def suffix_of(name: str) -> str:
    """Return the ending of a name in small letters, with its dot."""
    return PurePosixPath(name).suffix.lower()


def unread(
    folder: Folder, names: Iterable[str], why: str = "files of this kind are not read here"
) -> Iterator[Problem]:
    """Yield a `Problem` for each file, or one for each ending that more than `MANY` of them have.

    Hidden files are left out.
    """
    by_ending = defaultdict(list)
    for name in names:
        path = PurePosixPath(name)
        if folder.has_file(name) and not path.name.startswith("."):
            by_ending[path.suffix].append(name)
    for ending, some in sorted(by_ending.items()):
        if len(some) > MANY:
            yield Problem(0, f"*{ending}", f"{len(some):,} files: {why}")
        else:
            yield from (Problem(0, name, why) for name in sorted(some))


def decoded(content: bytes) -> str:
    """Return the text of a file in UTF-8, UTF-16 or UTF-32. Raises ValueError for other bytes."""
    return content.decode(_encoding(content[:4]))


def _encoding(start: bytes) -> str:
    """Return the encoding of a text that begins with these four bytes."""
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    zeros = [byte == 0 for byte in start]  # of Latin letters without a mark of byte order
    for odd, encoding in ((True, "utf-16-le"), (False, "utf-16-be")):
        if zeros == [not odd, odd] * 2:
            return encoding
    return "utf-8-sig"


def _csv(path: Place) -> Iterator[Row | Problem]:
    lines, some = _lines(path, keep_ends=True), []  # some: the lines of a row
    before, delimiter, columns = _header(path, lines)
    check_columns(path, columns)
    noted = (some.append(line) or line for line in lines)
    rows = csv.DictReader(noted, columns, delimiter=delimiter, skipinitialspace=True)
    while True:
        number = rows.line_num + before + 1
        some.clear()
        try:
            row = next(rows, None)
            written = next(csv.DictReader(some, columns, delimiter=delimiter), {})
            if len(some) > 1:  # several lines may be one text in quotes, or lack a quote
                list(csv.reader(some, delimiter=delimiter, skipinitialspace=True, strict=True))
        except csv.Error as error:
            yield Problem(number, "", f"not CSV: {error}; close its quotes")
            continue
        if row is None:
            return
        more = [cell for cell in row.pop(None, []) if cell.strip()]
        row = {key: v.strip() if isinstance(v, str) else v for key, v in row.items()}
        found = row_of(rows.line_num + before, row | _spaced(path.parent, row, written))
        if more and columns[-1] in TEXTS and isinstance(found, Row):
            reason = f"the row has {len(more)} cells more than the header; put its text in quotes"
            found = Problem(found.number, str(found.name or ""), reason)
        yield found


def _spaced(folder: Place, row: dict, written: dict) -> dict:
    """Return the names in a row, as written, that have spaces around them in the folder too."""
    found = {key: name for key in KNOWN & {*row} if isinstance(name := written.get(key), str)}
    return {
        key: name
        for key, name in found.items()
        if key not in TEXTS and name.strip() == row[key] != name
        if is_there(folder, name)
    }


def _header(path: Place, lines: Iterator[str]) -> tuple[int, str, list[str]]:
    """Return the number of lines up to the header, the delimiter, and the columns.

    Empty lines may come before, and `sep=;`, by which Excel names the delimiter. Otherwise it is
    the one that gives most known names.
    """
    delimiters, before, line = DELIMITERS, 0, ""
    for line in lines:
        before += 1
        told = re.fullmatch(r"sep=(.)", line.strip('\r\n"'), re.IGNORECASE)
        delimiters = told[1] if told else delimiters
        if line.strip() and not told:
            break
    found = []
    for delimiter in delimiters:
        try:
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error as error:
            raise ValueError(f"{path}: its first line is no header: {error}") from error
        columns = [key_of(cell) for cell in cells]
        found.append((len(KNOWN & {*columns}), len(columns), delimiter, columns))
    return before, *max(found, key=lambda one: one[:2])[2:]


def check_columns(path: Place, columns: list[str], files: bool = True) -> None:
    """Log a table that has no column of captions.

    If it should have one of `files`, raises ValueError without one.
    """
    told = f"its columns are {', '.join(column[:40] for column in columns[:20])}"
    twice = sorted(name for name in KNOWN if columns.count(name) > 1)
    if twice:
        raise ValueError(f"{path} has several columns {', '.join(twice)}: {told}; keep one of each")
    if files and not {*NAMES} & {*columns}:
        raise ValueError(f"{path} has no column of files: {told}; name one {', '.join(NAMES)}")
    if not {*TEXTS} & {*columns}:
        logger.warning(f"{path} has no column of captions: {told}; name one {', '.join(TEXTS)}")


def _lines(path: Place, keep_ends: bool = False) -> Iterator[str]:
    # Bytes that are not UTF-8 become surrogates: only their row is refused, not the file.
    with open_regular(path) as file:
        encoding = _encoding(file.peek(4)[:4])
        errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
        newline = "" if keep_ends else "\n"  # "": old tables may end their lines by "\r"
        for line in io.TextIOWrapper(file, encoding, errors, newline=newline):
            yield line if keep_ends else line.rstrip("\r\n")


def _json_lines(path: Place) -> Iterator[Row | Problem]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _json_row(number, line)


def _first_object(path: Place) -> object:
    """Return the first line of a file that is not empty, as JSON; None if it is none."""
    try:
        return json.loads(next((line for line in _lines(path) if line.strip()), ""))
    except (ValueError, RecursionError):
        return None


def _json_row(number: int, line: str) -> Row | Problem:
    try:
        return row_of(number, json.loads(line))
    except (ValueError, RecursionError) as error:
        return Problem(number, "", f"not JSON: {error}")


def row_of(number: int, row: object) -> Row | Problem:
    """Return a row of a table.

    EasyAnimate treats a row without `type` as a picture. In other tables the file decides.
    """
    if not isinstance(row, dict):
        return Problem(number, "", f"the row is of type {type(row).__name__}, not an object")
    row = {key_of(name): value for name, value in row.items()}
    if not {*NAMES} & {*row}:
        told = ", ".join(name[:40] for name in list(row)[:20])
        return Problem(number, "", f"no file_path: its columns are {told}")
    name = next((row[key] for key in NAMES if row.get(key) is not None), None)
    text = next((row[key] for key in TEXTS if row.get(key) is not None), None)
    kind = row.get("type") or ("image" if "file_path" in row else None)
    control, worse = (row.get(f"{what}_file_path") or None for what in ("control", "worse"))
    return Row(number, name, text, kind, control=control, worse=worse)


def key_of(name: object) -> str:
    """Return the name of a column as our tables write it: `file_path` for ` File Path`."""
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")
