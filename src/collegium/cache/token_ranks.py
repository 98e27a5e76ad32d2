"""What makes a shard small: tokens as ranks of the shard's own vocabulary, in rising order within a row.

    vocabulary   the ids that occur in the shard, those with most entries first (of equally many, the smaller id first)
    rank         place of a token in it: small for common tokens
    gap          rank minus the rank before it in the row; of the first entry of a row, the rank itself
    floor        of a row: its largest level, that is, its least likely token
    height       floor minus level

Sorting a row saves log2(n!) bits of its n entries, and ranks make most of the gaps that are left fit a byte. Levels in that order
have no order of their own; as heights they are mostly small, since most kept tokens are near the least likely one.

Shapes: n rows, E entries.
"""

from __future__ import annotations

import numpy as np


def vocabulary_of(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The distinct ids by falling number of entries."""
    counts = np.bincount(ids, minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")
    return order[: np.count_nonzero(counts)].astype(ids.dtype)


def ranks_of(ids: np.ndarray, vocabulary: np.ndarray, vocab_size: int) -> np.ndarray:
    """(E,) ids -> (E,) int64 places in the vocabulary."""
    rank_V = np.zeros(vocab_size, np.int64)
    rank_V[vocabulary] = np.arange(len(vocabulary))
    return rank_V[ids]


def rising_order(ranks: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(E,) int64 indices that put the entries of each row in rising order of their ranks."""
    row_E = np.repeat(np.arange(len(sizes)), sizes.astype(np.int64))
    return np.argsort((row_E << 32) + ranks, kind="stable")


def to_gaps(ranks: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(E,) ranks that rise within each row -> the difference to the one before, the first of a row as it is."""
    gaps = np.diff(ranks, prepend=ranks[:1])
    first = row_starts(sizes)
    gaps[first] = ranks[first]
    return gaps


def from_gaps(gaps: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What `to_gaps` was given, as int64.

    Raises:
        ValueError: a token stands in a row twice.
    """
    running = np.cumsum(gaps.astype(np.int64))
    first = row_starts(sizes)
    is_zero = gaps == 0
    is_zero[first] = False
    if is_zero.any():
        raise ValueError("a token stands in a row twice")
    before = np.concatenate([np.zeros(1, np.int64), running])[first]
    return running - np.repeat(before, sizes.astype(np.int64))


def tokens_of(ranks: np.ndarray, vocabulary: np.ndarray) -> np.ndarray:
    """(E,) ranks -> (E,) ids.

    Raises:
        ValueError: a rank is not one of the vocabulary.
    """
    if ranks.size and int(ranks.max()) >= len(vocabulary):
        raise ValueError(f"a rank not below {len(vocabulary)}, the size of the shard's vocabulary")
    return vocabulary[ranks]


def to_heights(levels: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(E,) levels -> (E,) heights above the floors, and (n,) floors; types stay."""
    floors = np.maximum.reduceat(levels, row_starts(sizes)) if len(sizes) else levels[:0]
    return np.repeat(floors, sizes.astype(np.int64)) - levels, floors


def from_heights(heights: np.ndarray, floors: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What `to_heights` was given.

    Raises:
        ValueError: a height is above zero nats.
    """
    floor_E = np.repeat(floors, sizes.astype(np.int64))
    if (heights > floor_E).any():
        raise ValueError("a log-probability is above 0")
    return floor_E - heights


def row_starts(sizes: np.ndarray) -> np.ndarray:
    """(n,) int64 first entry of each row."""
    sizes = sizes.astype(np.int64)
    return np.cumsum(sizes) - sizes
