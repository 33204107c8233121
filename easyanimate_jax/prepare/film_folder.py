"""The films that a source names, with their captions and types, and its rows that name none."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from easyanimate_jax.data import paths
from easyanimate_jax.data.sources import clip_table
from easyanimate_jax.data.sources.read import row_fault, rows_of
from easyanimate_jax.data.sources.rows import NO_TEXT, Problem, caption_of
from easyanimate_jax.storage.local import shown
from easyanimate_jax.storage.stores import Place


class Film(NamedTuple):
    """A film of a source: its captions, and the types that the source gives it."""

    captions: tuple[str, ...]
    kinds: set[str]


class FilmFolder:
    """The films of a source by the names of their files; `unusable` are its other rows."""

    def __init__(self, source: Place, links: Path | None):
        self.root, self.links = source if source.is_dir() else source.parent, links
        self.films, self.unusable = _films(source, links)

    def path(self, name: str) -> Place:
        """Return the path of a film. Raises ValueError for one that leaves the folder."""
        return paths.safe_path(self.root, name, self.links)

    def unusable_rows(self) -> list[dict]:
        """Return a row of the table for each row of the source that cannot be used."""
        told = ((problem.file, f"not used: {shown(problem.reason)}") for problem in self.unusable)
        return [base_row(name) | {"left_out": reason, "captions": []} for name, reason in told]


def base_row(name: str) -> dict:
    """Return the row of a film before it is probed."""
    name = shown(name)  # it may hold bytes that are not text
    base = {"clip": name, "file": name, "kind": "video", "first": 0, "frames": 0, "fps": 0.0}
    return base | {"height": 0, "width": 0, "left_out": "", "hash": 0}


def _films(source: Place, links: Path | None) -> tuple[dict[str, Film], list[Problem]]:
    """Return {file name: film} for the files that a source names, and its other rows.

    Raises ValueError for a source whose films are not files, or that names none.
    """
    if source.suffix == ".toml" or clip_table.is_table(source):
        raise ValueError(
            f"{source} is a {'mixture' if source.suffix == '.toml' else 'table of clips'}; curate "
            f"its sources one by one"
        )
    captions, kinds, problems = defaultdict(list), defaultdict(set), []
    described, rows = rows_of(source, links)
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        if row.file is not None:
            raise ValueError(
                f"{source} holds its films inside other files; extract them and curate their folder"
            )
        name, reason = row.name, row_fault(row)
        if not reason:
            name = paths.relative_name(described.parent, name)
            reason = paths.name_fault(name)
        if reason:
            problems.append(Problem(row.number, str(name or ""), reason))
            continue
        kinds[name] |= {row.kind} - {None}
        fault = caption_of(row.text)
        if not fault:
            captions[name].append(row.text)
        elif fault != NO_TEXT:
            problems.append(Problem(row.number, name, fault))
    if not kinds:
        listed = "".join(f"\n  row {p.row} {p.file}: {p.reason}" for p in problems[:20])
        raise ValueError(f"{source} names no film ({len(problems)} bad rows){listed}")
    return {name: Film(tuple(captions[name]), kinds[name]) for name in kinds}, problems
