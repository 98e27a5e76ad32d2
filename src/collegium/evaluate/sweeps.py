"""Sweeps of a preflight over the teachers: scalars, disagreement, and the NLL of fused targets.

Shapes: N rows of the calibration split, n block of rows, V vocabulary, K teachers, G temperatures,
F fusions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from collegium.data.pack import PackedDataset
from collegium.distributions import Answer, DenseRows, Teacher
from collegium.evaluate.metrics import Metrics, ScoredTokens
from collegium.evaluate.scoring import (
    Chunk,
    OnProgress,
    Origins,
    blocks_of,
    gather_targets,
    iterate_chunks,
    window_counts,
)
from collegium.fusion.calibration import TEMPERATURES, TemperatureTables, linear_pool_nll
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.pools import TeacherReader
from collegium.fusion.weights import RowStats, Weighting
from collegium.types import Rows

JSD_ROWS = 4096
"""Approximate number of rows on which the disagreement of the teachers is measured."""

CONSENSUS_ROWS = 256
"""Rows per block when measuring the divergence from the consensus."""

MAX_CACHED_ELEMENTS = 2**28
"""Most logits of one batch, over all teachers, that are kept in memory: 1 GiB in float32."""

PAIR_ELEMENTS = 2**22
"""Elements of one (K, n, V) buffer when measuring pairwise disagreement."""


@dataclass(frozen=True, eq=False)
class CalibrationSplit:
    """The windows of the calibration split that are read."""

    dataset: PackedDataset
    windows: Sequence[int]
    batch_size: int
    progress: OnProgress | None = None

    def chunks(self) -> Iterator[Chunk]:
        """Yield the batches of these windows, in order."""
        return iterate_chunks(
            self.dataset,
            batch_size=self.batch_size,
            windows=self.windows,
            progress=self.progress,
        )

    def outputs(self, teachers: Sequence[Teacher]) -> Iterator[tuple[list[Answer], Rows]]:
        """Yield the outputs of all teachers per batch, and its rows on the same device."""
        for chunk in self.chunks():
            outputs = [teacher.score(chunk.batch, chunk.rows) for teacher in teachers]
            yield outputs, blocks_of(chunk.rows, outputs[0].distribution, None)[0]


@dataclass(frozen=True, eq=False)
class Scalars:
    """Scalars of each teacher per row and temperature, sufficient for every linear pool."""

    # About 1.7 KB per token and teacher: 7.1 GB at peak for a million tokens and four teachers.
    tables: TemperatureTables
    targets: ScoredTokens
    jsd_KK: Tensor
    """Mean Jensen-Shannon divergence of each pair in nats, float64."""
    differs_KK: Tensor
    """Share of rows on which the most likely tokens of a pair differ, float64."""
    consensus_kl_KN: Tensor | None
    """(K, N) KL(P_k || mean of all P) of the raw teachers. Not stored for other temperatures, and
    None for teachers read from a cache, which have no whole distributions."""

    @property
    def teachers(self) -> list[str]:
        """Names in the order of axis K."""
        return list(self.tables.names)

    def stats(self, temperatures: Mapping[str, float], teachers: Sequence[str]) -> RowStats:
        """Return (K, N) statistics of these teachers at grid temperatures, 1 by default."""
        picked = []
        for name in teachers:
            table, at = self._by_teacher[name], self._column(temperatures.get(name, 1.0))
            picked.append((table.entropy_KN[at], table.label_logp_KN[at], table.max_logp_KN[at]))
        stats = RowStats(*(torch.stack(columns) for columns in zip(*picked, strict=True)))
        # The consensus depends on the temperatures of all teachers, also of those not selected.
        is_raw = all(temperatures.get(name, 1.0) == 1.0 for name in self.teachers)
        if self.consensus_kl_KN is None or not is_raw:
            return stats
        indices = [self.teachers.index(name) for name in teachers]
        return replace(stats, consensus_kl_KN=self.consensus_kl_KN[indices])

    def linear_nll(
        self,
        weighting: Weighting,
        temperatures: Mapping[str, float],
        teachers: Sequence[str] | None = None,
    ) -> Tensor:
        """Return the NLL of the linear pool at every row, (N,) float64 nats.

        Temperatures must be on the grid. A rule that needs the consensus takes no temperatures, and
        reads the consensus of all teachers even for a subset of them.
        """
        names = self.teachers if teachers is None else list(teachers)
        stats = self.stats(temperatures, names)
        return linear_pool_nll(stats, weighting, self.rows, names)

    def mean_weights(
        self, weighting: Weighting, temperatures: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the mean weight of each teacher."""
        weights_K = self.weights(weighting, temperatures).mean(1)
        return dict(zip(self.teachers, weights_K.tolist(), strict=True))

    def weights(self, weighting: Weighting, temperatures: Mapping[str, float]) -> Tensor:
        """Return the weights, (K, N) float64. Each column sums to 1."""
        stats = self.stats(temperatures, self.teachers)
        return weighting.log_scores(stats, self.rows, self.teachers)[0].softmax(0)

    def metrics(self, teacher: str) -> Metrics:
        """Return the metrics of one raw teacher."""
        stats = self.stats({}, [teacher])
        label_logp_N, max_logp_N = stats.label_logp_KN[0], stats.max_logp_KN[0]
        return Metrics(
            name=teacher,
            targets=self.targets,
            nll_N=-label_logp_N.float().numpy(),
            entropy_N=stats.entropy_KN[0].float().numpy(),
            confidence_N=max_logp_N.exp().float().numpy(),
            # No argmax is stored; a tie at the maximum counts as correct.
            is_correct_N=(label_logp_N == max_logp_N).numpy(),
        )

    @cached_property
    def _by_teacher(self) -> dict[str, RowStats]:
        return {name: self.tables.teacher(name) for name in self.tables.names}

    @cached_property
    def rows(self) -> Rows:
        """All rows, with document numbers that are unique across batches."""
        return self.tables.rows()

    def _column(self, temperature: float) -> int:
        """Return the index of the nearest grid temperature."""
        grid = self.tables.grid
        return min(range(len(grid)), key=lambda at: abs(grid[at] - temperature))


