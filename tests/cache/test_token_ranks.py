"""Ranks, gaps and heights: what goes in comes out, and nothing else passes."""

from __future__ import annotations

import numpy as np
import pytest

from collegium.cache.token_ranks import (
    from_gaps,
    from_heights,
    ranks_of,
    rising_order,
    to_gaps,
    to_heights,
    tokens_of,
    vocabulary_of,
)

MOST = 2**16 - 1


def _rows() -> tuple[np.ndarray, np.ndarray]:
    """200 rows of different tokens, the smallest and the largest id among them."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 200)
    ids = np.concatenate([rng.choice(MOST, n, replace=False) for n in sizes]).astype(np.uint16)
    ids[0], ids[-1] = 0, MOST
    return ids, sizes.astype(np.uint8)


def test_tokens_come_back_sorted_by_rank() -> None:
    ids, sizes = _rows()
    vocabulary = vocabulary_of(ids, MOST + 1)
    assert vocabulary.dtype == np.uint16
    ranks = ranks_of(ids, vocabulary, MOST + 1)
    order = rising_order(ranks, sizes)
    back = from_gaps(to_gaps(ranks[order], sizes), sizes)
    bounds = np.cumsum(sizes.astype(int))[:-1]
    for row in np.split(back, bounds):
        assert (np.diff(row) > 0).all()
    tokens = tokens_of(back, vocabulary)
    assert (tokens == ids[order]).all()
    pairs = zip(np.split(tokens, bounds), np.split(ids, bounds), strict=True)
    assert all(set(a.tolist()) == set(b.tolist()) for a, b in pairs)


def test_heights_give_levels_back() -> None:
    levels = np.random.default_rng(1).integers(0, MOST + 1, 30).astype(np.uint16)
    sizes = np.array([1, 9, 20], np.uint8)
    heights, floors = to_heights(levels, sizes)
    assert heights.dtype == floors.dtype == np.uint16
    assert floors.tolist() == [levels[0], levels[1:10].max(), levels[10:].max()]
    assert (from_heights(heights, floors, sizes) == levels).all()


def test_what_no_writer_writes_is_refused() -> None:
    sizes = np.array([2, 1], np.uint8)
    with pytest.raises(ValueError, match="stands in a row twice"):
        from_gaps(np.array([3, 0, 0], np.uint16), sizes)
    assert from_gaps(np.array([0, 1, 0], np.uint16), sizes).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="a rank not below 2"):
        tokens_of(np.array([2]), np.array([7, 5]))
    with pytest.raises(ValueError, match="above 0"):
        from_heights(np.array([1, 4, 2]), np.array([3, 2]), sizes)
