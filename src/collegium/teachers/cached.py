"""What a cache holds in the place of the teachers that it was made of: a finished target, or what each of them said.

Shapes: B batch, T time, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from collegium.cache.shards import PieceKey, document_hash, window_hash
from collegium.cache.store import TargetCache
from collegium.errors import RecipeError
from collegium.fusion.pooling import Fusion
from collegium.fusion.weights import Entropy
from collegium.teachers.prefetch import Prefetcher
from collegium.types import Batch, Rows, SparseRows, StoredRows, TeacherRows, is_row


class _ReadTeacher:
    """Answers with what a cache holds of the pieces of a batch; its windows may stand in any order."""

    def __init__(self, name: str, read: Callable[[Batch], SparseRows | StoredRows]) -> None:
        self.name = name
        self._read = Prefetcher(read)

    def expect(self, batch: Batch) -> None:
        """Begin to read what will be asked for this batch."""
        self._read.expect(batch)

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> TeacherRows:
        """What is kept of all rows, on the device of the batch.

        Raises:
            CacheError: a piece of the batch is not in the cache.
            RecipeError: hidden states are asked for.
        """
        if taps:
            raise RecipeError("objective.features: a cache holds no hidden states; leave it out")
        found = self._read(batch)
        assert len(found) == len(rows)  # the mask of the rows is part of every key
        return TeacherRows(self.name, found.to(batch.input_ids.device))


class CachedTeacher(_ReadTeacher):
    """The finished targets of a fused cache."""

    provides = frozenset({"target"})

    def __init__(
        self, cache: TargetCache, documents: Sequence[str], *, name: str = "cache"
    ) -> None:
        """Read from `cache`; `documents` are the ids that the sample numbers of a batch stand for."""
        keys = BatchKeys(documents)
        super().__init__(name, lambda batch: cache.rows(keys(batch)))


class StoredTeacher(_ReadTeacher):
    """What a per-teacher cache keeps of one teacher, to be fused with its like."""

    provides = frozenset({"stored"})

    def __init__(self, name: str, cache: TargetCache, keys: BatchKeys) -> None:
        """Read from the folder of this teacher; `keys` may be shared with other teachers of the same data set."""
        super().__init__(name, lambda batch: cache.stored(keys(batch)))


class BatchKeys:
    """The keys of a batch's pieces; of the same batch they are worked out once, however many teachers ask."""

    def __init__(self, documents: Sequence[str]) -> None:
        """`documents` are the ids that the sample numbers of a batch stand for."""
        self._hashes = [document_hash(document) for document in documents]
        self._last: tuple[Batch, list[PieceKey]] | None = None

    def __call__(self, batch: Batch) -> list[PieceKey]:
        """The keys in the order of the batch's rows."""
        last = self._last  # another teacher's thread may set it meanwhile
        if last is None or last[0] is not batch:
            last = self._last = batch, [piece.key for piece in pieces_of(batch, self._hashes)]
        return last[1]


@dataclass(frozen=True, slots=True)
class BatchPiece:
    """A stretch of one document inside a window of a batch, with at least one target."""

    key: PieceKey
    """Its offset is not known here, and 0."""
    window: int
    """Row of the batch."""
    start: int
    """Where it begins in the window."""
    num_targets: int


def pieces_of(batch: Batch, hashes: Sequence[int]) -> list[BatchPiece]:
    """The pieces of a batch in the order of its rows; `hashes` by sample number."""
    ids_BT, samples_BT = batch.input_ids.cpu().numpy(), batch.sample_ids.cpu().numpy()
    position_BT = batch.position_ids.cpu().numpy()
    is_target_BT = np.zeros(ids_BT.shape, bool)
    is_target_BT[:, 1:] = is_row(batch.labels, batch.position_ids).cpu().numpy()
    found = []
    for window in range(len(ids_BT)):
        starts = np.flatnonzero(position_BT[window] == 0).tolist()
        for start, stop in zip(starts, [*starts[1:], ids_BT.shape[1]], strict=True):
            span = slice(start, stop)
            sample, num_targets = (
                int(samples_BT[window, start]),
                int(is_target_BT[window, span].sum()),
            )
            if sample >= 0 and num_targets:
                digest = window_hash(ids_BT[window, span], is_target_BT[window, span])
                key = PieceKey(hashes[sample], 0, digest)
                found.append(BatchPiece(key, window, start, num_targets))
    return found


def require_static(fusion: Fusion | str) -> None:
    """Refuse a fusion that is more than one distribution per row, whichever windows share a batch; `auto` never chooses one.

    Raises:
        RecipeError: entropy weights over a batch, or a conflict policy that changes the weight of a row.
    """
    weighting = fusion.weighting if isinstance(fusion, Fusion) else None
    if isinstance(weighting, Entropy) and weighting.granularity == "batch":
        raise RecipeError(
            "fusion.weighting.granularity: got batch, so that a target depends on its neighbors in a batch; must be token "
            "or sequence with a cache; change it, or set cache.enabled: false"
        )
    if isinstance(fusion, Fusion) and fusion.conflict.yields_to_labels:
        raise RecipeError(
            "fusion.conflict: got truth_fallback, which weighs rows anew at each step; must be another policy with a cache; "
            "change it, or set cache.enabled: false"
        )
