"""Turn raw films into a table of clips: probe, cut, score, remove near-duplicates, report.

    python -m easyanimate_jax curate SOURCE OUT

`SOURCE` is a source of data/sources whose films are files, with or without captions. No video is
rewritten: a clip is a span of a file. OUT/clips.parquet has one row per clip with its scores, and
the reason if it was left out; a config can use it as `source`. Rows of the source that name no
usable film are rows of it too. OUT/films/ has one file per finished film, so that a stopped run can
resume; a film is cut again if its content, its types, or the rules are others than those in that
file, and asks for captions again if these, or the models, are others. `--part 2/8` shares the films
between 8 processes. OUT/funnel.txt and OUT/funnel.html list what was left out at each step.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from easyanimate_jax.data import media
from easyanimate_jax.data.contents import kept_contents, key
from easyanimate_jax.data.decode import Decoders
from easyanimate_jax.data.sources import clip_table
from easyanimate_jax.facts import check_fields
from easyanimate_jax.prepare import funnel
from easyanimate_jax.prepare.clip_captions import ORIGINAL, Captioner, Captions, Rewriter
from easyanimate_jax.prepare.clip_rows import SMALL, film_rows, told_again
from easyanimate_jax.prepare.duplicates import find_repeats
from easyanimate_jax.prepare.film_folder import FilmFolder
from easyanimate_jax.prepare.scores import SCORES, Score, check_names
from easyanimate_jax.prepare.settings import told
from easyanimate_jax.prepare.shots import Splitting
from easyanimate_jax.storage.lock import part_lock
from easyanimate_jax.storage.stores import (
    Place,
    list_names,
    make_folder,
    place,
    replace,
    replace_text,
)

READERS = 64  # files of finished films that are read at once


@dataclass(frozen=True)
class Rules:
    """Rules for cutting films and for the least size; the scores have their own thresholds."""

    splitting: Splitting = Splitting()
    """Rules for the length of clips."""

    min_pixels: int = 512 * 512
    """Least pixels of a frame; 0 accepts all sizes. The default is the reference's (spec 13)."""

    def __post_init__(self):
        check_fields(self, min_pixels="[0, inf)")


def in_threads(films: "Films", names: Sequence[str], workers: int) -> None:
    """Make the rows of films in threads. Raises ConnectionError if the captioner does not serve."""
    decoders, served = Decoders(workers), True

    def work(name: str) -> None:
        nonlocal served
        try:
            if served:
                films.finish(name, decoders)
        except ConnectionError:
            served = False
            raise

    try:
        with ThreadPoolExecutor(workers) as pool:
            list(tqdm(pool.map(work, names), total=len(names), desc="films", unit="film"))
    finally:
        decoders.close()


def curate(
    source: str | Place,
    out: str | Place,
    rules: Rules = Rules(),
    scores: Sequence[Score] = SCORES,
    captioner: Captioner | None = None,
    rewriter: Rewriter | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    workers: int | None = None,
    links: Path | None = None,
    finish: Callable[["Films", Sequence[str], int], object] = in_threads,
) -> list[dict] | None:
    """Make the table of clips and return its rows; return None while other parts are not done.

    Captions are those of the source, or those that `captioner` writes for stills of a clip.
    `rewriter` writes them anew. `part` (k, n) takes every n-th film from the k-th on, and decodes
    with `workers` threads (default: one per CPU). Links of the source may lead into the folder
    `links`. `finish` makes the rows of the films; prepare/film_tasks.py has another one. Raises
    ValueError if another process makes this part, and ConnectionError if a model does not serve;
    the films that are not finished are left.
    """
    source, out = place(source), place(out)
    captions = Captions(captioner, rewriter, scores, rules.min_pixels)
    check_names(scores, {*_fields((), ORIGINAL)})
    with part_lock(out, "OUT", part) as lock:
        folder = FilmFolder(source, links)
        lock.begun = True
        films = Films(out, folder, rules, scores, captions)
        mine = list(folder.films)[part[0] :: part[1]]
        try:
            finish(films, mine, workers or os.cpu_count())
        except ConnectionError as error:
            left = f"{sum(films.rows(name) is None for name in mine)} of {len(folder.films)} films"
            repair = "are not finished: start the server, then run the same command again"
            raise ConnectionError(f"{error}; {left} {repair}") from error
        rows = films.all_rows()
        if rows is None:
            return None
        rows += folder.unusable_rows()
        _judge(rows, rules, scores)
        _rate(rows, scores)
        fields = _fields(scores, *([ORIGINAL] if rewriter else []))
        _write(out / "clips.parquet", rows, _relative(folder.root, out), fields)
        funnel.write(out, rows, _thumbnails(folder, rows))
        return rows


