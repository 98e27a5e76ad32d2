"""How a cache is made of what teachers say: a data set, read window by window, to encoded targets.

Shapes: N rows of a batch, n rows of one block, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from collegium.cache.codec import EncodedRows, encode_rows, join_encoded, row_keys, split_encoded
from collegium.cache.layout import Layout, entropy_name, log_z_name
from collegium.cache.options import CacheOptions
from collegium.cache.shards import PieceKey, PieceTargets, document_hash
from collegium.data.pack import Collator, PackedDataset
from collegium.distributions import Teacher
from collegium.fusion.fuse import Fusion, TargetBlock, fuse
from collegium.fusion.pools import RowReader
from collegium.fusion.score import score_teachers
from collegium.losses.engine import default_block_size
from collegium.models.loading import choose_device
from collegium.teachers.cached import pieces_of
from collegium.types import Batch, Rows

SHARD_TARGETS = 2**18
"""Targets per shard, or a few more: what an interrupted build may lose."""


class CorpusEncoder(ABC):
    """Reads a data set and encodes what it is told of each target, shard by shard."""

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        layout: Layout,
        batch_size: int,
        seed: int,
        vocab_size: int,
        windows: Sequence[int] | None = None,
    ) -> None:
        """Lay out the shards.

        Args:
            dataset: what is read.
            layout: what is kept.
            batch_size: windows at a time.
            seed: of the draws.
            vocab_size: V.
            windows: some windows of the data set; None for all.
        """
        self._dataset = dataset
        self._layout = layout
        self._batch_size = batch_size
        self._seed = seed
        self._vocab_size = vocab_size
        self._device = choose_device("auto")
        self._hashes = [document_hash(name) for name in dataset.sample_names]
        self._windows = range(len(dataset)) if windows is None else windows
        self._counts = dataset.targets_per_window()[np.asarray(self._windows, np.int64)]
        self._shards = shard_windows(self._counts)

    @property
    def shard_targets(self) -> list[int]:
        """The number of targets of each shard."""
        return [int(self._counts[places.start : places.stop].sum()) for places in self._shards]

    def encode(self, shard: int) -> Iterator[PieceTargets]:
        """The pieces of a shard, by the length of their windows, as they come.

        Raises:
            TrainingError: a teacher's hidden states are not finite.
        """
        windows = [self._windows[place] for place in self._shards[shard]]
        lengths = [len(self._dataset[window]["input_ids"]) for window in windows]
        order = [windows[i] for i in np.argsort(lengths, kind="stable")]
        size = self._batch_size
        for start in range(0, len(order), size):
            yield from self._encode_windows(order[start : start + size])

    def sample_entries(self) -> float:
        """Entries per target in one batch of windows from all over the data set.

        How many of the draws differ depends on how sure the teachers are: on English text 15 of 50 for a good model, twice as many
        for a small one.
        """
        places = np.linspace(0, len(self._windows) - 1, min(self._batch_size, len(self._windows)))
        pieces = self._encode_windows([self._windows[int(place)] for place in places])
        num_rows = sum(len(piece.rows.sizes) for piece in pieces)
        return sum(len(piece.rows.ids) for piece in pieces) / max(num_rows, 1)

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
        document_N = np.repeat(np.array([key.document for key in keys], np.uint64), counts)
        offset_N = np.repeat(np.array([key.offset for key in keys], np.int64), counts)
        # A row stands at the token before its label.
        offset_N += batch.position_ids.flatten()[rows.index].cpu().numpy() + 1
        keys_N = row_keys(self._seed, document_N, offset_N)
        size = default_block_size(self._vocab_size, self._device)
        blocks = [slice(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]
        told = zip(blocks, self._told(batch, rows, blocks), strict=True)
        return join_encoded(
            [
                encode_rows(
                    self._layout.targets,
                    logp_nV,
                    keys_N[block],
                    scalars=scalars,
                    with_levels=self._layout.has_levels,
                )
                for block, (logp_nV, scalars) in told
            ]
        )

    @abstractmethod
    def _told(
        self, batch: Batch, rows: Rows, blocks: Sequence[slice]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """For each block of rows: (n, V) log-probabilities, valid until the next block, and the scalars (n,) of the layout."""


class FusedEncoder(CorpusEncoder):
    """Encodes the fused target of all teachers, which read a batch together."""

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
        """Lay out the shards; `teachers` is called when the first of them is missing, not before."""
        super().__init__(
            dataset,
            layout=Layout("fused", options.targets),
            batch_size=options.batch_size,
            seed=seed,
            vocab_size=vocab_size,
        )
        self._teachers = teachers
        self._fusion = fusion

    def _told(
        self, batch: Batch, rows: Rows, blocks: Sequence[slice]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        scored = score_teachers(self._teachers(), batch, rows, self._fusion)
        target = fuse(self._fusion, scored, rows)
        for block in blocks:
            fused = target.block(block)
            yield fused.logp(), fused_scalars(fused, rows.labels[block])


class TeacherEncoder(CorpusEncoder):
    """Encodes what a single teacher says; `teacher` is called when the first shard is missing, not before."""

    def __init__(
        self,
        name: str,
        teacher: Callable[[], Teacher],
        dataset: PackedDataset,
        *,
        layout: Layout,
        batch_size: int,
        seed: int,
        vocab_size: int,
        windows: Sequence[int] | None = None,
    ) -> None:
        # Draws that were the same function of the position would be wrong together wherever teachers agree.
        own_seed = seed ^ document_hash(name)
        super().__init__(
            dataset,
            layout=layout,
            batch_size=batch_size,
            seed=own_seed,
            vocab_size=vocab_size,
            windows=windows,
        )
        self._teacher = teacher

    def _told(
        self, batch: Batch, rows: Rows, blocks: Sequence[slice]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        distribution = self._teacher().score(batch, rows).distribution
        reader = RowReader()
        for block in blocks:
            labels_n = rows.labels[block]
            stats, logp_nV = reader.read(distribution.logits(block).to(labels_n.device), labels_n)
            scalars = {
                "entropy": stats.entropy_KN,
                "label_logp": stats.label_logp_KN,
                "max_logp": stats.max_logp_KN,
            }
            for temperature in self._layout.temperatures:
                log_z_n, entropy_n = at_temperature(logp_nV, temperature)
                scalars[log_z_name(temperature)] = log_z_n
                scalars[entropy_name(temperature)] = entropy_n
            yield logp_nV, scalars


@torch.no_grad()
def at_temperature(logp_nV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log Z_T = log sum_v P(v)^(1/T), and the entropy of P_T = P^(1/T) / Z_T: (n,) nats each."""
    scaled_nV = logp_nV / temperature
    log_z_n = scaled_nV.logsumexp(1)
    entropy_n = log_z_n - (scaled_nV - log_z_n[:, None]).exp().mul_(scaled_nV).sum(1)
    return log_z_n, entropy_n


def fused_scalars(fused: TargetBlock, labels_n: Tensor) -> dict[str, Tensor]:
    """What is kept of a target beside itself: (n,) each, in nats."""
    logp_nV = fused.logp()
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
