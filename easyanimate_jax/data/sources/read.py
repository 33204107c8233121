"""Read captioned videos and pictures from all supported layouts.

    DIR/metadata.json, .jsonl, .csv      EasyAnimate: file_path, text, type (spec 8.1), and for
                                         control models control_file_path (spec 7.2); for pairs
                                         worse_file_path, the worse of two files of one caption
    DIR/videos.txt, DIR/prompt.txt       a file and its caption on the same line of each
    DIR/x.mp4, DIR/x.txt                 side by side, at any depth
    FILE.csv, FILE.parquet               columns for path and caption, under their usual names; in
                                         parquet also files in the cells; read in place
    DIR/*.parquet                        the same, if DIR holds no media files
    FILE.tar, DIR/*.tar                  WebDataset: x.mp4, x.txt, x.json; read in place
    DIR/dataset_info.json                a TFDS data set in ArrayRecord, see sources/tfds.py
    FILE.parquet of `prepare.curate`     clips as spans of films, see sources/clip_table.py
    FILE.toml                            a mixture: lines NAME = "SOURCE", any of the above

All of them may lie in a store (`gs://`, `s3://`) except TFDS data sets.

Sizes and durations come from the files. Rows that name the same file are one clip with several
captions, for example an English and a Chinese one. A row that cannot be used gives a `Problem` with
its reason; it never raises an exception and is never dropped silently.
"""

import logging
import math
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from easyanimate_jax.data import media, paths
from easyanimate_jax.data.buckets import name_word
from easyanimate_jax.data.decode import decoders
from easyanimate_jax.data.sources import clip_table, layouts, parquets, tars, tfds
from easyanimate_jax.data.sources.folders import Folder
from easyanimate_jax.data.sources.rows import KINDS, Clip, Problem, Row, caption_of
from easyanimate_jax.storage.local import local_path, quoted, shown
from easyanimate_jax.storage.stores import Place, Remote, Version, place

logger = logging.getLogger(__name__)

RATES = 1e-3  # largest relative difference of the frame rates of a pair


class _Mention(NamedTuple):
    row: int
    kind: str  # "" if the layout does not state it
    caption: str


def read_chunks(
    source: str | Place, links: str | Path | None = None
) -> Iterator[tuple[list[Clip], list[Problem]]]:
    """Yield what `read_clips` returns; a table of clips comes some rows at a time."""
    if clip_table.is_table(place(source)):
        yield from clip_table.chunks(source, local_path(links) if links else None)
    else:
        yield read_clips(source, links)


def read_clips(
    source: str | Place, links: str | Path | None = None
) -> tuple[list[Clip], list[Problem]]:
    """Return the usable clips in order of first mention, and a `Problem` for each unusable row.

    Links may lead out of a local source into the folder `links`, such as the cache of a hub. Raises
    ValueError for an unknown layout, and for a source without any usable clip; OSError if a store
    does not answer.
    """
    source, links = place(source), local_path(links) if links else None
    if source.suffix == ".toml":
        return _mixture(source, links)
    if clip_table.is_table(source):
        return clip_table.clips(source, links)
    described, rows = rows_of(source, links)
    files: dict[str, media.File | None] = {}
    controls: dict[str, object] = {}
    worse: dict[str, object] = {}
    stamps: dict[str, Version | None] = {}
    mentions: dict[str, list[_Mention]] = {}
    problems = []
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        reason = row_fault(row) or caption_of(row.text)
        if reason:
            name = row.name if isinstance(row.name, str) else ""
            problems.append(Problem(row.number, name, reason))
            continue
        if row.file is None:
            row = row._replace(name=paths.relative_name(described.parent, row.name))
        if files.setdefault(row.name, row.file) != row.file:
            problems.append(Problem(row.number, row.name, "another file has this name"))
        elif worse.setdefault(row.name, row.worse) != row.worse:
            told = "an earlier row names another worse_file_path for this file, or none"
            problems.append(Problem(row.number, row.name, told))
        else:
            mention = _Mention(row.number, row.kind or "", row.text)
            mentions.setdefault(row.name, []).append(mention)
            controls[row.name] = row.control or controls.get(row.name)
            stamps[row.name] = row.stamp

    clips = []
    with ThreadPoolExecutor() as pool:
        named = ((n, files[n], controls[n], worse[n], stamps[n]) for n in mentions)
        found = pool.map(lambda one: _probe(described.parent, links, *one), named)
        for (name, some), probed in zip(mentions.items(), found, strict=True):
            if isinstance(probed, ValueError):
                problems += [Problem(mention.row, name, str(probed)) for mention in some]
                continue
            captions = _captions(name, some, probed[1], problems)
            if captions:
                path, (kind, *size), control, other = probed
                clips.append(Clip(name, path, kind, captions, *size, control=control, worse=other))
    problems = sorted(Problem(p.row, shown(p.file), shown(p.reason)) for p in problems)
    if not clips:
        listed = "".join(f"\n  row {p.row} {p.file}: {p.reason}" for p in problems[:20])
        raise ValueError(f"{described} describes no usable clip ({len(problems)} bad rows){listed}")
    return clips, problems


