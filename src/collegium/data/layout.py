"""The layout of a dataset: its documents in order, and the starts of its windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from collegium.storage.arrays import RecordArray

DOCUMENT = np.dtype(
    [("document", "<u8"), ("offset", "<u8"), ("size", "<u4"), ("domain", "<u2"), ("teacher", "<u2")]
)
"""A document of a dataset: its number in the corpus, the place of its tokens, and the numbers of
its domain and of its teacher, 0 for none."""
WINDOW = np.dtype([("document", "<u8"), ("start", "<u4")])
"""First piece of a window: a document of the dataset and a token in it."""


@dataclass(frozen=True)
class DatasetFacts:
    """Facts about all windows, which would take a pass over them to measure."""

    fingerprint: str
    """SHA-256 hex digest of everything that a model sees."""
    num_tokens: int
    """Document tokens, without padding and repeated context."""
    num_target_tokens: int
    longest: int
    """Tokens of the longest window."""
    names_digest: str
    """SHA-256 hex digest of the ids of the documents."""


@dataclass(frozen=True)
class Layout:
    """The documents of a dataset and the starts of its windows, in memory or on disk."""

    tokens: RecordArray
    """Records with the fields of `TOKEN`."""
    documents: RecordArray
    """(documents,) records of `DOCUMENT`."""
    windows: RecordArray
    """(windows + 1,) records of `WINDOW`, in the order of the documents. The last is the end."""
    order: RecordArray
    """(windows,) place of each window of the dataset among `windows`."""
    names: Sequence[str]
    """Id of each document."""
    domains: Sequence[str]
    teachers: Sequence[str]
    """Names of teachers from number 1. Empty if no document names one."""
    stops: Sequence[int]
    max_length: int
    packing: bool
    pad_token_id: int
    folder: Path | None = None
    """Folder on disk, in which fingerprints of renumbered tokens are kept."""


def window_starts(
    lengths: Iterable[tuple[int, bool]], max_length: int, *, packing: bool
) -> Iterator[tuple[int, int]]:
    """Yield the first piece of each window, (document, token), and at the end (documents, 0).

    `lengths` has the tokens of each document, and whether it may be split. Raises ValueError if
    one that may not is longer than `max_length`.
    """
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}; must be at least 2")
    room, number = 0, -1
    for number, (size, can_split) in enumerate(lengths):
        if not can_split and size > max_length:
            raise ValueError(
                f"document {number}: got {size} tokens; must be at most max_length = {max_length}, "
                "because it may not be split"
            )
        start, stop = 0, 0
        while stop < size:
            # A piece of one token has no target: its first token is context only.
            if room < (min(2, size) if can_split else size):
                yield number, start
                room = max_length
            stop = min(size, start + room)
            room = room - (stop - start) if packing else 0
            start = stop - 1
    yield number + 1, 0


def window_order(count: int, seed: int | None) -> np.ndarray:
    """Return the order of the windows, (windows,) int64: shuffled with a seed, as laid without."""
    if seed is None:
        return np.arange(count)
    return np.argsort(_splitmix64(count, seed))


def chunks_of(rows: RecordArray, size: int = 2**16) -> Iterator[np.ndarray]:
    """Yield all rows of an array, some at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _splitmix64(count: int, seed: int) -> np.ndarray:
    """Return (count,) pseudo-random uint64, the same on every machine and version.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014
    (SplitMix64).
    """
    # NumPy's generators may change their streams: https://numpy.org/neps/nep-0019-rng-policy.html
    # Overflow is intended: the arithmetic is modulo 2^64.
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64)
        z += np.uint64(seed % 2**64) * np.uint64(count + 1)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
