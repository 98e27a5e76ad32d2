"""Compact encoding of a shard: tokens as ranks in the shard's vocabulary, sorted within a row.

    vocabulary   ids that occur in the shard, most frequent first, ties by smaller id
    rank         position of a token in it: small for common tokens
    gap          rank minus the previous rank of the row, or the rank itself for the first entry
    floor        of a row: its largest level, which is its least likely token
    height       floor minus level

Shapes: n rows, E entries.
"""

# Sorting a row of n entries saves log2(n!) bits, and with ranks most of the remaining gaps fit a
# byte. Levels in that order are unsorted. As heights they are mostly small, because most kept
# tokens are near the least likely one.

from __future__ import annotations

import numpy as np


def build_vocabulary(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the distinct ids, most frequent first."""
    counts = np.bincount(ids, minlength=vocab_size)
    # Stable, so equal counts keep the order of their ids: a shard's bytes are reproducible.
    order = np.argsort(-counts, kind="stable")
    return order[: np.count_nonzero(counts)].astype(ids.dtype)


def to_ranks(ids: np.ndarray, vocabulary: np.ndarray, vocab_size: int) -> np.ndarray:
    """Map (E,) ids to (E,) int64 positions in the vocabulary."""
    rank_V = np.zeros(vocab_size, np.int64)
    rank_V[vocabulary] = np.arange(len(vocabulary))
    return rank_V[ids]


def rank_order(ranks: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return (E,) int64 indices that sort the entries of each row by rank."""
    row_E = np.repeat(np.arange(len(sizes)), sizes.astype(np.int64))
    # Ranks stay below 2^32, so one argsort of row and rank sorts all rows.
    return np.argsort((row_E << 32) + ranks, kind="stable")


def to_gaps(ranks: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Convert (E,) ranks, ascending in each row, to differences, keeping the first of a row."""
    gaps = np.diff(ranks, prepend=ranks[:1])
    first = row_starts(sizes)
    gaps[first] = ranks[first]
    return gaps


def from_gaps(gaps: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Invert `to_gaps`, as int64.

    Raises:
        ValueError: a row holds a token twice.
    """
    running = np.cumsum(gaps.astype(np.int64))
    first = row_starts(sizes)
    is_zero = gaps == 0
    is_zero[first] = False
    if is_zero.any():
        raise ValueError("a row holds a token twice")
    before = np.concatenate([np.zeros(1, np.int64), running])[first]
    return running - np.repeat(before, sizes.astype(np.int64))


def from_ranks(ranks: np.ndarray, vocabulary: np.ndarray) -> np.ndarray:
    """Map (E,) ranks to (E,) ids.

    Raises:
        ValueError: a rank is outside the vocabulary.
    """
    if ranks.size and int(ranks.max()) >= len(vocabulary):
        raise ValueError(f"a rank not below {len(vocabulary)}, the size of the shard's vocabulary")
    return vocabulary[ranks]


def to_heights(levels: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert (E,) levels to (E,) heights and (n,) floors of the same dtype."""
    floors = np.maximum.reduceat(levels, row_starts(sizes)) if len(sizes) else levels[:0]
    return np.repeat(floors, sizes.astype(np.int64)) - levels, floors


def from_heights(heights: np.ndarray, floors: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Invert `to_heights`.

    Raises:
        ValueError: a log-probability is above 0.
    """
    floor_E = np.repeat(floors, sizes.astype(np.int64))
    # Checked before the subtraction, which would wrap around in unsigned integers.
    if (heights > floor_E).any():
        raise ValueError("a log-probability is above 0")
    return floor_E - heights


def row_starts(sizes: np.ndarray) -> np.ndarray:
    """Return the (n,) int64 index of the first entry of each row."""
    sizes = sizes.astype(np.int64)
    return np.cumsum(sizes) - sizes