class Films:
    """The finished films in OUT/films, one JSON file each: the key of its content, and its rows."""

    def __init__(
        self,
        out: Place,
        folder: FilmFolder,
        rules: Rules,
        scores: Sequence[Score],
        captions: Captions,
    ):
        self.out, self.folder = out / "films", folder
        self.rules, self.scores, self.captions = rules, scores, captions
        make_folder(self.out)
        self.contents = kept_contents(out)
        measures = [(s.name, s.frames, told(s.measure)) for s in scores if not s.of_captions]
        self.settings = key(dataclasses.asdict(rules), measures)

    def __reduce__(self):
        """Make it anew in another process, which keeps its own hashes of files."""
        made_of = self.out.parent, self.folder, self.rules, self.scores, self.captions
        return Films, made_of, {"settings": self.settings}

    def finish(self, name: str, decoders: Decoders) -> None:
        """Make the rows of a film and keep them, unless they are kept.

        Raises ConnectionError if a model does not serve.
        """
        made_of = self.key(name)  # before it is read: it may change meanwhile
        rows = self.kept(name)
        if rows is None:
            how = self.rules.splitting, self.scores, self.captions
            self.keep(name, made_of, film_rows(decoders, self.folder, name, *how))
        elif self._lacks(name, rows):
            rows = told_again(decoders, self.folder, name, rows, self.captions)
            self.keep(name, made_of, rows)

    def rows(self, name: str) -> list[dict] | None:
        """Return the rows of a film for the table; None if it is not finished."""
        rows = self.kept(name)
        if rows is None or self._lacks(name, rows):
            return None
        return [self.captions.shown(row, self.folder.films[name]) for row in rows]

    def kept(self, name: str) -> list[dict] | None:
        """Return the rows of a film that are kept; None if they are of another content."""
        path = self._path(name)
        made = json.loads(path.read_text("utf-8")) if path.is_file() else None
        if made is None or made["key"] != self.key(name):
            return None
        return made["rows"]

    def _lacks(self, name: str, rows: list[dict]) -> bool:
        """Return whether a clip of a film wants captions that it does not have."""
        return any(self.captions.lacks(row, self.folder.films[name]) for row in rows)

    def keep(self, name: str, made_of: str, rows: list[dict]) -> None:
        """Write the rows of a film, and the key of what they were made of."""
        replace_text(self._path(name), json.dumps({"key": made_of, "rows": rows}))

    def all_rows(self) -> list[dict] | None:
        """Return the rows of all films; None if one is not finished."""
        have = set(list_names(self.out))
        if not all(self._path(name).name in have for name in self.folder.films):
            return None  # and do not hash the films of other parts
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(self.rows, self.folder.films))
        return None if None in found else list(itertools.chain.from_iterable(found))

    def _path(self, name: str) -> Place:
        return self.out / f"{key(self.settings, name)}.json"

    def key(self, name: str) -> str:
        """Return the key of a film's content and types."""
        try:
            content = self.contents(self.folder.path(name))
        except ValueError as error:  # the name is refused
            content = str(error)
        return key(content, sorted(self.folder.films[name].kinds))


