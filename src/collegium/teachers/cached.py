"""A finished target in the place of the teachers that it was made of, and how it is made of them.

Shapes: B batch, T time, N rows, n rows of one block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from collegium.cache.codec import (
    EncodedRows,
    encode_rows,
    join_encoded,
    row_keys,
    split_encoded,
)
from collegium.cache.options import CacheOptions
from collegium.cache.shards import PieceKey, PieceTargets, document_hash, window_hash
from collegium.cache.store import TargetCache
from collegium.data.pack import Collator, PackedDataset
from collegium.errors import RecipeError
from collegium.fusion.pooling import FusedBlock, FusedTarget, Fusion
from collegium.fusion.weights import Entropy
from collegium.losses.chunked import default_block_size
from collegium.models.loading import choose_device
from collegium.types import Batch, Rows, Teacher, TeacherRows, is_row

SHARD_TARGETS = 2**18
"""Targets per shard, or a few more: what an interrupted build may lose."""


class CachedTeacher:
    """Answers with the targets of a cache; a batch may hold the windows of its data set in any order."""

    provides = frozenset({"target"})

    def __init__(
        self, cache: TargetCache, documents: Sequence[str], *, name: str = "cache"
    ) -> None:
        """Read from `cache`; `documents` are the ids that the sample numbers of a batch stand for."""
        self.name = name
        self._cache = cache
        self._hashes = [document_hash(document) for document in documents]

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> TeacherRows:
        """The targets of all rows, on the device of the batch.

        Raises:
            CacheError: a piece of the batch is not in the cache.
            RecipeError: hidden states are asked for.
        """
        if taps:
            raise RecipeError("objective.features: a cache holds no hidden states; leave it out")
        keys = [piece.key for piece in pieces_of(batch, self._hashes)]
        found = self._cache.rows(keys)
        assert len(found) == len(rows)  # the mask of the rows is part of every key
        return TeacherRows(self.name, found.to(batch.input_ids.device))


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


class FusedEncoder:
    """Reads a data set with all teachers at once and encodes their fused target, shard by shard."""

    def __init__(
        self,
        teachers: Callable[[], Sequence[Teacher]],
        fusion: Fusion,
        dataset: PackedDataset,
        *,
        options: CacheOptions,
        seed: int,
        vocab_size: int,
    ) -> None:
        """Lay out the shards; `teachers` is called when the first of them is missing, not before.

        Raises:
            RecipeError: the fusion depends on which windows share a batch.
        """
        require_static(fusion)
        self._teachers = teachers
        self._fusion = fusion
        self._dataset = dataset
        self._options = options
        self._seed = seed
        self._vocab_size = vocab_size
        self._device = choose_device("auto")
        self._hashes = [document_hash(name) for name in dataset.sample_names]
        self._shards = shard_windows(dataset.targets_per_window())

    @property
    def shard_targets(self) -> list[int]:
        """The number of targets of each shard."""
        counts = self._dataset.targets_per_window()
        return [int(counts[windows.start : windows.stop].sum()) for windows in self._shards]

    def encode(self, shard: int) -> Iterator[PieceTargets]:
        """The pieces of a shard, by the length of their windows, as they come.

        Raises:
            TrainingError: a teacher's hidden states are not finite.
        """
        windows = self._shards[shard]
        lengths = [len(self._dataset[window]["input_ids"]) for window in windows]
        order = [windows[i] for i in np.argsort(lengths, kind="stable")]
        size = self._options.batch_size
        for start in range(0, len(order), size):
            yield from self._encode_windows(order[start : start + size])

    def _encode_windows(self, windows: Sequence[int]) -> list[PieceTargets]:
        items: list[dict[str, object]] = [{**self._dataset[window]} for window in windows]
        inputs = Collator()(items)
        batch = Batch.from_inputs(inputs).to(self._device)
        pieces = pieces_of(batch, self._hashes)
        if not pieces:
            return []
        keys = [
            replace(piece.key, offset=self._offset(windows[piece.window], piece.start))
            for piece in pieces
        ]
        counts = [piece.num_targets for piece in pieces]
        parts = split_encoded(self._encode_rows(batch, keys, counts), counts)
        return [PieceTargets(key, part) for key, part in zip(keys, parts, strict=True)]

    def _offset(self, window: int, start: int) -> int:
        """Tokens of its document before the piece that begins at `start` of a window."""
        at = 0
        for piece in self._dataset.pieces(window):
            if at == start:
                return piece.start
            at += piece.stop - piece.start
        raise ValueError(f"window {window}: no piece begins at {start}")

    def _encode_rows(
        self, batch: Batch, keys: Sequence[PieceKey], counts: Sequence[int]
    ) -> EncodedRows:
        """The targets of all rows of a batch, whose pieces have the given keys and numbers of rows."""
        rows = batch.rows()
        scored = [teacher.score(batch, rows) for teacher in self._teachers()]
        target = FusedTarget(self._fusion, scored, rows)
        document_N = np.repeat(np.array([key.document for key in keys], np.uint64), counts)
        offset_N = np.repeat(np.array([key.offset for key in keys], np.int64), counts)
        # A row stands at the token before its label.
        offset_N += batch.position_ids.flatten()[rows.index].cpu().numpy() + 1
        keys_N = row_keys(self._seed, document_N, offset_N)
        size = default_block_size(self._vocab_size, self._device)
        parts = []
        for start in range(0, len(rows), size):
            block = slice(start, min(start + size, len(rows)))
            fused = target.block(block)
            scalars = fused_scalars(fused, rows.labels[block])
            codec = self._options.targets
            parts.append(encode_rows(codec, fused.logp_nV, keys_N[block], scalars=scalars))
        return join_encoded(parts)


def fused_scalars(fused: FusedBlock, labels_n: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is kept of a target beside itself: (n,) each, in nats."""
    logp_nV = fused.logp_nV
    return {
        "entropy": -(logp_nV.exp() * logp_nV).sum(1),
        "label_logp": logp_nV.gather(1, labels_n[:, None])[:, 0],
        "max_logp": logp_nV.amax(1),
        "disagreement": fused.disagreement_n(),
    }


def shard_windows(counts: np.ndarray) -> list[range]:
    """Windows with the given numbers of targets, cut into runs of at least `SHARD_TARGETS`; the last may be short."""
    shards: list[range] = []
    start = filled = 0
    for window, count in enumerate(counts.tolist()):
        filled += count
        if filled >= SHARD_TARGETS:
            shards.append(range(start, window + 1))
            start, filled = window + 1, 0
    if start < len(counts):
        shards.append(range(start, len(counts)))
    return shards


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
