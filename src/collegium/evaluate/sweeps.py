"""What a pre-flight reads off the teachers: scalars per row and temperature, disagreement, and fused targets.

Shapes: N rows of the calibration split, n block of rows, V vocabulary, K teachers, G temperatures, F fusions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from collegium.data.pack import PackedDataset
from collegium.evaluate.metrics import Metrics, Targets
from collegium.evaluate.scoring import (
    Chunk,
    Origins,
    Progress,
    Scorer,
    blocks_of,
    gather_targets,
    iterate_chunks,
    window_counts,
)
from collegium.fusion.calibration import TEMPERATURES, TemperatureTables, linear_pool_nll
from collegium.fusion.pooling import FusedTarget, Fusion
from collegium.fusion.stream import TeacherReader
from collegium.fusion.weights import RowStats, Weighting
from collegium.types import DenseRows, RowLogits, Rows, TeacherRows

JSD_ROWS = 4096
"""About how many rows the disagreement of the teachers is measured on."""

CONSENSUS_ROWS = 256
"""Rows per block of the divergence from the consensus."""

REMEMBERED_ELEMENTS = 2**28
"""Logits of all teachers for one batch that are held while its fusions are compared: 1 GiB."""

PAIR_ELEMENTS = 2**22
"""Elements of one (K, n, V) buffer of that measurement."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The chosen windows of the calibration split."""

    dataset: PackedDataset
    windows: Sequence[int]
    batch_size: int
    progress: Progress | None = None

    def chunks(self) -> Iterator[Chunk]:
        """The batches of these windows, in order."""
        return iterate_chunks(
            self.dataset,
            batch_size=self.batch_size,
            windows=self.windows,
            progress=self.progress,
        )

    def answers(self, teachers: Sequence[Scorer]) -> Iterator[tuple[list[TeacherRows], Rows]]:
        """What all teachers say about each batch, and its rows on the device of the answers."""
        for chunk in self.chunks():
            found = [teacher.score(chunk.batch, chunk.rows) for teacher in teachers]
            yield found, blocks_of(chunk.rows, found[0].scores, None)[0]


@dataclass(frozen=True, eq=False)
class Scalars:
    """What each teacher says about each row at each temperature: enough for every linear pool."""

    tables: TemperatureTables
    targets: Targets
    jsd_KK: Tensor
    """Mean Jensen-Shannon divergence of each pair in nats, float64."""
    differs_KK: Tensor
    """Share of rows on which the pair's most likely tokens differ, float64."""
    consensus_kl_KN: Tensor | None
    """(K, N) KL(P_k || mean of all P) of the raw teachers: it changes with each temperature, and is kept for 1 alone. None
    for teachers out of a cache, which are no whole distributions."""

    @property
    def teachers(self) -> list[str]:
        """Names in the order of K."""
        return list(self.tables.names)

    def stats(self, temperatures: Mapping[str, float], teachers: Sequence[str]) -> RowStats:
        """(K, N) statistics of these teachers at temperatures of the grid, 1 where none is given."""
        picked = []
        for name in teachers:
            table, at = self._by_teacher[name], self._column(temperatures.get(name, 1.0))
            picked.append((table.entropy_KN[at], table.label_logp_KN[at], table.max_logp_KN[at]))
        stats = RowStats(*(torch.stack(columns) for columns in zip(*picked, strict=True)))
        is_raw = all(temperatures.get(name, 1.0) == 1.0 for name in self.teachers)
        if self.consensus_kl_KN is None or not is_raw:
            return stats
        numbers = [self.teachers.index(name) for name in teachers]
        return replace(stats, consensus_kl_KN=self.consensus_kl_KN[numbers])

    def linear_nll(
        self,
        weighting: Weighting,
        temperatures: Mapping[str, float],
        teachers: Sequence[str] | None = None,
    ) -> Tensor:
        """NLL of the linear pool at every row: (N,) float64 nats; temperatures must be on the grid.

        A rule that needs the consensus goes without temperatures, and takes that of all teachers also for some of them.
        """
        names = self.teachers if teachers is None else list(teachers)
        stats = self.stats(temperatures, names)
        return linear_pool_nll(stats, weighting, self.rows, names)

    def shares(self, weighting: Weighting, temperatures: Mapping[str, float]) -> dict[str, float]:
        """Mean weight of each teacher."""
        weights_K = self.weights(weighting, temperatures).mean(1)
        return dict(zip(self.teachers, weights_K.tolist(), strict=True))

    def weights(self, weighting: Weighting, temperatures: Mapping[str, float]) -> Tensor:
        """(K, N) float64, each column sums to 1."""
        stats = self.stats(temperatures, self.teachers)
        return weighting.log_scores(stats, self.rows, self.teachers)[0].softmax(0)

    def metrics(self, teacher: str) -> Metrics:
        """The raw teacher on its own."""
        stats = self.stats({}, [teacher])
        label_logp_N, max_logp_N = stats.label_logp_KN[0], stats.max_logp_KN[0]
        return Metrics(
            name=teacher,
            targets=self.targets,
            nll_N=-label_logp_N.float().numpy(),
            entropy_N=stats.entropy_KN[0].float().numpy(),
            confidence_N=max_logp_N.exp().float().numpy(),
            is_correct_N=(label_logp_N == max_logp_N).numpy(),
        )

    @cached_property
    def _by_teacher(self) -> dict[str, RowStats]:
        return {name: self.tables.teacher(name) for name in self.tables.names}

    @cached_property
    def rows(self) -> Rows:
        """All rows, with documents that are unique among them."""
        return self.tables.rows()

    def _column(self, temperature: float) -> int:
        """The nearest temperature of the grid."""
        grid = self.tables.grid
        return min(range(len(grid)), key=lambda at: abs(grid[at] - temperature))


