"""Sweeps of a preflight over the teachers: scalars, disagreement, and the NLL of fused targets.

Shapes: N rows of the calibration split, n block of rows, V vocabulary, K teachers, G temperatures,
F fusions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from collegium.distributions import Answer, DenseRows, Teacher
from collegium.evaluate.metrics import Metrics, ScoredTokens
from collegium.evaluate.scoring import Windows, blocks_of
from collegium.fusion.calibration import TEMPERATURES, TemperatureTables
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.pools import TeacherReader
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
class Scalars:
    """Scalars of each teacher on the calibration split, and the disagreement of each pair."""

    tables: TemperatureTables
    targets: ScoredTokens
    jsd_KK: Tensor
    """Mean Jensen-Shannon divergence of each pair in nats, float64."""
    differs_KK: Tensor
    """Share of rows on which the most likely tokens of a pair differ, float64."""

    def metrics(self, teacher: str) -> Metrics:
        """Return the metrics of one raw teacher."""
        stats = self.tables.stats({}, [teacher])
        label_logp_N, max_logp_N = stats.label_logp_KN[0], stats.max_logp_KN[0]
        return Metrics(
            targets=self.targets,
            nll_N=-label_logp_N.float().numpy(),
            entropy_N=stats.entropy_KN[0].float().numpy(),
            confidence_N=max_logp_N.exp().float().numpy(),
            # No argmax is stored; a tie at the maximum counts as correct.
            is_correct_N=(label_logp_N == max_logp_N).numpy(),
        )


@torch.no_grad()
def sweep_teachers(
    teachers: Sequence[Teacher], split: Windows, *, with_consensus: bool = True
) -> Scalars:
    """Score each teacher once on the chosen windows and keep only scalars.

    Args:
        teachers: live teachers, or all read from a per-teacher cache. The disagreement of cached
            teachers is measured on their stored tokens, with the remaining mass spread evenly.
        split: the windows.
        with_consensus: whether to measure the consensus of live teachers, at the cost of two more
            passes of each head.

    Raises:
        DataError: the windows have no target tokens.
    """
    stored_at = teachers[0].capabilities.temperatures
    grid = TEMPERATURES if stored_at is None else sorted((1.0, *stored_at))
    tables: list[TemperatureTables] = []
    disagreement: list[tuple[Tensor, Tensor, int]] = []
    tokens: list[ScoredTokens] = []
    step = max(1, int(split.counts().sum()) // JSD_ROWS)
    for answers, rows, batch_tokens in split.answers(teachers):
        kl_KN = _consensus(answers, rows) if with_consensus and stored_at is None else None
        tables.append(TemperatureTables.of(answers, rows, grid=grid, consensus_kl_KN=kl_KN))
        disagreement += _disagreement(answers, len(rows), step)
        tokens.append(batch_tokens)
    targets = ScoredTokens.cat(tokens)
    jsd, differs, counts = zip(*disagreement, strict=True)
    zero_KK, num_rows = torch.zeros_like(jsd[0]), sum(counts)
    return Scalars(
        TemperatureTables.cat(tables),
        targets,
        sum(jsd, start=zero_KK) / num_rows,
        sum(differs, start=zero_KK) / num_rows,
    )


@torch.no_grad()
def sweep_fusions(
    teachers: Sequence[Teacher],
    split: Windows,
    fusions: Sequence[tuple[Fusion, Fusion]],
    is_second_N: Tensor,
    temperatures: Sequence[float],
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
    for answers, rows, _ in split.answers(teachers):
        is_second_n = is_second_N[start : start + len(rows)]
        start += len(rows)
        answers = _cache_logits(answers, rows)
        nll_FGn = torch.zeros(len(fusions), len(temperatures), len(rows), dtype=torch.float64)
        for fold, in_fold_n in enumerate((~is_second_n, is_second_n)):
            if not in_fold_n.any():
                continue
            fold_answers, fold_rows = _select_rows(answers, rows, in_fold_n)
            for f, pair in enumerate(fusions):
                nll_FGn[f][:, in_fold_n] = _nll_at_temperatures(
                    pair[fold], fold_answers, fold_rows, temperatures
                )
        parts.append(nll_FGn)
    return torch.cat(parts, -1)


def _nll_at_temperatures(
    fusion: Fusion, answers: Sequence[Answer], rows: Rows, temperatures: Sequence[float]
) -> Tensor:
    """Return (G, n) NLL of p^(1/T) / Z at the labels."""
    target = fuse(fusion, answers, rows)
    parts: list[Tensor] = []
    for block in blocks_of(rows, answers[0].distribution):
        logp_nV, labels_n1 = target.block(block).logp(), rows.labels[block, None]
        label_logp_n = logp_nV.gather(1, labels_n1)[:, 0]
        # log Z is a logsumexp over V; at T = 1 it is 0.
        columns = [
            -label_logp_n if t == 1.0 else torch.logsumexp(logp_nV / t, -1) - label_logp_n / t
            for t in temperatures
        ]
        parts.append(torch.stack(columns).double().cpu())
    return torch.cat(parts, -1)


def _cache_logits(answers: Sequence[Answer], rows: Rows) -> list[Answer]:
    """Hold the logits of a batch if they fit, so that each head is applied once for all fusions."""
    vocab_size = answers[0].distribution.logits(slice(0, 1)).shape[1]
    if len(answers) * len(rows) * vocab_size > MAX_CACHED_ELEMENTS:
        return list(answers)
    everything = slice(0, len(rows))
    return [replace(a, distribution=DenseRows(a.distribution.logits(everything))) for a in answers]


def _select_rows(
    answers: Sequence[Answer], rows: Rows, is_kept_n: Tensor
) -> tuple[list[Answer], Rows]:
    if is_kept_n.all():
        return list(answers), rows
    kept_n = is_kept_n.nonzero()[:, 0]
    picked = [replace(answer, distribution=answer.distribution.take(kept_n)) for answer in answers]
    return picked, rows.part(kept_n.to(rows.labels.device))


def _consensus(answers: Sequence[Answer], rows: Rows) -> Tensor:
    """Return (K, N) KL of each teacher from the mean of all, on the CPU."""
    reader = TeacherReader(answers, rows, {})
    blocks = blocks_of(rows, answers[0].distribution, CONSENSUS_ROWS)
    parts = [reader.stats(block, consensus=True).consensus_kl().cpu() for block in blocks]
    return torch.cat(parts, dim=1)


def _disagreement(
    answers: Sequence[Answer], num_rows: int, step: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield sums over every `step`-th row: (K, K) JSD and different top-1 tokens, and the count."""
    vocab_size = answers[0].distribution.logits(slice(0, 1)).shape[1]
    size = step * max(1, PAIR_ELEMENTS // (vocab_size * len(answers)))
    for start in range(0, num_rows, size):
        block = slice(start, min(start + size, num_rows), step)
        logits = [answer.distribution.logits(block) for answer in answers]
        logp_KnV = torch.stack([x.to(logits[0].device) for x in logits]).log_softmax(-1)
        top1_Kn = logp_KnV.argmax(-1)
        differs_KK = (top1_Kn[:, None] != top1_Kn[None]).sum(-1)
        jsd_KK = pairwise_jsd(logp_KnV).sum(-1)
        yield jsd_KK.double().cpu(), differs_KK.double().cpu(), top1_Kn.shape[1]


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
