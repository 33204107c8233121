"""Near-duplicates of hashes: those of a plain search, whatever the bits and the order."""

import logging

import numpy as np
import pytest

from easyanimate_jax.prepare import duplicates
from easyanimate_jax.prepare.duplicates import NEAR, find_repeats


def plain(hashes):
    """Return the rows that are near a kept row before them, one by one."""
    kept, repeated = np.empty_like(hashes), np.zeros(len(hashes), bool)
    count = 0
    for number, value in enumerate(hashes):
        repeated[number] = (np.bitwise_count(kept[:count] ^ value) <= NEAR).any()
        if not repeated[number]:
            kept[count] = value
            count += 1
    return repeated


def flipped(rng, hashes, most):
    """Return the hashes with up to `most` bits of each flipped."""
    bits = np.uint64(1) << rng.integers(0, 64, (most, len(hashes))).astype(np.uint64)
    return hashes ^ np.bitwise_xor.reduce(bits, axis=0)


def test_a_search_in_tables_finds_what_a_plain_search_finds():
    """20,000 rows: random, equal, near one another at 1 to 8 bits, in clusters, and in chains."""
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 2**64, 8_000, np.uint64)]
    parts += [flipped(rng, parts[0][:1_000], most) for most in range(1, 9)]
    parts += [flipped(rng, np.repeat(parts[0][:10], 100), 4)]  # near one base, not all by pairs
    for _ in range(200):  # of a chain, only neighbours are near
        parts.append(flipped(rng, parts[-1][-1:], 5))
    parts += [np.uint64([0, 2**64 - 1] * 700), parts[0][:1_400]]
    hashes = rng.permutation(np.concatenate(parts))
    found = find_repeats(hashes).repeated
    assert 5_000 < found.sum() < 15_000 and len(hashes) >= 20_000
    np.testing.assert_array_equal(found, plain(hashes))


@pytest.mark.parametrize("chunk", [1, 7, 1_000])
def test_the_result_does_not_depend_on_the_rows_compared_at_once(monkeypatch, chunk):
    rng = np.random.default_rng(1)
    base = rng.integers(0, 2**64, 150, np.uint64)
    hashes = np.concatenate([base, flipped(rng, base, 6), base ^ np.uint64(2**64 - 1)])
    monkeypatch.setattr(duplicates, "CHUNK", chunk)
    np.testing.assert_array_equal(find_repeats(hashes).repeated, plain(hashes))


def test_a_row_near_dropped_rows_only_is_kept():
    chain = np.uint64([0, 0x1F, 0x3FF, 0x7FFF])  # 5 bits from one to the next
    assert find_repeats(chain).repeated.tolist() == [False, True, False, True]
    assert find_repeats(chain[[1, 0, 2, 3]]).repeated.tolist() == [False, True, True, False]


def test_no_row_has_no_near_duplicate():
    assert find_repeats(np.empty(0, np.uint64)).repeated.shape == (0,)


def test_black_borders_cost_no_quadratic_search():
    """Two rows of the thumbnail that are equal in all films would be two useless blocks."""
    rng = np.random.default_rng(2)
    hashes = rng.integers(0, 2**64, 20_000, np.uint64) & np.uint64(0x00FF_FFFF_FFFF_FF00)
    assert find_repeats(hashes).comparisons < 10 * len(hashes)


def test_a_hash_that_does_not_tell_pictures_apart_is_named(caplog, monkeypatch):
    monkeypatch.setattr(duplicates, "MANY", 10)
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 2**64, 5_000, np.uint64)
    with caplog.at_level(logging.WARNING):
        find_repeats(hashes)
        assert not caplog.records
        find_repeats(hashes & np.uint64(0x0000_FFFF_0000_FFFF))
    [record] = caplog.records
    assert "more than 10 comparisons per clip: 32 of the 64 bits" in record.message
