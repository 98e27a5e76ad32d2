"""Encode a data set into the shards of a cache: fused targets, outputs of a teacher, hidden states.

Shapes: N rows of a batch, n rows of one block, V vocabulary, M rows of a sample, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.cache.codecs.hidden import HiddenCodec, Projection
from collegium.cache.codecs.targets import TargetCodec, entropy_name, log_z_name, row_keys
from collegium.cache.keys import DocumentHashes, PieceKey, pieces_of
from collegium.cache.options import FeatureCacheOptions
from collegium.cache.shards import Columns, EncodedPiece, join_columns, split_columns, split_runs
from collegium.data.collate import Collator
from collegium.data.windows import PackedDataset
from collegium.distributions import Teacher
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.pools import RowReader
from collegium.fusion.routing import score_teachers
from collegium.losses.engine import default_block_size
from collegium.models.loading import choose_device
from collegium.types import Batch, Rows

SHARD_TARGETS = 2**18
"""Targets per shard, or a few more: what an interrupted build may lose."""


@dataclass(kw_only=True, eq=False)
class CorpusEncoder(ABC):
    """Encodes the windows of a data set, shard by shard. No teacher is loaded before the first."""

    dataset: PackedDataset
    batch_size: int
    """Windows per batch."""
    seed: int
    """Seed of the draws, or of the projections."""
    windows: Sequence[int] | None = None
    """The windows to read. None for all."""

    def __post_init__(self) -> None:
        self._windows = range(len(self.dataset)) if self.windows is None else self.windows
        self._counts = self.dataset.targets_per_window()[np.asarray(self._windows, np.int64)]
        self._shards = split_runs(self._counts.tolist(), SHARD_TARGETS)
        self._hashes = DocumentHashes(self.dataset.sample_names)
        self._device = choose_device("auto")

    @property
    def shard_targets(self) -> list[int]:
        """Number of targets of each shard."""
        return [int(self._counts[places.start : places.stop].sum()) for places in self._shards]

    def encode(self, shard: int, codec: Any) -> Iterator[EncodedPiece]:
        """Encode a shard, shortest windows first. Raises TrainingError for non-finite states."""
        windows = [self._windows[place] for place in self._shards[shard]]
        # Windows of similar length share a batch, which saves padding.
        lengths = [len(self.dataset[window]["input_ids"]) for window in windows]
        yield from self._encode([windows[i] for i in np.argsort(lengths, kind="stable")], codec)

    @abstractmethod
    def load(self) -> None:
        """Load the models that it reads, before the time of the first batch is measured."""

    def sample(self, codec: Any) -> list[EncodedPiece]:
        """Encode one batch of windows, spread over the data set, for an estimate of their size."""
        places = np.linspace(0, len(self._windows) - 1, min(self.batch_size, len(self._windows)))
        return list(self._encode([self._windows[int(place)] for place in places], codec))

    def fit(self) -> bytes:
        """Return the content of the side file, for kinds with one."""
        raise NotImplementedError

    @abstractmethod
    def _encode_rows(
        self, batch: Batch, rows: Rows, key_N: Sequence[PieceKey], codec: Any
    ) -> Columns:
        """Encode all rows of a batch. `key_N` has the key of the piece of each row."""

    def _encode(self, windows: Sequence[int], codec: Any) -> Iterator[EncodedPiece]:
        for numbers, batch in self._batches(windows):
            pieces = pieces_of(batch, self._hashes)
            offsets = [self._offset(numbers[piece.window], piece.start) for piece in pieces]
            keys = [replace(p.key, offset=at) for p, at in zip(pieces, offsets, strict=True)]
            counts = [piece.num_targets for piece in pieces]
            key_N = [key for key, count in zip(keys, counts, strict=True) for _ in range(count)]
            columns = self._encode_rows(batch, batch.rows(), key_N, codec)
            windows = [numbers[piece.window] for piece in pieces]
            parts = split_columns(columns, counts, codec.entries)
            yield from map(EncodedPiece, keys, parts, windows)

    def _batches(self, windows: Sequence[int]) -> Iterator[tuple[Sequence[int], Batch]]:
        """Yield the windows in batches, except for batches without a row."""
        for start in range(0, len(windows), self.batch_size):
            numbers = windows[start : start + self.batch_size]
            items: list[dict[str, object]] = [{**self.dataset[window]} for window in numbers]
            batch = Batch.from_inputs(Collator()(items)).to(self._device)
            if batch.num_rows():
                yield numbers, batch

    def _offset(self, window: int, start: int) -> int:
        """Return the tokens of its document before the piece that begins at `start` of a window."""
        pieces = self.dataset.pieces(window)
        starts = [0, *accumulate(piece.stop - piece.start for piece in pieces)]
        return pieces[starts.index(start)].start


class TargetEncoder(CorpusEncoder):
    """Encodes distributions block by block."""

    def _encode_rows(
        self, batch: Batch, rows: Rows, key_N: Sequence[PieceKey], codec: TargetCodec
    ) -> Columns:
        document_N = np.array([key.document for key in key_N], np.uint64)
        # A row is at the token before its label.
        offset_N = batch.position_ids.flatten()[rows.index].cpu().numpy() + 1
        offset_N += np.array([key.offset for key in key_N], np.int64)
        keys_N = row_keys(self.seed, document_N, offset_N)
        size = default_block_size(codec.vocab_size, self._device)
        blocks = [slice(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]
        distributions = self._distributions(batch, rows, blocks, codec)
        parts = []
        for block, (logp_nV, scalars) in zip(blocks, distributions, strict=True):
            parts.append(codec.encode(logp_nV, keys_N[block], scalars))
        return join_columns(parts)

    @abstractmethod
    def _distributions(
        self, batch: Batch, rows: Rows, blocks: Sequence[slice], codec: TargetCodec
    ) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
        """Yield (n, V) log-probabilities, valid until the next block, and (n,) scalars by name."""


@dataclass(kw_only=True, eq=False)
class FusedEncoder(TargetEncoder):
    """Encodes the fused target of all teachers."""

    teachers: Callable[[], Sequence[Teacher]]
    fusion: Fusion

    def load(self) -> None:
        self.teachers()

    def _distributions(
        self, batch: Batch, rows: Rows, blocks: Sequence[slice], codec: TargetCodec
    ) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
        answers = score_teachers(self.teachers(), batch, rows, self.fusion)
        target = fuse(self.fusion, answers, rows)
        for block in blocks:
            fused, labels_n = target.block(block), rows.labels[block]
            logp_nV = fused.logp()
            scalars = {
                "entropy": -(logp_nV.exp() * logp_nV).sum(1),
                "label_logp": logp_nV.gather(1, labels_n[:, None])[:, 0],
                "max_logp": logp_nV.amax(1),
                "disagreement": fused.disagreement_n(),
            }
            yield logp_nV, scalars


@dataclass(kw_only=True, eq=False)
class TeacherEncoder(TargetEncoder):
    """Encodes the output of a single teacher."""

    teacher: Callable[[], Teacher]

    def load(self) -> None:
        self.teacher()

    def _distributions(
        self, batch: Batch, rows: Rows, blocks: Sequence[slice], codec: TargetCodec
    ) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
        distribution = self.teacher().score(batch, rows).distribution
        reader = RowReader()
        for block in blocks:
            labels_n = rows.labels[block]
            stats, logp_nV = reader.read(distribution.logits(block).to(labels_n.device), labels_n)
            scalars = {"entropy": stats.entropy_KN, "label_logp": stats.label_logp_KN}
            scalars["max_logp"] = stats.max_logp_KN
            for temperature in codec.temperatures:
                log_z_n, entropy_n = at_temperature(logp_nV, temperature)
                scalars[log_z_name(temperature)] = log_z_n
                scalars[entropy_name(temperature)] = entropy_n
            yield logp_nV, scalars


@dataclass(kw_only=True, eq=False)
class HiddenEncoder(CorpusEncoder):
    """Encodes the hidden states of a single teacher."""

    teacher: Callable[[], Teacher]
    taps: Sequence[str]
    options: FeatureCacheOptions

    def load(self) -> None:
        self.teacher()

    def fit(self) -> bytes:
        """Fit the projection of each tap on the first rows of the shuffled windows."""
        parts: list[dict[str, np.ndarray]] = []
        num_rows, options = 0, self.options
        for _, batch in self._batches(self._windows):
            parts.append(self._states(batch, batch.rows()))
            num_rows += batch.num_rows()
            if num_rows >= options.fit_rows:
                break
        projections = {}
        for number, (tap, states) in enumerate(join_columns(parts).items()):
            seed = self.seed + number
            projections[tap] = Projection.fit(states[: options.fit_rows], options.rank, seed=seed)
        return HiddenCodec(projections).dump()

    def _encode_rows(
        self, batch: Batch, rows: Rows, key_N: Sequence[PieceKey], codec: HiddenCodec
    ) -> Columns:
        return codec.encode(self._states(batch, rows))

    def _states(self, batch: Batch, rows: Rows) -> dict[str, np.ndarray]:
        """Return the (N, D) float32 states of each tap."""
        states = self.teacher().score(batch, rows, self.taps).features
        return {tap: states[tap].float().cpu().numpy() for tap in self.taps}


@torch.no_grad()
def at_temperature(logp_nV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log Z_T = log sum_v P(v)^(1/T), and the entropy of P_T = P^(1/T) / Z_T: (n,) nats each."""
    scaled_nV = logp_nV / temperature
    log_z_n = scaled_nV.logsumexp(1)
    entropy_n = log_z_n - (scaled_nV - log_z_n[:, None]).exp().mul_(scaled_nV).sum(1)
    return log_z_n, entropy_n
