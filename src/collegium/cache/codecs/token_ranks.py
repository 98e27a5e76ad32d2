"""Compact encoding of a shard: tokens as ranks in the shard's vocabulary, sorted within a row.

    vocabulary   ids that occur in the shard, most frequent first, ties by smaller id
    rank         position of a token in it: small for common tokens
    gap          rank minus the previous rank of the row, or the rank itself for the first entry
    floor        of a row: its largest level, which is its least likely token
    height       floor minus level

Shapes: n rows, E entries, V vocabulary of the model.
"""

# Sorting a row of n entries saves log2(n!) bits, and with ranks most of the remaining gaps fit a
# byte. Levels in that order are unsorted. As heights they are mostly small, because most kept
# tokens are near the least likely one.

from __future__ import annotations

import numpy as np

from collegium.cache.shards import starts_of


def to_gaps(
    ids: np.ndarray, sizes: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode (E,) ids; returns the vocabulary, (E,) gaps, and the (E,) order of their entries."""
    counts = np.bincount(ids, minlength=vocab_size)
    # Stable, so equal counts keep the order of their ids: a shard's bytes are reproducible.
    vocabulary = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    rank_V = np.zeros(vocab_size, np.int64)
    rank_V[vocabulary] = np.arange(len(vocabulary))
    ranks = rank_V[ids]
    # Ranks stay below 2^32, so one argsort of row and rank sorts all rows.
    row_E = np.repeat(np.arange(len(sizes)), sizes)
    order = np.argsort((row_E << 32) + ranks, kind="stable")
    ranks, first = ranks[order], starts_of(sizes)[:-1]
    gaps = np.diff(ranks, prepend=0)
    gaps[first] = ranks[first]
    return vocabulary.astype(ids.dtype), gaps.astype(ids.dtype), order


def from_gaps(gaps: np.ndarray, sizes: np.ndarray, vocabulary: np.ndarray) -> np.ndarray:
    """Decode (E,) gaps to ids, sorted by rank within a row. Raises ValueError for invalid gaps."""
    first = starts_of(sizes)[:-1]
    is_zero = gaps == 0
    is_zero[first] = False
    if is_zero.any():
        raise ValueError("a row holds a token twice")
    sums = starts_of(gaps)
    ranks = sums[1:] - np.repeat(sums[first], sizes)
    if ranks.size and int(ranks.max()) >= len(vocabulary):
        raise ValueError(f"a rank not below {len(vocabulary)}, the size of the shard's vocabulary")
    return vocabulary[ranks]


def to_heights(levels: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert (E,) levels to (E,) heights and (n,) floors of the same dtype."""
    floors = np.maximum.reduceat(levels, starts_of(sizes)[:-1]) if len(sizes) else levels[:0]
    return np.repeat(floors, sizes) - levels, floors


def from_heights(heights: np.ndarray, floors: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Invert `to_heights`. Raises ValueError if a log-probability is above 0."""
    floor_E = np.repeat(floors, sizes)
    # Checked before the subtraction, which would wrap around in unsigned integers.
    if (heights > floor_E).any():
        raise ValueError("a log-probability is above 0")
    return floor_E - heights
