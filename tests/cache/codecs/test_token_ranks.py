"""Round trips of ranks, gaps and heights, and refusal of invalid input."""

from __future__ import annotations

import numpy as np

from collegium.cache.codecs.token_ranks import from_gaps, from_heights, to_gaps, to_heights
from refusals import refused

MAX_ID = 2**16 - 1


def _rows() -> tuple[np.ndarray, np.ndarray]:
    """200 rows of distinct tokens, including the smallest and the largest id."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 200)
    ids = np.concatenate([rng.choice(MAX_ID, n, replace=False) for n in sizes]).astype(np.uint16)
    ids[0], ids[-1] = 0, MAX_ID
    return ids, sizes.astype(np.uint8)


def test_the_round_trip_sorts_tokens_by_rank() -> None:
    ids, sizes = _rows()
    vocabulary, gaps, order = to_gaps(ids, sizes, MAX_ID + 1)
    assert vocabulary.dtype == gaps.dtype == np.uint16
    tokens = from_gaps(gaps, sizes, vocabulary)
    assert (tokens == ids[order]).all()
    bounds = np.cumsum(sizes.astype(int))[:-1]
    rank = {int(word): number for number, word in enumerate(vocabulary)}
    for row in np.split(tokens, bounds):
        assert (np.diff([rank[int(word)] for word in row]) > 0).all()
    pairs = zip(np.split(tokens, bounds), np.split(ids, bounds), strict=True)
    assert all(set(a.tolist()) == set(b.tolist()) for a, b in pairs)


def test_common_tokens_have_small_ranks() -> None:
    ids, sizes = _rows()
    vocabulary = to_gaps(ids, sizes, MAX_ID + 1)[0]
    counts = [int((ids == word).sum()) for word in vocabulary]
    assert counts == sorted(counts, reverse=True)
    assert sorted(vocabulary.tolist()) == sorted(set(ids.tolist()))


def test_equally_common_tokens_are_ordered_by_id() -> None:
    """The bytes of a shard do not depend on the sorting algorithm."""
    ids = np.random.default_rng(1).permutation(np.repeat(np.arange(500), 2)).astype(np.uint16)
    ids = np.concatenate([ids, np.arange(0, 500, 3, dtype=np.uint16)])
    vocabulary, _, _ = to_gaps(ids, np.ones(len(ids), np.uint8), 600)
    counts = np.bincount(ids)
    assert vocabulary.tolist() == sorted(range(500), key=lambda token: (-counts[token], token))


def test_the_round_trip_of_levels_is_exact() -> None:
    levels = np.random.default_rng(1).integers(0, MAX_ID + 1, 30).astype(np.uint16)
    sizes = np.array([1, 9, 20], np.uint8)
    heights, floors = to_heights(levels, sizes)
    assert heights.dtype == floors.dtype == np.uint16
    assert floors.tolist() == [levels[0], levels[1:10].max(), levels[10:].max()]
    assert (from_heights(heights, floors, sizes) == levels).all()


def test_values_that_no_writer_writes_are_refused() -> None:
    sizes = np.array([2, 1], np.uint8)
    with refused(ValueError):
        from_gaps(np.array([3, 0, 0], np.uint16), sizes, np.arange(9))
    assert from_gaps(np.array([0, 1, 0], np.uint16), sizes, np.array([7, 5])).tolist() == [7, 5, 7]
    with refused(ValueError):
        from_gaps(np.array([0, 2, 0], np.uint16), sizes, np.array([7, 5]))
    with refused(ValueError):
        from_heights(np.array([1, 4, 2]), np.array([3, 2]), sizes)
