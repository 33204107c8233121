"""Find near-duplicates among 64-bit hashes of pictures: exact, in near-linear time.

A hash is cut into 8 blocks of 8 bits. Two hashes that differ in at most NEAR = 5 bits agree in at
least 3 blocks. So there is a table for each of the 56 choices of 3 blocks, and only hashes of a
table with equal blocks are compared. A table is one sorted array of uint64: a key of 24 bits above
the row's number. Tables are made one after the other, so memory is about 80 bytes a row.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

logger = logging.getLogger(__name__)

NEAR = 5  # hashes of near-duplicates differ in at most this many bits
BLOCKS = 8
TABLES = tuple(itertools.combinations(range(BLOCKS), BLOCKS - NEAR))
ROW = np.uint64(40)  # bits of a row's number in a table
ROWS = np.uint64(2**40 - 1)
CHUNK = 2**20  # rows of a table that are compared at once
MANY = 1_000  # comparisons per row; balanced bits need 45 at 26.6 million rows
# Steps of the transposition of 8 x 8 bits (Warren, Hacker's Delight, 7-3).
TRANSPOSITION = (7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)

Hashes = UInt64[np.ndarray, "R"]


class Repeats(NamedTuple):
    """Near-duplicates, and the work to find them."""

    repeated: np.ndarray  # bool (R,): the row is near a kept row before it
    comparisons: int  # pairs of hashes


class _Pairs(NamedTuple):
    """Pairs of near rows, the earlier row on the left, and how many pairs were compared."""

    left: np.ndarray  # int64 (P,)
    right: np.ndarray  # int64 (P,)
    compared: int


def find_repeats(hashes: Hashes) -> Repeats:
    """Return the rows to drop, going through them in order, and the number of comparisons.

    A row is dropped if its hash differs in at most NEAR bits from the hash of an earlier row that
    is kept. A row that is near dropped rows only is kept. Logs a warning if the bits are so
    unbalanced that a row needs more than `MANY` comparisons; the result is exact all the same.
    """
    compared = 0

    def near_pairs(spread: Hashes) -> Iterator[_Pairs]:
        nonlocal compared
        for pairs in _near_pairs(spread):
            before, compared = compared, compared + pairs.compared
            if before <= MANY * len(hashes) < compared:
                logger.warning(_explosion(hashes))
            yield pairs

    repeated = np.ones(len(hashes), bool)
    _, first = np.unique(hashes, return_index=True)  # black frames would be one endless run
    undecided = np.sort(first)
    while len(undecided):  # the first of them is decided each time, and nearly all at once
        spread = _spread(hashes[undecided])
        has_earlier, has_near = np.zeros((2, len(spread)), bool)
        for pairs in near_pairs(spread):
            has_earlier[pairs.right] = True
            has_near[pairs.left] = has_near[pairs.right] = True
        repeated[undecided[~has_earlier]] = False
        undecided, kept = undecided[has_near], ~has_earlier[has_near]
        dropped = np.zeros(len(undecided), bool)
        for pairs in near_pairs(spread[has_near]):
            dropped[pairs.right[kept[pairs.left]]] = True
        undecided = undecided[~kept & ~dropped]
    return Repeats(repeated, compared)


def _near_pairs(hashes: Hashes) -> Iterator[_Pairs]:
    """Yield the pairs of rows at most NEAR bits apart; a pair may come several times."""
    blocks = hashes.astype("<u8").view(np.uint8).reshape(-1, BLOCKS)
    rows = np.arange(len(hashes), dtype=np.uint64)
    for a, b, c in TABLES:
        table = blocks[:, a].astype(np.uint64)
        for block in (b, c):
            table <<= np.uint64(8)
            table |= blocks[:, block]
        table <<= ROW
        table |= rows
        table.sort()
        start = 0
        while start < len(table):
            last = table[min(start + CHUNK, len(table)) - 1] | ROWS
            end = int(np.searchsorted(table, last, side="right"))  # after the run of its key
            yield from _compare(table[start:end], hashes)
            start = end


def _compare(table: UInt64[np.ndarray, "T"], hashes: Hashes) -> Iterator[_Pairs]:
    """Yield the near pairs among rows of equal key, neighbours first, then at growing distance."""
    keys = (table >> ROW).astype(np.uint32)
    rows = (table & ROWS).astype(np.int64)
    values = hashes[rows]
    places = np.arange(len(table))
    for distance in itertools.count(1):
        places = places[: np.searchsorted(places, len(table) - distance)]
        places = places[keys[places] == keys[places + distance]]
        if not len(places):
            return
        near = np.bitwise_count(values[places] ^ values[places + distance]) <= NEAR
        found = places[near]
        yield _Pairs(rows[found], rows[found + distance], len(places))


def _spread(hashes: Hashes) -> Hashes:
    """Return the hashes with other places of the bits: a block has one of each row and column.

    A hash has a byte for each row of the thumbnail. Black borders make whole rows or columns equal
    in many films, and as blocks of their own they would tell nothing.
    """
    rows = hashes.astype("<u8").view(np.uint8).reshape(-1, 8)
    turns = np.arange(8, dtype=np.uint8)
    turned = rows << turns | rows >> (8 - turns) % 8
    spread = np.ascontiguousarray(turned).view("<u8")[:, 0].astype(np.uint64)
    for shift, mask in TRANSPOSITION:
        swapped = (spread ^ spread >> np.uint64(shift)) & np.uint64(mask)
        spread ^= swapped ^ swapped << np.uint64(shift)
    return spread


def _explosion(hashes: Hashes) -> str:
    """Return the warning that the search takes too many comparisons."""
    some = hashes[:: max(1, len(hashes) // 10_000)]
    share = [np.mean(some >> np.uint64(bit) & np.uint64(1)) for bit in range(64)]
    equal = sum(min(s, 1 - s) < 0.1 for s in share)
    return (
        f"near-duplicates of {len(hashes):,} clips take more than {MANY:,} comparisons per clip: "
        f"{equal} of the 64 bits of the picture hash are equal in nine of ten clips. The result is "
        f"exact, but the search is slow, because the hash hardly tells these pictures apart. Crop "
        f"the black borders of the films, if they have any"
    )
