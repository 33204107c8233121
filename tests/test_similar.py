"""Near-duplicates by vectors: nearly all that comparing every pair finds, and nothing else."""

import numpy as np
import pytest

from easyanimate_jax.prepare import similar
from easyanimate_jax.prepare.similar import find_similar


def planted(rows, width, seed, share=0.1, cosines=(0.95, 1.0)):
    """Rows of which the last share are at a cosine to an earlier row."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((rows - int(rows * share), width)).astype(np.float32)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    base = first[rng.integers(max(1, len(first)), size=rows - len(first))]
    other = rng.standard_normal(base.shape).astype(np.float32)
    other -= np.sum(other * base, axis=1, keepdims=True) * base
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    cosine = rng.uniform(*cosines, len(base)).astype(np.float32)[:, None]
    return np.concatenate([first, cosine * base + np.sqrt(1 - cosine**2) * other]).astype(
        np.float16
    )


def brute(vectors, least):
    """Go through the rows in order, and drop those near one that is kept."""
    units = vectors.astype(np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    near, kept = units @ units.T >= least, np.ones(len(units), bool)
    for row in range(len(units)):
        kept[row] = not (near[row, :row] & kept[:row]).any()
    return ~kept


def test_nearly_all_near_duplicates_are_found_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(similar, "LEAF", 128)  # four levels of a tree
    monkeypatch.setattr(similar, "BRANCHES", 8)
    vectors = planted(6000, 32, 0)
    expected = brute(vectors, 0.96)
    file = tmp_path / "vectors"
    order = np.random.default_rng(1).permutation(len(vectors))
    vectors[order].tofile(file)
    mapped = np.memmap(file, np.float16, "r", shape=vectors.shape)
    places = np.argsort(order)
    found = find_similar(mapped, places, 0.96)
    assert not (found.repeated & ~expected).any()
    recall = (found.repeated & expected).sum() / expected.sum()
    assert recall > 0.98 and found.missed <= similar.MISSED and found.trees < similar.MOST
    np.testing.assert_array_equal(find_similar(mapped, places, 0.96).repeated, found.repeated)


@pytest.mark.parametrize("rows", [0, 1, 2, 500])
def test_few_rows_are_compared_all_with_all(rows):
    vectors = planted(rows, 8, 3, cosines=(0.5, 1.0))
    found = find_similar(vectors, np.arange(rows), 0.9)
    np.testing.assert_array_equal(found.repeated, brute(vectors, 0.9))


def test_a_row_that_is_near_dropped_rows_only_is_kept():
    angles = np.deg2rad([0.0, 10.0, 20.0, 30.0, 90.0, 40.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float16)
    found = find_similar(vectors, np.arange(6), np.cos(np.deg2rad(11.0)))
    assert found.repeated.tolist() == [False, True, False, True, False, False]


def test_equal_rows_in_any_number_leave_their_first(monkeypatch):
    monkeypatch.setattr(similar, "LEAF", 64)
    vectors = np.ones((5000, 4), np.float16)
    vectors[7:] += 0.01 * np.random.default_rng(0).random((4993, 4)).astype(np.float16)
    vectors[::2] = vectors[8]
    found = find_similar(vectors, np.arange(5000), 0.99)
    assert (~found.repeated).nonzero()[0].tolist() == [0]