def sweep_teachers(
    teachers: Sequence[Scorer], split: Calibration, *, stored_at: Sequence[float] | None = None
) -> Scalars:
    """Score each teacher once on the chosen windows and keep scalars alone.

    Args:
        teachers: live ones, or all out of a per-teacher cache.
        split: the windows.
        stored_at: temperatures beside 1 that the cache keeps; None for live teachers. How far two teachers out of a cache are apart is
            judged by the tokens that it keeps, with the rest spread evenly.

    Raises:
        DataError: the windows hold no target token.
    """
    grid = TEMPERATURES if stored_at is None else sorted((1.0, *stored_at))
    tables = TemperatureTables(grid=grid)
    origins: list[Origins] = []
    consensus: list[Tensor] = []
    pairs = _Pairs(len(teachers))
    step = max(1, sum(window_counts(split.dataset, split.windows)) // JSD_ROWS)
    with torch.no_grad():
        for chunk in split.chunks():
            answers = [teacher.score(chunk.batch, chunk.rows) for teacher in teachers]
            rows = blocks_of(chunk.rows, answers[0].scores, None)[0]
            tables.add(answers, rows)
            if stored_at is None:
                consensus.append(_consensus(answers, rows))
            pairs.add(answers, len(chunk.rows), step)
            origins.append(chunk.origins)
    targets = gather_targets(origins, split.dataset)
    jsd_KK, differs_KK = pairs.means()
    kl_KN = torch.cat(consensus, 1) if stored_at is None else None
    return Scalars(tables, targets, jsd_KK, differs_KK, kl_KN)


def sweep_fusions(
    teachers: Sequence[Scorer],
    split: Calibration,
    fusions: Sequence[tuple[Fusion, Fusion]],
    is_second_N: Tensor,
    temperatures: Sequence[float] = (1.0,),
) -> Tensor:
    """NLL of each fused target at every row and pooled temperature, (F, G, N) float64, in one reading of the teachers.

    Args:
        teachers: the frozen models.
        split: the windows to read.
        fusions: per candidate, the fusion that judges the rows of the first fold, and the one for those of the second.
        is_second_N: (N,) whether a row belongs to the second fold; whole documents.
        temperatures: pooled temperatures to judge each at.
    """
    parts: list[Tensor] = []
    start = 0
    with torch.no_grad():
        for answers, rows in split.answers(teachers):
            is_second_n = is_second_N[start : start + len(rows)]
            start += len(rows)
            answers = _remembered(answers, rows)
            nll_FGn = torch.zeros(len(fusions), len(temperatures), len(rows), dtype=torch.float64)
            for fold, is_here_n in enumerate((~is_second_n, is_second_n)):
                if not is_here_n.any():
                    continue
                picked, own = _picked(answers, rows, is_here_n)
                nll_FGn[..., is_here_n] = torch.stack(
                    [_pooled_nll(pair[fold], picked, own, temperatures) for pair in fusions]
                )
            parts.append(nll_FGn)
    return torch.cat(parts, -1)


def _pooled_nll(
    fusion: Fusion, answers: Sequence[TeacherRows], rows: Rows, temperatures: Sequence[float]
) -> Tensor:
    """(G, n) NLL of p^(1/T) / Z at the labels."""
    target = FusedTarget(fusion, answers, rows)
    parts: list[Tensor] = []
    for block in blocks_of(rows, answers[0].scores, None)[1]:
        logp_nV, labels_n1 = target.block(block).logp_nV, rows.labels[block, None]
        label_logp_n = logp_nV.gather(1, labels_n1)[:, 0]
        columns = [
            -label_logp_n
            if temperature == 1.0
            else torch.logsumexp(logp_nV / temperature, -1) - label_logp_n / temperature
            for temperature in temperatures
        ]
        parts.append(torch.stack(columns).double().cpu())
    return torch.cat(parts, -1)


def _remembered(answers: Sequence[TeacherRows], rows: Rows) -> list[TeacherRows]:
    """The same answers with their logits held, where they are few enough: then many fusions apply each head once."""
    vocab_size = answers[0].scores.logits(slice(0, 1)).shape[1]
    if len(answers) * len(rows) * vocab_size > REMEMBERED_ELEMENTS:
        return list(answers)
    return [
        replace(answer, scores=DenseRows(answer.scores.logits(slice(0, len(rows)))))
        for answer in answers
    ]


def _picked(
    answers: Sequence[TeacherRows], rows: Rows, is_kept_n: Tensor
) -> tuple[list[TeacherRows], Rows]:
    """Some of the rows, and what the teachers say about them."""
    if is_kept_n.all():
        return list(answers), rows
    kept_n = is_kept_n.nonzero()[:, 0]
    picked = [replace(answer, scores=_PickedRows(answer.scores, kept_n)) for answer in answers]
    return picked, rows.part(kept_n.to(rows.labels.device))


@dataclass(frozen=True, eq=False)
class _PickedRows:
    """Some rows of a teacher's answer, as if there were no others."""

    scores: RowLogits
    kept_n: Tensor

    def logits(self, block: slice) -> Tensor:
        kept_n = self.kept_n[block]
        first, last = int(kept_n[0]), int(kept_n[-1])
        between_nV = self.scores.logits(slice(first, last + 1))
        return between_nV[(kept_n - first).to(between_nV.device)]


def _consensus(answers: Sequence[TeacherRows], rows: Rows) -> Tensor:
    """(K, N) divergence of each teacher from the mean of all, on the CPU."""
    reader = TeacherReader(answers, rows, {})
    starts = range(0, len(rows), CONSENSUS_ROWS)
    blocks = [slice(start, min(start + CONSENSUS_ROWS, len(rows))) for start in starts]
    found = [reader.stats(block, consensus=True).consensus_kl().cpu() for block in blocks]
    return torch.cat(found, dim=1)


class _Pairs:
    """How far each pair of teachers is apart, on every step-th row of each batch."""

    def __init__(self, num_teachers: int) -> None:
        self._jsd_KK = torch.zeros(num_teachers, num_teachers, dtype=torch.float64)
        self._differs_KK = torch.zeros_like(self._jsd_KK)
        self._num_rows = 0

    def add(self, answers: Sequence[TeacherRows], num_rows: int, step: int) -> None:
        vocab_size = answers[0].scores.logits(slice(0, 1)).shape[1]
        size = step * max(1, PAIR_ELEMENTS // (vocab_size * len(answers)))
        for start in range(0, num_rows, size):
            block = slice(start, min(start + size, num_rows), step)
            logits = [answer.scores.logits(block) for answer in answers]
            logp_KnV = torch.stack([x.to(logits[0].device) for x in logits]).log_softmax(-1)
            top1_Kn = logp_KnV.argmax(-1)
            self._jsd_KK += pairwise_jsd(logp_KnV).sum(-1).double().cpu()
            self._differs_KK += (top1_Kn[:, None] != top1_Kn[None]).sum(-1).double().cpu()
            self._num_rows += top1_Kn.shape[1]

    def means(self) -> tuple[Tensor, Tensor]:
        """(K, K) mean divergence in nats, and (K, K) share of different most likely tokens."""
        return self._jsd_KK / self._num_rows, self._differs_KK / self._num_rows


def pairwise_jsd(logp_KnV: Tensor) -> Tensor:
    """JSD(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2 of each pair, (K, n, V) -> (K, K, n) in nats."""
    prob_KnV = logp_KnV.exp()
    entropy_Kn = torch.special.entr(prob_KnV).sum(-1)
    jsd_KKn = entropy_Kn.new_zeros(len(entropy_Kn), *entropy_Kn.shape)
    for one in range(len(prob_KnV)):
        for other in range(one):
            middle_n = torch.special.entr((prob_KnV[one] + prob_KnV[other]) / 2).sum(-1)
            jsd_n = middle_n - (entropy_Kn[one] + entropy_Kn[other]) / 2
            jsd_KKn[one, other] = jsd_KKn[other, one] = jsd_n.clamp(min=0.0)
    return jsd_KKn