def _captions(
    name: str, mentions: list[_Mention], header: media.Probe, problems: list[Problem]
) -> tuple[str, ...]:
    """Return the captions of the mentions of a file's own kind; the others are problems."""
    captions = []
    for mention in mentions:
        if mention.kind and mention.kind != header.kind:
            reason = f"type is {mention.kind!r}, but the file holds {header.kind}"
            problems.append(Problem(mention.row, name, reason))
        else:
            captions.append(mention.caption)
    return tuple(captions)


def _mixture(path: Place, links: str | Path | None) -> tuple[list[Clip], list[Problem]]:
    """Return the clips of several sources; a clip's name begins with that of its source."""
    try:
        with paths.open_regular(path) as file:
            named = tomllib.loads(file.read().decode())
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    clips, problems = [], []
    for name, source in named.items():
        if not isinstance(source, str) or source.endswith(".toml"):
            raise ValueError(f'{path}: {name} must be a source in quotes, as in {name} = "films"')
        try:
            found, bad = read_clips(paths.beside(path.parent, source), links)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        clips += [replace(clip, name=f"{name}/{clip.name}", source=name) for clip in found]
        problems += [Problem(p.row, f"{name}/{p.file}", p.reason) for p in bad]
    if not clips:
        raise ValueError(f'{path} names no source; write lines such as films = "folder"')
    return clips, problems


def table(source: str | Place, links: str | Path | None = None) -> dict[str, np.ndarray]:
    """Return the clips of a source as columns; `links` is that of `read_clips`.

    They are clip, kind, frames, fps, height, width, quality and word. A parquet table that
    `prepare` wrote is read as it is, without opening any clip's file.
    """
    if clip_table.is_table(source):
        columns, problems = clip_table.sizes(source)
    else:
        clips, problems = read_clips(source, links)
        columns = {
            "clip": np.array([clip.name for clip in clips]),
            "kind": np.array([clip.kind for clip in clips]),
            "frames": np.array([clip.num_frames for clip in clips], np.int64),
            "fps": np.array([clip.fps for clip in clips]),
            "height": np.array([clip.height for clip in clips], np.int64),
            "width": np.array([clip.width for clip in clips], np.int64),
            "quality": np.array([clip.quality for clip in clips]),
        }
    if problems:
        logger.warning(
            f"{len(problems):,} rows of {source} cannot be used; `sources {source}` shows them"
        )
    names = (n.decode() if isinstance(n, bytes) else str(n) for n in columns["clip"])
    words = (name_word(name) for name in names)
    return columns | {"word": np.fromiter(words, np.uint64, len(columns["clip"]))}


