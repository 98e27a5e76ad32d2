"""The index of a cache: the place of every piece in sorted arrays, mapped from disk if large.

A piece takes 24 bytes: 16 of its key and 8 of its place. In Python dictionaries it takes 323.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from collegium.cache.keys import PieceKey
from collegium.cache.manifest import Manifest
from collegium.storage.files import user_cache, write_bytes

STORED_TARGETS = 2**24
"""Targets from which on the index of a cache is kept on disk.

Smaller ones are read from the shards in a second.
"""
_SHARD_BITS = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PieceIndex:
    """Sorted (3, P) uint64 array: two halves of the key of each piece, and its place.

    The halves are those of the window's hash, the first one with the document's hash in an
    exclusive or. Of pieces with equal keys only the first is kept: all have the same distribution.
    """

    rows: np.ndarray
    is_stored: bool = False
    """Whether it comes from a file, and so may be damaged."""

    @classmethod
    def from_keys(cls, shards: Iterable[tuple[np.ndarray, np.ndarray]]) -> PieceIndex:
        """Sort the keys of all shards, given per shard as from `read_keys`."""
        parts: list[np.ndarray] = [np.zeros((3, 0), np.uint64)]
        for shard, (documents, windows) in enumerate(shards):
            # The window's hash has 128 bits already. The document is folded in without widening the
            # record, and a reader compares both in full.
            places = np.arange(len(documents), dtype=np.uint64) | np.uint64(shard << _SHARD_BITS)
            parts.append(np.stack([windows[:, 0] ^ documents, windows[:, 1], places]))
        rows = np.concatenate(parts, 1)
        rows = rows[:, np.lexsort(rows[1::-1])]  # stable, so equal keys stay in order
        is_first = np.ones(rows.shape[1], bool)
        is_first[1:] = (rows[:2, 1:] != rows[:2, :-1]).any(0)
        return cls(np.ascontiguousarray(rows[:, is_first]))

    @classmethod
    def load(cls, file: Path) -> PieceIndex | None:
        """Map a stored index, or return None if there is none that can be used."""
        try:
            # It is only ever replaced by rename, never shortened under the map.
            rows = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        is_index = rows.dtype == np.uint64 and rows.ndim == 2 and len(rows) == 3
        return cls(rows, is_stored=True) if is_index else None

    def save(self, file: Path) -> None:
        """Write the index. Raises OSError if that is impossible."""
        buffer = io.BytesIO()
        np.save(buffer, self.rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, buffer.getbuffer())

    def __len__(self) -> int:
        return self.rows.shape[1]

    def find(self, key: PieceKey) -> tuple[int, int] | None:
        """Return the shard of a piece and its row in there, or None if there is no such piece."""
        first, second = np.frombuffer(key.window, "<u8")
        first = first ^ np.uint64(key.document)
        start, stop = (int(np.searchsorted(self.rows[0], first, side)) for side in _SIDES)
        n = start + int(np.searchsorted(self.rows[1, start:stop], second))
        if n == stop or self.rows[1, n] != second:
            return None
        shard, row = divmod(int(self.rows[2, n]), 1 << _SHARD_BITS)
        return shard, row


_SIDES = ("left", "right")


def is_stored(manifest: Manifest) -> bool:
    """Whether the index of a cache is kept on disk."""
    return manifest.num_targets >= STORED_TARGETS


def index_of(
    manifest: Manifest,
    read: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]],
    *,
    is_fresh: bool = False,
) -> PieceIndex:
    """Return the index of a cache: the stored one, else one of all keys, which is stored if large.

    Ignores the stored one if `is_fresh`.

    A stored index belongs to a manifest, and may be deleted at any time. Its places are not
    trusted: readers compare the key of what they read.
    """
    if not is_stored(manifest):
        return PieceIndex.from_keys(read())
    file = user_cache() / "index" / f"{manifest.sha256}.npy"
    stored = None if is_fresh else PieceIndex.load(file)
    if stored is not None:
        return stored
    index = PieceIndex.from_keys(read())
    try:
        index.save(file)
    except OSError as error:
        _log.warning("%s: the index of the cache is not kept (%s)", file, error)
    return index
