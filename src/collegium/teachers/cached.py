"""Teachers and targets read from a cache.

Shapes: B batch, T time, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from collegium.cache.feature_store import FeatureCache
from collegium.cache.shards import PieceKey, document_hash, window_hash
from collegium.cache.store import TargetCache
from collegium.distributions import Answer
from collegium.errors import RecipeError
from collegium.fusion.fuse import FinishedTarget
from collegium.teachers.prefetch import Prefetcher
from collegium.types import Batch, Rows, is_row


class CachedTargets:
    """The finished targets of a fused cache; windows of a batch may be in any order."""

    def __init__(self, cache: TargetCache, documents: Sequence[str]) -> None:
        """Read from `cache`; `documents` are the ids behind the sample numbers of a batch."""
        keys = BatchKeys(documents)
        self._read = Prefetcher(lambda batch: cache.rows(keys(batch)))
        self.capabilities = cache.layout.capabilities()

    def prefetch(self, batch: Batch) -> None:
        """Start to read the targets of a batch."""
        self._read.prefetch(batch)

    def target(self, batch: Batch, rows: Rows) -> FinishedTarget:
        """The targets of all rows, on the device of the batch.

        Raises:
            CacheError: a piece of the batch is missing in the cache.
        """
        named = self._read(batch)
        assert len(named) == len(rows)  # the mask of the rows is part of every key
        return FinishedTarget(named.to(batch.input_ids.device))


class CachedTeacher:
    """The stored distributions, and hidden states, of one teacher."""

    def __init__(
        self,
        name: str,
        cache: TargetCache,
        keys: BatchKeys,
        features: FeatureCache | None = None,
    ) -> None:
        """Read from the folders of this teacher.

        Args:
            name: of the teacher.
            cache: its distributions.
            keys: of the pieces of a batch; shared by the teachers of one data set.
            features: its hidden states.
        """
        self.name = name
        self._features = features
        self._read = Prefetcher(lambda batch: cache.stored(keys(batch)))
        self._read_features = None
        if features is not None:
            taps = features.taps
            self._read_features = Prefetcher(lambda batch: features.rows(keys(batch), taps))
        self.capabilities = cache.layout.capabilities(has_features=features is not None)

    def prefetch(self, batch: Batch) -> None:
        """Start to read the answer for a batch."""
        self._read.prefetch(batch)
        if self._read_features is not None:
            self._read_features.prefetch(batch)

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        """The stored distributions of all rows, on the device of the batch.

        Raises:
            CacheError: a piece of the batch, or a tap, is missing in the cache.
            RecipeError: the cache holds no hidden states.
        """
        device = batch.input_ids.device
        named = self._read(batch)
        assert len(named) == len(rows)  # the mask of the rows is part of every key
        features = {}
        if taps:
            if self._features is None or self._read_features is None:
                raise RecipeError(
                    "objective.features: the cache holds no hidden states; omit it, or set "
                    "cache.features"
                )
            self._features.require(taps)
            states = self._read_features(batch)
            features = {tap: states[tap].to(device) for tap in taps}
        return Answer(self.name, named.to(device), features)


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
