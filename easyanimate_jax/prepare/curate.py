"""Turn raw films into a table of clips: probe, cut, score, remove near-duplicates, report.

    python -m easyanimate_jax curate SOURCE OUT

`SOURCE` is a source of data/sources whose films are files, with or without captions. No video is
rewritten: a clip is a span of a file. OUT/clips.parquet has one row per clip with its scores, and
the reason if it was left out; a config can use it as `source`. Rows of the source that name no
usable film are rows of it too. OUT/films/ has a record of each finished film (film_store.py), so
that a stopped run can resume; a film is cut again if its content, its types, or the rules are
others than those of the record, and models are asked again if captions or models are others.
`--part 2/8` shares the films between 8 processes. OUT/funnel.txt and OUT/funnel.html list what was
left out at each step.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from easyanimate_jax.data import media
from easyanimate_jax.data.decode import Decoders
from easyanimate_jax.data.sources import clip_table
from easyanimate_jax.prepare.clip_rows import SMALL
from easyanimate_jax.prepare.film_folder import FilmFolder
from easyanimate_jax.prepare.films import Films, Rules, in_threads
from easyanimate_jax.prepare.funnel import Funnel
from easyanimate_jax.prepare.judge import Judge, Verdict
from easyanimate_jax.prepare.model_steps import ORIGINAL, Models, ModelSteps
from easyanimate_jax.prepare.scores import SCORES, Score, check_names
from easyanimate_jax.storage.lock import part_lock
from easyanimate_jax.storage.stores import Place, place, replace

GROUP = 2**14  # rows of the table in memory, and in one of its groups
RULES, NONE = Rules(), Models()


def curate(
    source: str | Place,
    out: str | Place,
    rules: Rules = RULES,
    scores: Sequence[Score] = SCORES,
    models: Models = NONE,
    *,
    part: tuple[int, int] = (0, 1),
    workers: int | None = None,
    links: Path | None = None,
    finish: Callable[[Films, Sequence[str], int], object] = in_threads,
) -> Funnel | None:
    """Make the table of clips and return its funnel; return None while other parts are not done.

    Captions are those of the source, or those that the captioner of `models` writes. `part` (k, n)
    takes about every n-th film, and decodes with `workers` threads (default: one per CPU). Links of
    the source may lead into the folder `links`. `finish` makes the rows of the films;
    prepare/film_tasks.py has another one. Raises ValueError if another process makes this part, and
    ConnectionError if a model does not serve; the films that are not finished are left.
    """
    source, out = place(source), place(out)
    steps = ModelSteps(models, scores, rules.min_pixels)
    check_names(scores, {*_fields((), ORIGINAL)})
    with part_lock(out, "OUT", part) as lock:
        folder = FilmFolder(source, links)
        lock.begun = True
        films = Films(out, folder, rules, scores, steps)
        mine = films.names(part)
        try:
            finish(films, mine, workers or os.cpu_count())
        except ConnectionError as error:
            left = f"{sum(films.rows(name) is None for name in mine)} of {len(folder.films)} films"
            repair = "are not finished: start the server, then run the same command again"
            raise ConnectionError(f"{error}; {left} {repair}") from error
        return _table(films, models, out)


def _table(films: Films, models: Models, out: Place) -> Funnel | None:
    """Write the table and the funnel; return None if a film is not finished.

    The rows are read twice: to judge them all together, and to write them some at a time.
    """
    if not films.have_all():  # and do not hash the films of other parts
        return None
    scores, unusable = films.scores, films.folder.unusable_rows()
    judge = Judge(films.rules.min_pixels, scores, models.embedding, out)
    for rows in films.all_rows():
        if rows is None:
            return None
        for row in rows:
            judge.add(row)
    for row in unusable:
        judge.add(row)
    verdict, funnel = judge.decide(), Funnel()
    fields = _fields(scores, *([ORIGINAL] if models.rewriter else []))
    schema = pyarrow.schema(fields, metadata={"root": _relative(films.folder.root, out)})
    rows = _judged(itertools.chain(films.all_rows(), [unusable]), verdict, funnel)
    replace(out / "clips.parquet", lambda new: _write(new, rows, schema))
    funnel.write(out, _thumbnails(films.folder, funnel))
    return funnel


def _judged(films: Iterable[list[dict] | None], verdict: Verdict, funnel: Funnel) -> Iterator[dict]:
    """Yield the rows of films with the verdict on them, and count them.

    Raises ValueError if the films have other rows than those that were judged.
    """
    number, count = 0, len(verdict.reason)
    for rows in films:
        if rows is None or number + len(rows) > count:
            break
        for row in rows:
            row["left_out"] = row["left_out"] or verdict.reasons[verdict.reason[number]]
            if not row["left_out"]:
                row["quality"] = float(verdict.quality[number])
            funnel.add(row)
            yield row
            number += 1
    if number != count:
        raise ValueError("films changed while the table was written; run the same command again")


def _relative(root: Place, out: Place) -> str:
    """Return the folder of the films as the table names it: relative to the table, or a URL."""
    local = isinstance(root, Path) and isinstance(out, Path)
    return os.path.relpath(root, out) if local else str(root)


def _fields(scores: Sequence[Score], *captions: str) -> dict[str, pyarrow.DataType]:
    """Return the columns of the table; `captions` are further ones of captions."""
    fields = dict(clip_table.COLUMNS) | {s.name: pyarrow.float64() for s in scores}
    fields |= dict.fromkeys(captions, clip_table.COLUMNS["captions"])
    fields |= {clip_table.FILM_FRAMES: pyarrow.int64(), "quality": pyarrow.float64()}
    return fields | {"left_out": pyarrow.string()}


def _write(path: Path, rows: Iterator[dict], schema: pyarrow.Schema) -> None:
    """Write the table; memory holds one group of its rows."""
    # An open file, as Arrow would take some names for URLs.
    with open(path, "wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(rows, GROUP)):
            columns = {name: [row.get(name) for row in group] for name in schema.names}
            writer.write_table(pyarrow.table(columns, schema))


def _thumbnails(folder: FilmFolder, funnel: Funnel) -> dict[str, np.ndarray]:
    """Return {clip name: its middle frame} for the rows that the page shows."""
    decoders, found = Decoders(1), {}
    for row in itertools.chain.from_iterable(funnel.shown.values()):
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
