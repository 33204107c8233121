"""Find near-duplicates among vectors: rows whose cosine with a kept earlier row is high.

A tree splits the rows: each row follows the nearest of some random rows, again and again, until few
rows are together in a leaf, where all pairs are compared. Rows that are near each other are mostly
in one leaf. The next tree draws other rows, and looks again at the rows that are kept. Trees end
when the number of rows that they find, which falls, says that few are missed. Work grows as
R log R, and memory holds some thousand vectors, which may be a file that is mapped.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Int

LEAF = 2048  # rows that are compared with each other
BRANCHES = 32
CHUNK = 2**15  # vectors in memory at a time
LEFTS = 32  # earlier rows that are kept of those near a row, in a leaf
FEWEST, MOST = 3, 40  # trees
MISSED = 0.005  # share of the near-duplicates; trees end when they seem to miss less

Rows = Int[np.ndarray, "_rows"]


class Similar(NamedTuple):
    """Near-duplicates, and how they were found."""

    repeated: np.ndarray  # bool (R,): the row is near a kept row before it
    trees: int
    missed: float  # estimated share of the near-duplicates that are not among them


class _Pairs(NamedTuple):
    """Pairs of near rows, the earlier row on the left."""

    left: Rows
    right: Rows


def find_similar(
    vectors: Float16[np.ndarray, "V D"], places: Int[np.ndarray, "R"], least: float, seed: int = 0
) -> Similar:
    """Return the rows to drop, going through them in order; `places` says where their vectors are.

    A row is dropped if its cosine with an earlier row that is kept is `least` or more. A row that
    is near dropped rows only is kept. Some near-duplicates are missed; what is found is exact.
    """
    rng, pairs = np.random.default_rng(seed), _Pairs(*np.zeros((2, 0), np.int64))
    repeated, new = np.zeros(len(places), bool), []
    for trees in range(1, MOST + 1):
        parts = _tree(vectors, places, np.flatnonzero(~repeated), least, rng)
        found = _joined([_Pairs(*np.zeros((2, 0), np.int64)), *parts])
        new.append(len(np.unique(found.right)))
        repeated[found.right] = True
        pairs, repeated = _settled(vectors, places, _joined([pairs, found]), repeated, least)
        missed = _missed(new, int(repeated.sum()))
        if trees >= FEWEST and missed <= MISSED:
            break
    return Similar(repeated, trees, missed)


def _missed(new: list[int], total: int) -> float:
    """Return the estimated share that is missed, from how many rows each tree has found.

    Each tree finds the same share of what is left, so what it finds falls as a geometric series.
    """
    if not new[-1] or len(new) < 2:
        return float(bool(new[-1]))
    falls = min(new[-1] / new[-2], 0.99) if new[-2] else 0.99
    left = new[-1] * falls / (1 - falls)
    return left / (total + left)


def _tree(
    vectors: np.ndarray, places: Rows, rows: Rows, least: float, rng: np.random.Generator
) -> list[_Pairs]:
    """Return the near pairs of the leaves of one tree over rows, which ascend."""
    found, waiting = [], [rows]
    while waiting:
        rows = waiting.pop()
        if len(rows) <= LEAF:
            found.append(_near(_units(vectors, places[rows]), rows, least))
            continue
        drawn = _units(vectors, places[rng.choice(rows, BRANCHES, replace=False)])
        chunks = (places[rows[first : first + CHUNK]] for first in range(0, len(rows), CHUNK))
        nearest = [np.argmax(_units(vectors, some) @ drawn.T, axis=1) for some in chunks]
        nearest = np.concatenate(nearest)
        order = np.argsort(nearest, kind="stable")
        sizes = np.bincount(nearest, minlength=BRANCHES)
        if sizes.max() == len(rows):  # all are equal: the first stands for the others
            first = np.full(len(rows) - 1, rows[0])
            found.append(_Pairs(first, rows[1:]))
            continue
        waiting += [part for part in np.split(rows[order], np.cumsum(sizes)[:-1]) if len(part) > 1]
    return found


def _near(units: Float[np.ndarray, "_rows D"], rows: Rows, least: float) -> _Pairs:
    """Return near pairs of a leaf: of each row, with the first `LEFTS` of the rows before it."""
    right, left = np.divmod(np.flatnonzero(units @ units.T >= least), len(rows))
    earlier = left < right
    right, left = right[earlier], left[earlier]
    place = np.arange(len(right)) - np.searchsorted(right, right)  # among those of its row
    few = place < LEFTS
    return _Pairs(rows[left[few]], rows[right[few]])


def _units(vectors: np.ndarray, places: Rows) -> Float[np.ndarray, "_rows D"]:
    """Return the vectors at places as float32, of length 1."""
    found = vectors[places].astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _settled(
    vectors: np.ndarray, places: Rows, pairs: _Pairs, before: np.ndarray, least: float
) -> tuple[_Pairs, np.ndarray]:
    """Return the pairs, with some more, and which rows they drop.

    A row that was dropped `before` may be free again, because the row that it is near is dropped
    now. It is compared with the row that is kept instead.
    """
    while True:
        repeated, kept = _decided(pairs, len(before))
        free = (before & ~repeated)[pairs.right] & repeated[pairs.left]
        left, right = np.unique(np.stack([kept[pairs.left[free]], pairs.right[free]]), axis=1)
        near = [
            np.einsum("rd,rd->r", *(_units(vectors, places[side[part]]) for side in (left, right)))
            >= least
            for part in (slice(first, first + CHUNK) for first in range(0, len(left), CHUNK))
        ]
        near = np.concatenate([np.zeros(0, bool), *near])
        if not near.any():
            return pairs, repeated
        pairs = _joined([pairs, _Pairs(left[near], right[near])])


def _decided(pairs: _Pairs, count: int) -> tuple[np.ndarray, Rows]:
    """Return which rows all near pairs drop, and for each of these a kept row that it is near."""
    repeated, kept, (left, right) = np.zeros(count, bool), np.full(count, -1), pairs
    while len(left):
        later = np.zeros(count, bool)
        later[right] = True
        firm = ~later[left]  # the earlier row is kept
        repeated[right[firm]] = True
        kept[right[firm]] = left[firm]
        open_ = ~(firm | repeated[left] | repeated[right])
        left, right = left[open_], right[open_]
    return repeated, kept


def _joined(pairs: list[_Pairs]) -> _Pairs:
    return _Pairs(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
