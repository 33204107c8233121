"""Turn one film into rows of the table of clips: probe, cut, split, score, caption.

A film is decoded twice, one frame after the other: at a small size to find its cuts, and then for
the frames that scores and captions take. Memory holds the frames of one clip, however long the film
is.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from easyanimate_jax.data import media
from easyanimate_jax.data.decode import Decoders
from easyanimate_jax.data.sources import clip_table
from easyanimate_jax.prepare.film_folder import FilmFolder, base_row
from easyanimate_jax.prepare.model_steps import ModelSteps
from easyanimate_jax.prepare.scores import Score, picture_hash
from easyanimate_jax.prepare.shots import Span, Splitting, find_cuts, split

SMALL, LARGE = 160, 512  # pixels of the longer side: for cuts and motion, and for stills
VIEWS = 8  # frames for a score of captions, as in the reference (spec 13)


class _Clip(NamedTuple):
    """A row of the table before it is scored, and the frames to score; a short clip has none."""

    row: dict
    stills: np.ndarray | None  # uint8 (3, H, W, 3) of a video, (1, H, W, 3) of a picture
    moving: np.ndarray | None  # uint8 (F, H, W, 3), small, two a second; None for a picture
    views: np.ndarray | None  # uint8 (8, H, W, 3) of a video if captions are scored


def film_rows(
    decoders: Decoders,
    folder: FilmFolder,
    name: str,
    splitting: Splitting,
    scores: Sequence[Score],
    steps: ModelSteps,
) -> tuple[list[dict], ConnectionError | None]:
    """Return a scored row for each span of a film, and the error of a model that does not serve.

    After an error, models are asked no more; `told_again` does the rest. A film that does not
    decode, or has another type, gives a single row with the reason.
    """
    base, rows, film, away = base_row(name), [], folder.films[name], None
    views = bool(steps.scores)
    with closing(_clips(decoders, folder, name, base, splitting, views)) as clips:
        while True:
            try:
                clip = next(clips, None)
            except ValueError as error:
                return [base | {"left_out": f"does not decode: {error}"}], away
            if clip is None:
                return rows, away
            row = clip.row if clip.stills is None else _scored(clip, scores)
            if away is None and steps.wants(row):
                try:
                    row = steps.tell(row, film, partial(_frames, clip))
                except ConnectionError as error:
                    away = error
            rows.append(row)


def told_again(
    decoders: Decoders, folder: FilmFolder, name: str, rows: list[dict], steps: ModelSteps
) -> tuple[list[dict], ConnectionError | None]:
    """Return the rows of a film with what they lack of models, and an error as `film_rows` does."""
    path, film, found, away = folder.path(name), folder.films[name], [], None

    def read(row: dict) -> tuple[np.ndarray, np.ndarray]:
        if row["kind"] == "image":
            still = decoders.read_still(path, media.fit_side(row["height"], row["width"], LARGE))
            return still, still
        span = Span(row["first"], row["first"] + row["frames"])
        numbers = sorted({*_still_frames(span), *_view_frames(span)})
        pictures = dict(zip(numbers, decoders.read_frames(path, numbers, LARGE), strict=True))
        stills, views = _still_frames(span), _view_frames(span)
        return np.stack([pictures[i] for i in stills]), np.stack([pictures[i] for i in views])

    for row in rows:
        if away is None and steps.lacks(row, film):
            try:
                frames = read(row) if steps.looks(row, film) else None
                row = steps.tell(row, film, lambda frames=frames: frames)
            except ValueError as error:
                return [base_row(name) | {"left_out": f"does not decode: {error}"}], away
            except ConnectionError as error:
                away = error
        found.append(row)
    return found, away


def _frames(clip: _Clip) -> tuple[np.ndarray, np.ndarray]:
    return clip.stills, clip.stills if clip.views is None else clip.views


def _clips(
    decoders: Decoders,
    folder: FilmFolder,
    name: str,
    base: dict,
    splitting: Splitting,
    views: bool,
) -> Iterator[_Clip]:
    """Yield the clips of a film, those that are too short first; complete `base` before.

    Long clips have `views` if these are wanted. Raises ValueError if the film does not decode.
    """
    path = folder.path(name)
    kind, num_frames, height, width, fps = decoders.probe(path)
    base |= {"kind": kind, "frames": num_frames, "height": height, "width": width, "fps": fps}
    base[clip_table.FILM_FRAMES] = num_frames
    kinds = folder.films[name].kinds
    if kinds and kind not in kinds:
        told = " and ".join(map(repr, sorted(kinds)))
        reason = f"not used: type is {told}, but the file holds {kind}"
        yield _Clip(base | {"left_out": reason}, None, None, None)
        return
    if kind == "image":
        stills = decoders.read_still(path, media.fit_side(height, width, LARGE))
        yield _Clip(_row(base, Span(0, 1)), stills, None, None)
        return
    size = media.fit_side(height, width, SMALL)
    with closing(decoders.read_samples(path, [(i, size) for i in range(num_frames)])) as frames:
        cuts = find_cuts(frames, fps or 25.0)
    spans, short = split(num_frames, cuts, fps or 25.0, splitting)
    for span in short:
        reason = "shorter than the shortest clip"
        yield _Clip(_row(base, span) | {"left_out": reason}, None, None, None)
    yield from _long_clips(decoders, path, base, spans, size, views)


def _long_clips(
    decoders: Decoders,
    path: Path,
    base: dict,
    spans: Sequence[Span],
    size: tuple[int, int],
    views: bool,
) -> Iterator[_Clip]:
    """Yield the clips at the ascending spans of a film, with their frames; small ones of `size`."""
    seconds, step = decoders.read_seconds(path), max(1, round(base["fps"] / 2))
    samples = [_samples(span, step, size, views) for span in spans]
    with closing(decoders.read_samples(path, list(chain.from_iterable(samples)))) as pictures:
        for span, wanted in zip(spans, samples, strict=True):
            found = [(sample, next(pictures)) for sample in wanted]
            large = {number: picture for (number, side), picture in found if side == LARGE}
            row = _row(base, span)
            if lasts := seconds[span.end - 1] - seconds[span.first]:
                row["fps"] = (span.end - span.first - 1) / lasts  # its own: the rate may vary
            yield _Clip(
                row,
                np.stack([large[number] for number in _still_frames(span)]),
                np.stack([picture for (_, side), picture in found if side == size]),
                np.stack([large[number] for number in _view_frames(span)]) if views else None,
            )


def _samples(span: Span, step: int, size: tuple[int, int], views: bool) -> list[media.Sample]:
    """Return what to read of a clip, in order: large frames, and every `step`-th one in `size`."""
    numbers = {*_still_frames(span), *(_view_frames(span) if views else ())}
    large = [(number, LARGE) for number in numbers]
    small = [(number, size) for number in range(span.first, span.end, step)]
    return sorted(large + small, key=lambda sample: sample[0])


def _scored(clip: _Clip, scores: Sequence[Score]) -> dict:
    """Return the row of a clip with its hash and the scores of its frames."""
    row = clip.row | {"hash": picture_hash(clip.stills[len(clip.stills) // 2])}
    for score in scores:
        if score.frames == "still":
            row[score.name] = float(score.measure(clip.stills, 1.0))
        elif score.frames == "motion" and clip.moving is not None:
            scale = max(row["height"], row["width"]) / SMALL
            row[score.name] = float(score.measure(clip.moving, scale))
    return row


def _row(base: dict, span: Span) -> dict:
    name = base["file"] if base["kind"] == "image" else f"{base['file']}#{span.first}-{span.end}"
    return base | {"clip": name, "first": span.first, "frames": span.end - span.first}


def _still_frames(span: Span) -> list[int]:
    return [span.first, (span.first + span.end - 1) // 2, span.end - 1]


def _view_frames(span: Span) -> list[int]:
    """Return `VIEWS` numbers of frames spread over a clip; a short one repeats some."""
    return np.linspace(span.first, span.end - 1, VIEWS).round().astype(int).tolist()