def sweep_teachers(teachers: Sequence[Teacher], split: CalibrationSplit) -> Scalars:
    """Score each teacher once on the chosen windows and keep only scalars.

    Args:
        teachers: live teachers, or all read from a per-teacher cache. The disagreement of cached
            teachers is measured on their stored tokens, with the remaining mass spread evenly.
        split: the windows.

    Raises:
        DataError: the windows have no target tokens.
    """
    stored_at = teachers[0].capabilities.temperatures
    grid = TEMPERATURES if stored_at is None else sorted((1.0, *stored_at))
    tables = TemperatureTables(grid=grid)
    origins: list[Origins] = []
    consensus: list[Tensor] = []
    pairs = _PairwiseDisagreement(len(teachers))
    step = max(1, sum(window_counts(split.dataset, split.windows)) // JSD_ROWS)
    with torch.no_grad():
        for chunk in split.chunks():
            outputs = [teacher.score(chunk.batch, chunk.rows) for teacher in teachers]
            rows = blocks_of(chunk.rows, outputs[0].distribution, None)[0]
            tables.add(outputs, rows)
            if stored_at is None:
                consensus.append(_consensus(outputs, rows))
            pairs.add(outputs, len(chunk.rows), step)
            origins.append(chunk.origins)
    targets = gather_targets(origins, split.dataset)
    jsd_KK, differs_KK = pairs.means()
    kl_KN = torch.cat(consensus, 1) if stored_at is None else None
    return Scalars(tables, targets, jsd_KK, differs_KK, kl_KN)


def sweep_fusions(
    teachers: Sequence[Teacher],
    split: CalibrationSplit,
    fusions: Sequence[tuple[Fusion, Fusion]],
    is_second_N: Tensor,
    temperatures: Sequence[float] = (1.0,),
) -> Tensor:
    """Return the NLL of each fused target per pooled temperature and row, (F, G, N) float64.

    The teachers are read once.

    Args:
        teachers: the frozen models.
        split: the windows to read.
        fusions: per candidate, the fusions that score the rows of the first and the second fold.
        is_second_N: (N,) whether each row belongs to the second fold, by whole pieces of documents.
        temperatures: pooled temperatures at which to score each fusion.
    """
    parts: list[Tensor] = []
    start = 0
    with torch.no_grad():
        for outputs, rows in split.outputs(teachers):
            is_second_n = is_second_N[start : start + len(rows)]
            start += len(rows)
            outputs = _cache_logits(outputs, rows)
            nll_FGn = torch.zeros(len(fusions), len(temperatures), len(rows), dtype=torch.float64)
            for fold, in_fold_n in enumerate((~is_second_n, is_second_n)):
                if not in_fold_n.any():
                    continue
                fold_outputs, fold_rows = _select_rows(outputs, rows, in_fold_n)
                nll_FGn[..., in_fold_n] = torch.stack(
                    [
                        _nll_at_temperatures(pair[fold], fold_outputs, fold_rows, temperatures)
                        for pair in fusions
                    ]
                )
            parts.append(nll_FGn)
    return torch.cat(parts, -1)


def _nll_at_temperatures(
    fusion: Fusion, outputs: Sequence[Answer], rows: Rows, temperatures: Sequence[float]
) -> Tensor:
    """Return (G, n) NLL of p^(1/T) / Z at the labels."""
    target = fuse(fusion, outputs, rows)
    parts: list[Tensor] = []
    for block in blocks_of(rows, outputs[0].distribution, None)[1]:
        logp_nV, labels_n1 = target.block(block).logp(), rows.labels[block, None]
        label_logp_n = logp_nV.gather(1, labels_n1)[:, 0]
        # log Z is a logsumexp over V; at T = 1 it is 0.
        columns = [
            -label_logp_n
            if temperature == 1.0
            else torch.logsumexp(logp_nV / temperature, -1) - label_logp_n / temperature
            for temperature in temperatures
        ]
        parts.append(torch.stack(columns).double().cpu())
    return torch.cat(parts, -1)


def _cache_logits(outputs: Sequence[Answer], rows: Rows) -> list[Answer]:
    """Hold the logits of a batch if they fit, so that each head is applied once for all fusions."""
    vocab_size = outputs[0].distribution.logits(slice(0, 1)).shape[1]
    if len(outputs) * len(rows) * vocab_size > MAX_CACHED_ELEMENTS:
        return list(outputs)
    return [
        replace(output, distribution=DenseRows(output.distribution.logits(slice(0, len(rows)))))
        for output in outputs
    ]


def _select_rows(
    outputs: Sequence[Answer], rows: Rows, is_kept_n: Tensor
) -> tuple[list[Answer], Rows]:
    """Return a subset of the rows and of the teacher outputs."""
    if is_kept_n.all():
        return list(outputs), rows
    kept_n = is_kept_n.nonzero()[:, 0]
    picked = [replace(output, distribution=output.distribution.take(kept_n)) for output in outputs]
    return picked, rows.part(kept_n.to(rows.labels.device))


def _consensus(outputs: Sequence[Answer], rows: Rows) -> Tensor:
    """Return (K, N) KL of each teacher from the mean of all, on the CPU."""
    reader = TeacherReader(outputs, rows, {})
    starts = range(0, len(rows), CONSENSUS_ROWS)
    blocks = [slice(start, min(start + CONSENSUS_ROWS, len(rows))) for start in starts]
    parts = [reader.stats(block, consensus=True).consensus_kl().cpu() for block in blocks]
    return torch.cat(parts, dim=1)


class _PairwiseDisagreement:
    """Running disagreement of each pair of teachers, on every `step`-th row of each batch."""

    def __init__(self, num_teachers: int) -> None:
        self._jsd_KK = torch.zeros(num_teachers, num_teachers, dtype=torch.float64)
        self._differs_KK = torch.zeros_like(self._jsd_KK)
        self._num_rows = 0

    def add(self, outputs: Sequence[Answer], num_rows: int, step: int) -> None:
        vocab_size = outputs[0].distribution.logits(slice(0, 1)).shape[1]
        size = step * max(1, PAIR_ELEMENTS // (vocab_size * len(outputs)))
        for start in range(0, num_rows, size):
            block = slice(start, min(start + size, num_rows), step)
            logits = [output.distribution.logits(block) for output in outputs]
            logp_KnV = torch.stack([x.to(logits[0].device) for x in logits]).log_softmax(-1)
            top1_Kn = logp_KnV.argmax(-1)
            self._jsd_KK += pairwise_jsd(logp_KnV).sum(-1).double().cpu()
            self._differs_KK += (top1_Kn[:, None] != top1_Kn[None]).sum(-1).double().cpu()
            self._num_rows += top1_Kn.shape[1]

    def means(self) -> tuple[Tensor, Tensor]:
        """Return (K, K) mean divergence in nats, and (K, K) share of differing top-1 tokens."""
        return self._jsd_KK / self._num_rows, self._differs_KK / self._num_rows


def pairwise_jsd(logp_KnV: Tensor) -> Tensor:
    """Return JSD(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2, (K, n, V) -> (K, K, n) in nats."""
    prob_KnV = logp_KnV.exp()
    entropy_Kn = torch.special.entr(prob_KnV).sum(-1)
    jsd_KKn = entropy_Kn.new_zeros(len(entropy_Kn), *entropy_Kn.shape)
    # Pair by pair: all at once would take a (K, K, n, V) buffer.
    for i in range(len(prob_KnV)):
        for j in range(i):
            mixture_n = torch.special.entr((prob_KnV[i] + prob_KnV[j]) / 2).sum(-1)
            jsd_n = mixture_n - (entropy_Kn[i] + entropy_Kn[j]) / 2
            # Rounding can push the JSD of equal distributions below 0.
            jsd_KKn[i, j] = jsd_KKn[j, i] = jsd_n.clamp(min=0.0)
    return jsd_KKn