def _relative(root: Place, out: Place) -> str:
    """Return the folder of the films as the table names it: relative to the table, or a URL."""
    local = isinstance(root, Path) and isinstance(out, Path)
    return os.path.relpath(root, out) if local else str(root)


def _judge(rows: list[dict], rules: Rules, scores: Sequence[Score]) -> None:
    """Set `left_out` of the rows, step by step; each step checks the rows left by the previous."""

    def drop(reason: str, bad: Callable[[dict], bool]) -> None:
        for row in rows:
            if not row["left_out"] and bad(row):
                row["left_out"] = reason

    least = rules.min_pixels
    drop(f"fewer than {least:,} pixels a frame", lambda row: row["height"] * row["width"] < least)
    for row in _near_duplicates([row for row in rows if not row["left_out"]]):
        row["left_out"] = "near-duplicate of another clip"
    for score in scores:
        for row in rows:
            row["left_out"] = row["left_out"] or score.fault(row)
    drop("no caption", lambda row: not row["captions"])


def _rate(rows: list[dict], scores: Sequence[Score]) -> None:
    """Set `quality` of each kept row: the share of kept clips of its kind with a lower rank.

    Clips are ranked by the sum of their ranks in all scores.
    """
    for kind in ("image", "video"):
        kept = [row for row in rows if not row["left_out"] and row["kind"] == kind]
        total = np.zeros(len(kept))
        for score in scores:
            if kept and score.name in kept[0]:
                total += score.better * _rank([row[score.name] for row in kept])
        for row, rank in zip(kept, _rank(total), strict=True):
            row["quality"] = float(rank / len(kept))


def _rank(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return for each value how many of the values are smaller."""
    return np.searchsorted(np.sort(values), values)


def _near_duplicates(rows: list[dict]) -> list[dict]:
    """Return the rows whose picture is that of a larger or earlier clip of their kind."""
    found = []
    for kind in ("image", "video"):
        same = sorted(
            (row for row in rows if row["kind"] == kind), key=lambda r: -r["height"] * r["width"]
        )
        hashes = np.fromiter((row["hash"] for row in same), np.uint64, len(same))
        found += itertools.compress(same, find_repeats(hashes).repeated)
    return found


def _fields(scores: Sequence[Score], *captions: str) -> dict[str, pyarrow.DataType]:
    """Return the columns of the table; `captions` are further ones of captions."""
    fields = dict(clip_table.COLUMNS) | {s.name: pyarrow.float64() for s in scores}
    fields |= dict.fromkeys(captions, clip_table.COLUMNS["captions"])
    fields |= {clip_table.FILM_FRAMES: pyarrow.int64(), "quality": pyarrow.float64()}
    return fields | {"left_out": pyarrow.string()}


def _write(path: Place, rows: list[dict], root: str, fields: dict[str, pyarrow.DataType]) -> None:
    columns = {name: [row.get(name) for row in rows] for name in fields}
    schema = pyarrow.schema(fields, metadata={"root": root})
    table = pyarrow.table(columns, schema)

    def write(new: Path) -> None:
        with open(new, "wb") as file:  # Arrow would take some names for URLs
            pyarrow.parquet.write_table(table, file)

    replace(path, write)


def _thumbnails(folder: FilmFolder, rows: list[dict]) -> dict[str, np.ndarray]:
    """Return {clip name: its middle frame} for the rows that the page shows."""
    decoders, found = Decoders(1), {}
    for row in funnel.shown(rows):
        try:
            path = folder.path(row["file"])
            if row["kind"] == "image":
                size = media.fit_side(row["height"], row["width"], SMALL)
                found[row["clip"]] = decoders.read_still(path, size)[0]
            else:
                middle = row["first"] + row["frames"] // 2
                found[row["clip"]] = decoders.read_frames(path, [middle], SMALL)[0]
        except ValueError:  # the row already has the reason
            continue
    decoders.close()
    return found
