"""Hidden states out of a cache beside what a cached teacher says, and how they are made.

Shapes: N rows of a batch, D width of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from collegium.cache.feature_shards import PieceFeatures
from collegium.cache.features import FeatureCacheOptions, Projection
from collegium.cache.shards import document_hash
from collegium.data.pack import Collator, PackedDataset
from collegium.distributions import Teacher
from collegium.models.loading import choose_device
from collegium.teachers.cached import pieces_of
from collegium.teachers.encoders import shard_windows
from collegium.types import Batch


class FeatureEncoder:
    """Reads a data set with one teacher and keeps its hidden states, shard by shard."""

    def __init__(
        self,
        teacher: Callable[[], Teacher],
        dataset: PackedDataset,
        taps: Sequence[str],
        *,
        options: FeatureCacheOptions,
        batch_size: int,
        seed: int,
    ) -> None:
        """Lay out the shards; `teacher` is called when something is missing, not before."""
        self._teacher = teacher
        self._dataset = dataset
        self._taps = taps
        self._options = options
        self._batch_size = batch_size
        self._seed = seed
        self._device = choose_device("auto")
        self._hashes = [document_hash(name) for name in dataset.sample_names]
        self._counts = dataset.targets_per_window()
        self._shards = shard_windows(self._counts)

    @property
    def shard_targets(self) -> list[int]:
        """The number of targets of each shard."""
        return [int(self._counts[part.start : part.stop].sum()) for part in self._shards]

    def fit(self) -> dict[str, Projection]:
        """The projection of each tap, fitted on the first rows of the data set, which stands in a random order."""
        sample: dict[str, list[np.ndarray]] = {tap: [] for tap in self._taps}
        num_rows = 0
        for _, _, features in self._read(range(len(self._dataset))):
            for tap, x_ND in features.items():
                sample[tap].append(x_ND)
            num_rows += len(next(iter(features.values())))
            if num_rows >= self._options.fit_rows:
                break
        return {
            tap: Projection.fit(
                np.concatenate(parts)[: self._options.fit_rows],
                self._options.rank,
                seed=self._seed + number,
            )
            for number, (tap, parts) in enumerate(sample.items())
        }

    def encode(self, shard: int, projections: Mapping[str, Projection]) -> Iterator[PieceFeatures]:
        """The pieces of a shard as they come, window by window.

        Raises:
            TrainingError: the teacher's hidden states are not finite.
        """
        for windows, batch, features in self._read(self._shards[shard]):
            coded = {tap: projections[tap].encode(x_ND) for tap, x_ND in features.items()}
            start = 0
            for piece in pieces_of(batch, self._hashes):
                rows = slice(start, start + piece.num_targets)
                offset = self._offset(windows[piece.window], piece.start)
                taps = {tap: (codes[rows], scales[rows]) for tap, (codes, scales) in coded.items()}
                yield PieceFeatures(replace(piece.key, offset=offset), taps)
                start = rows.stop

    def _read(
        self, windows: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], Batch, dict[str, np.ndarray]]]:
        """Batches of these windows in their order, with the (N, D) hidden states of all taps; those without a row are left out."""
        for start in range(0, len(windows), self._batch_size):
            part = windows[start : start + self._batch_size]
            items: list[dict[str, object]] = [{**self._dataset[window]} for window in part]
            batch = Batch.from_inputs(Collator()(items)).to(self._device)
            rows = batch.rows()
            if len(rows):
                found = self._teacher().score(batch, rows, self._taps).features
                yield part, batch, {tap: found[tap].float().cpu().numpy() for tap in self._taps}

    def _offset(self, window: int, start: int) -> int:
        at = 0
        for piece in self._dataset.pieces(window):
            if at == start:
                return piece.start
            at += piece.stop - piece.start
        raise ValueError(f"window {window}: no piece begins at {start}")
