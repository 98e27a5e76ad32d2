"""Keys of pieces: the spans of documents in the windows of a batch, by which a cache is read.

Shapes: B batch, T time, L tokens of a piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from collegium.types import Batch, is_row

MAX_HASHES = 2**16
"""Hashes of documents that are kept."""


@dataclass(frozen=True, slots=True)
class PieceKey:
    """Key of a piece: a span of one document in its exact context."""

    document: int
    """`document_hash` of the document's id."""
    offset: int
    """Tokens of the document before the piece, 0 in keys of a batch, which does not know it."""
    window: bytes
    """`window_hash` of the piece."""


def document_hash(name: str) -> int:
    """Return a 64-bit hash of a document's id."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


class DocumentHashes(Sequence[int]):
    """`document_hash` of each id, computed when it is asked for, since a corpus holds millions."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

        @lru_cache(MAX_HASHES)
        def hash_of(number: int) -> int:
            return document_hash(names[number])

        self._hash = hash_of

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: Any) -> Any:
        return self._hash(number)


def window_hash(ids: np.ndarray, is_target: np.ndarray) -> bytes:
    """Return a 128-bit hash of (L,) tokens and of the mask of those that are targets."""
    # A target is valid only in its exact context: repacking or truncation changes the distribution,
    # and a lookup by document and offset would not notice.
    digest = hashlib.blake2b(np.ascontiguousarray(ids, "<i8").tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(is_target, bool).tobytes())
    return digest.digest()


@dataclass(frozen=True, slots=True)
class BatchPiece:
    """A span of one document in a window of a batch, with at least one target."""

    key: PieceKey
    window: int
    """Row of the batch."""
    start: int
    """First token in the window."""
    num_targets: int


def pieces_of(batch: Batch, hashes: Sequence[int]) -> list[BatchPiece]:
    """Return the pieces of a batch in row order, given the document hash of each sample number."""
    ids_BT, samples_BT = batch.input_ids.cpu().numpy(), batch.sample_ids.cpu().numpy()
    position_BT = batch.position_ids.cpu().numpy()
    is_target_BT = np.zeros(ids_BT.shape, bool)
    is_target_BT[:, 1:] = is_row(batch.labels, batch.position_ids).cpu().numpy()
    pieces = []
    for window in range(len(ids_BT)):
        starts = np.flatnonzero(position_BT[window] == 0).tolist()
        for start, stop in zip(starts, [*starts[1:], ids_BT.shape[1]], strict=True):
            sample, is_target = int(samples_BT[window, start]), is_target_BT[window, start:stop]
            if sample >= 0 and is_target.any():
                key = PieceKey(
                    hashes[sample], 0, window_hash(ids_BT[window, start:stop], is_target)
                )
                pieces.append(BatchPiece(key, window, start, int(is_target.sum())))
    return pieces


class BatchKeys:
    """The keys of a batch's pieces, computed once for all teachers of a batch."""

    def __init__(self, documents: Sequence[str]) -> None:
        """Take the ids of the documents, in the order of the sample numbers of a batch."""
        self._hashes = DocumentHashes(documents)
        self._last: tuple[Batch, list[PieceKey]] | None = None

    def __call__(self, batch: Batch) -> list[PieceKey]:
        """Return the keys in the order of the batch's rows."""
        last = self._last  # the thread of another teacher may replace it
        if last is None or last[0] is not batch:
            last = self._last = batch, [piece.key for piece in pieces_of(batch, self._hashes)]
        return last[1]
