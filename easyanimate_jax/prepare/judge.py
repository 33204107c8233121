"""Decide which rows of the table are kept, and how good they are, from columns of all rows.

Columns take about 80 bytes a row. Vectors lie in a file of float16, which is mapped.
"""

import base64
import logging
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from easyanimate_jax.prepare.duplicates import find_repeats
from easyanimate_jax.prepare.embeddings import Embedding
from easyanimate_jax.prepare.model_steps import VECTOR
from easyanimate_jax.prepare.scores import Score
from easyanimate_jax.prepare.similar import find_similar
from easyanimate_jax.storage.stores import Place

logger = logging.getLogger(__name__)

KINDS = ("image", "video")


class Verdict(NamedTuple):
    """The verdict on all rows, in their order."""

    reasons: tuple[str, ...]  # the first is "", for rows that are kept or had a reason before
    reason: np.ndarray  # int8 (R,): number of the reason
    quality: np.ndarray  # float64 (R,): NaN for rows that are left out


class Judge:
    """Columns of the rows that were added; the folder `beside` holds the file of vectors."""

    def __init__(
        self,
        min_pixels: int,
        scores: Sequence[Score],
        embedding: Embedding | None,
        beside: Place,
    ):
        self.min_pixels, self.scores, self.embedding = min_pixels, scores, embedding
        self.kind, self.left_out, self.captioned = array("b"), array("b"), array("b")
        self.pixels, self.hash, self.vector = array("q"), array("Q"), array("q")
        self.fault = array("b")  # number of the first score that leaves the row out, from 1
        self.values = {score.name: array("d") for score in scores if score.better}
        where = beside if isinstance(beside, Path) else None
        self.file = tempfile.TemporaryFile(prefix=".vectors-", dir=where)  # noqa: SIM115
        self.vectors, self.width = 0, None

    def add(self, row: dict) -> None:
        """Add the columns of a row. Raises ValueError for a vector of another length."""
        self.kind.append(KINDS.index(row["kind"]))
        self.left_out.append(bool(row["left_out"]))
        self.captioned.append(bool(row["captions"]))
        self.pixels.append(row["height"] * row["width"])
        self.hash.append(row["hash"])
        for name, values in self.values.items():
            values.append(row.get(name, np.nan))
        bad = (number for number, score in enumerate(self.scores, 1) if score.fault(row))
        self.fault.append(next(bad, 0))
        self.vector.append(self.vectors if VECTOR in row else -1)
        if VECTOR in row:
            content = base64.b64decode(row[VECTOR])
            self.width = self.width or len(content)
            if len(content) != self.width:
                raise ValueError(
                    f"{self.embedding.name} gives vectors of {self.width // 2} and of "
                    f"{len(content) // 2} numbers; return equally many for every clip"
                )
            self.file.write(content)
            self.vectors += 1

    def decide(self) -> Verdict:
        """Decide step by step; each step checks the rows that the previous ones left."""
        kept = ~_array(self.left_out, bool)
        pixels, reason = _array(self.pixels, np.int64), np.zeros(len(kept), np.int8)
        reasons = [""]

        def drop(why: str, bad: np.ndarray) -> None:
            reason[kept & bad] = len(reasons)
            reasons.append(why)
            kept[bad] = False

        drop(f"fewer than {self.min_pixels:,} pixels a frame", pixels < self.min_pixels)
        drop("near-duplicate of another clip", self._repeated(kept))
        for number, score in enumerate(self.scores, 1):
            drop(score.reason, _array(self.fault, np.int8) == number)
        drop("no caption", ~_array(self.captioned, bool))
        if self.embedding:
            drop(f"similar to another clip by {self.embedding.name}", self._similar(kept))
        return Verdict(tuple(reasons), reason, self._quality(kept))

    def _order(self, kept: np.ndarray) -> list[np.ndarray]:
        """Return the kept rows of each kind, larger pictures first, then earlier ones."""
        kind, pixels = _array(self.kind, np.int8), _array(self.pixels, np.int64)
        rows = [np.flatnonzero(kept & (kind == number)) for number in range(len(KINDS))]
        return [some[np.argsort(-pixels[some], kind="stable")] for some in rows]

    def _repeated(self, kept: np.ndarray) -> np.ndarray:
        """Return the rows whose picture is that of a larger or earlier clip of their kind."""
        found, hashes = np.zeros(len(kept), bool), _array(self.hash, np.uint64)
        for rows in self._order(kept):
            found[rows] = find_repeats(hashes[rows]).repeated
        return found

    def _similar(self, kept: np.ndarray) -> np.ndarray:
        """Return the rows whose vector is near that of a larger or earlier clip of their kind."""
        found, places = np.zeros(len(kept), bool), _array(self.vector, np.int64)
        if not self.vectors:
            return found
        self.file.flush()
        shape = self.vectors, self.width // 2
        vectors = np.memmap(self.file, np.float16, "r", shape=shape)
        for kind, rows in zip(KINDS, self._order(kept & (places >= 0)), strict=True):
            similar = find_similar(vectors, places[rows], self.embedding.similarity)
            found[rows] = similar.repeated
            if len(rows):
                logger.info(
                    f"{self.embedding.name} finds {similar.repeated.sum():,} near-duplicates of "
                    f"{len(rows):,} clips of kind {kind} by {similar.trees} trees, and misses "
                    f"about {similar.missed:.1%} of them"
                )
        return found

    def _quality(self, kept: np.ndarray) -> np.ndarray:
        """Return for each kept row the share of kept rows of its kind with a lower rank.

        Rows are ranked by the sum of their ranks in all scores.
        """
        quality, kind = np.full(len(kept), np.nan), _array(self.kind, np.int8)
        for number in range(len(KINDS)):
            rows = np.flatnonzero(kept & (kind == number))
            total = np.zeros(len(rows))
            for score in self.scores:
                if score.better:
                    values = _array(self.values[score.name], np.float64)[rows]
                    total += score.better * _rank(values) * (not np.isnan(values).any())
            quality[rows] = _rank(total) / max(1, len(rows))
        return quality


def _array(values: array, kind: type) -> np.ndarray:
    return np.frombuffer(values, kind) if len(values) else np.zeros(0, kind)


def _rank(values: np.ndarray) -> np.ndarray:
    """Return for each value how many of the values are smaller."""
    return np.searchsorted(np.sort(values), values)