def rows_of(source: Place, links: str | Path | None) -> tuple[Place, Iterator[Row | Problem]]:
    """Return the source's description and its rows.

    The description is a file; relative names in the rows start in its folder. Raises ValueError
    for an unknown layout.
    """
    if source.is_dir():
        for name in ("metadata.json", "metadata.jsonl", "metadata.csv"):
            if (source / name).is_file():
                return source / name, layouts.metadata(source / name)
        if (source / "dataset_info.json").is_file():
            if isinstance(source, Remote):
                raise ValueError(f"{source} is a TFDS data set; copy it to a local disk")
            return source / "dataset_info.json", tfds.rows(source)
        if (source / "videos.txt").is_file():
            return source / "videos.txt", layouts.lists(source)
        folder = Folder(source)
        for ending, read in ((".tar", tars.rows), (".parquet", parquets.rows)):
            files = [name for name in folder.names if "/" not in name and name.endswith(ending)]
            if files and (ending == ".tar" or not layouts.has_media(folder)):
                return source / files[0], _files_of(folder, files, read, links)
        return source / "*.txt", layouts.side_by_side(folder, links)
    suffix = source.suffix.lower()
    if suffix in (".json", ".jsonl", ".ndjson", ".csv", ".tsv"):
        return source, layouts.metadata(source)
    if suffix == ".parquet":
        return source, parquets.rows(source)
    if suffix == ".tar":
        return source, tars.rows(source)
    raise ValueError(
        f"{source} is no source: give a folder, .json, .jsonl, .csv, .parquet, .tar or .toml"
    )


def _files_of(
    folder: Folder, files: list[str], read: Callable, links: str | Path | None
) -> Iterator[Row | Problem]:
    """Yield the rows of all tars or tables of a folder; other files in it are problems."""
    others = {name for name in folder.names if "/" not in name} - {*files}
    yield from layouts.unread(folder, others)
    for name in files:
        if clip_table.is_table(folder.place / name):
            raise ValueError(f"{folder} holds the table of clips {name}; name that file")
        paths.safe_path(folder.place, name, links)  # links lead only where the user says
        yield from read(folder.place / name)


def row_fault(row: Row) -> str:
    """Return the reason why a row names no file of a known kind; "" if there is none."""
    if not isinstance(row.name, str) or not row.name:
        return "no file_path"
    if shown(row.name) != row.name:
        return f"file name {quoted(row.name)} is not UTF-8; rename the file"
    if row.kind and row.kind not in KINDS:
        return f"type {row.kind!r} is neither 'image' nor 'video'"
    return ""


def _probe(
    folder: Place,
    links: str | Path | None,
    name: str,
    file: media.File | None,
    control: object,
    worse: object,
    stamp: Version | None,
) -> tuple[media.File, media.Probe, Place | None, Place | None] | ValueError:
    """Return the file, its properties, its control and the worse file of its pair.

    Returns a ValueError for a file that is missing or not readable, and for unlike files of a pair.
    """
    try:
        file = file or paths.safe_path(folder, name, links)
        if stamp:
            file = replace(file, listed=stamp)
        control, worse = (
            paths.safe_path(folder, str(path), links) if path else None for path in (control, worse)
        )
        probe = decoders().probe(file)
        if worse:
            if worse == file:
                raise ValueError("worse_file_path is the file itself; name another one")
            _check_pair(probe, worse, decoders().probe(worse))
        return file, probe, control, worse
    except ValueError as error:
        return error


def _check_pair(better: media.Probe, path: Place, worse: media.Probe) -> None:
    """Raise ValueError unless the worse file of a pair has kind, length, size and rate of it."""
    if better[:4] != worse[:4] or not math.isclose(better.fps, worse.fps, rel_tol=RATES):
        told = (
            f"{p.kind} of {p.num_frames} frames, {p.height}x{p.width} at {p.fps:g} a second"
            for p in (better, worse)
        )
        mine, other = told
        raise ValueError(
            f"the worse file {path.name} is a {other}, and this one a {mine}; give both the same"
        )
