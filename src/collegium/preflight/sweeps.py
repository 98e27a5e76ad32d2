"""Sweeps of a preflight over the teachers: scalars, disagreement, and the NLL of fused targets.

Shapes: N rows of the calibration split, n block of rows, V vocabulary, K teachers, G temperatures,
F fusions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from collegium.distributions import Answer, Teacher
from collegium.evaluate.metrics import Metrics, ScoredTokens
from collegium.evaluate.scoring import Windows
from collegium.fusion.buffered import (
    BufferedRows,
    buffer_rows,
    buffered,
    split_rows,
    strips_of,
    vocab_size_of,
)
from collegium.fusion.calibration import NEGLIGIBLE, TEMPERATURES, GridReader, TemperatureTables
from collegium.fusion.fuse import Fusion, StreamedTarget, Target, fuse
from collegium.fusion.pools import TeacherReader
from collegium.fusion.weighting import RowStats
from collegium.kernels.plain import TorchKernels, strips
from collegium.kernels.rows import LogSumExp, RawRows, RunningMean, Workspace, top_tokens
from collegium.types import Rows, map_tensors

NUM_BYTES = 2**28
"""Memory for logits by default."""

JSD_ROWS = 4096
"""Approximate number of rows on which the disagreement of the teachers is measured."""

MAX_BUFFERS = 6
"""Further (n, V) buffers in use besides those of the teachers' logits."""


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
    teachers: Sequence[Teacher],
    split: Windows,
    *,
    with_consensus: bool = True,
    num_bytes: int = NUM_BYTES,
) -> Scalars:
    """Score each teacher once on the chosen windows and keep only scalars.

    Each head is applied once per row.

    Args:
        teachers: live teachers, or all read from a per-teacher cache. The disagreement of cached
            teachers is measured on their stored tokens, with the remaining mass spread evenly.
        split: the windows.
        with_consensus: whether to measure the consensus of live teachers.
        num_bytes: memory for logits.

    Raises:
        DataError: the windows have no target tokens.
    """
    stored_at = teachers[0].capabilities.temperatures
    grid = TEMPERATURES if stored_at is None else sorted((1.0, *stored_at))
    grid_reader = GridReader(grid)
    tables: list[TemperatureTables] = []
    disagreement: list[tuple[Tensor, Tensor, int]] = []
    tokens: list[ScoredTokens] = []
    step = max(1, int(split.counts().sum()) // JSD_ROWS)
    has_consensus = with_consensus and stored_at is None
    for answers, rows, batch_tokens in split.answers(teachers):
        vocab_size, size = _sizes(answers, num_bytes)
        answers = buffered(answers, size)
        columns: dict[str, list[RowStats]] = {answer.name: [] for answer in answers}
        kl = []
        # Every reader reads the block that is in the buffers.
        for block in split_rows(slice(0, len(rows)), size):
            for answer in answers:
                stats = grid_reader.read(answer.distribution, rows.labels[block], block)
                columns[answer.name].append(map_tensors(stats, Tensor.cpu))
            if has_consensus:
                reader = TeacherReader(answers, rows, {})
                for strip in strips_of(block, vocab_size, rows.labels.device):
                    kl.append(reader.stats(strip, consensus=True).consensus_kl().cpu())
            disagreement += _disagreement(answers, block, step)
        kl_KN = torch.cat(kl, dim=1) if has_consensus else None
        stats = {name: RowStats.cat(parts) for name, parts in columns.items()}
        tables.append(TemperatureTables(grid, stats, rows.to(torch.device("cpu")), kl_KN))
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
    *,
    num_bytes: int = NUM_BYTES,
) -> Tensor:
    """Return the NLL of each fused target per pooled temperature and row, (F, G, N) float64.

    The teachers are read once, and each head is applied once per row, or twice where a rule reads
    all rows of a batch first, whatever the number of fusions.

    Args:
        teachers: the frozen models.
        split: the windows to read.
        fusions: per candidate, the fusions that score the rows of the first and the second fold.
        is_second_N: (N,) whether each row belongs to the second fold, by whole pieces of documents.
        temperatures: pooled temperatures at which to score each fusion.
        num_bytes: memory for logits.
    """
    parts: list[Tensor] = []
    start = 0
    reader = _PooledReader(temperatures, num_bytes)
    for answers, rows, _ in split.answers(teachers):
        is_second_n = is_second_N[start : start + len(rows)]
        start += len(rows)
        nll_FGn = torch.zeros(len(fusions), len(temperatures), len(rows), dtype=torch.float64)
        for fold, in_fold_n in enumerate((~is_second_n, is_second_n)):
            if in_fold_n.any():
                fold_answers, fold_rows = _select_rows(answers, rows, in_fold_n)
                members = [pair[fold] for pair in fusions]
                nll_FGn[..., in_fold_n] = reader.read(members, fold_answers, fold_rows)
        parts.append(nll_FGn)
    return torch.cat(parts, -1)


class _SharedKernels(TorchKernels):
    """Kernels that compute each distribution in a buffer once, for all fusions that pool it.

    Without them, reading and exponentiating the members is four fifths of the time of a sweep.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: frozenset[int] = frozenset()
        self._read_rows: dict[Any, tuple[LogSumExp, Tensor]] = {}
        self._members: dict[Any, Tensor] = {}
        self._memory = Workspace()

    def attend(self, rows: Iterable[RawRows]) -> None:
        """Share what is computed of these rows from now on, and forget all others."""
        self._buffers = frozenset(one.values_nV.untyped_storage().data_ptr() for one in rows)
        self._read_rows.clear()
        self._members.clear()

    def _key(self, rows: RawRows) -> Any:
        values_nV = rows.values_nV
        is_shared = values_nV.untyped_storage().data_ptr() in self._buffers
        place = values_nV.data_ptr(), values_nV.shape[0], rows.scale, rows.softcap
        return place if is_shared else None

    def read(self, rows: RawRows) -> tuple[LogSumExp, Tensor]:
        key = self._key(rows)
        if key is None:
            return super().read(rows)
        if key not in self._read_rows:
            self._read_rows[key] = super().read(rows)
        return self._read_rows[key]

    def add_(
        self, mean: RunningMean, rows: RawRows, logsumexp: LogSumExp, share_n: Tensor | None
    ) -> None:
        key = self._key(rows)
        if key is None:
            return super().add_(mean, rows, logsumexp, share_n)
        key = *key, mean.is_log, mean.values_nV.dtype
        if key not in self._members:
            # The same memory in every strip, or the heap would fragment.
            place = f"member {len(self._members)}"
            member_nV = self._memory.matrix(place, mean.values_nV.shape, mean.values_nV)
            super().add_(RunningMean(member_nV, is_log=mean.is_log), rows, logsumexp, None)
            self._members[key] = member_nV
        mean_nV, member_nV = mean.values_nV, self._members[key]
        if share_n is None:
            mean_nV.copy_(member_nV)
        elif mean.is_log:
            mean_nV.lerp_(member_nV, share_n[:, None])
        else:
            mean_nV.mul_((1.0 - share_n)[:, None]).addcmul_(member_nV, share_n[:, None])


class _PooledReader:
    """Reads many fusions of the same answers, strip by strip."""

    def __init__(self, temperatures: Sequence[float], num_bytes: int) -> None:
        self._temperatures = temperatures
        self._num_bytes = num_bytes
        # One target at a time is in use, so all of them share the memory.
        self._kernels, self._workspace = _SharedKernels(), Workspace()

    def read(self, fusions: Sequence[Fusion], answers: Sequence[Answer], rows: Rows) -> Tensor:
        """Return (F, G, n) NLL of p^(1/T) / Z at the labels, after at most two products per row."""
        vocab_size, size = _sizes(answers, self._num_bytes)
        members = buffered(answers, size)
        targets = [
            fuse(fusion, members, rows, kernels=self._kernels, workspace=self._workspace)
            for fusion in fusions
        ]
        strips = strips_of(slice(0, len(rows)), vocab_size, rows.labels.device)
        if not all(fusion.weighting.streams for fusion in fusions):
            for strip, target in self._shared(strips, members, targets):
                if isinstance(target, StreamedTarget):
                    target.read_ahead(strip)
        nll_NFG = torch.empty(len(rows), len(fusions), len(self._temperatures), dtype=torch.float64)
        for number, (strip, target) in enumerate(self._shared(strips, members, targets)):
            nll_NFG[strip, number % len(fusions)] = self._nll(
                target.block(strip).logp(), rows.labels[strip]
            ).T
        return nll_NFG.permute(1, 2, 0)

    def _shared(
        self, strips: Sequence[slice], members: Sequence[Answer], targets: Sequence[Target]
    ) -> Iterator[tuple[slice, Target]]:
        """Yield every target with every strip, all targets of one strip after the other."""
        held = [a.distribution for a in members if isinstance(a.distribution, BufferedRows)]
        for strip in strips:
            self._kernels.attend([distribution.rows(strip) for distribution in held])
            yield from ((strip, target) for target in targets)

    def _nll(self, logp_nV: Tensor, labels_n: Tensor) -> Tensor:
        """(G, n) float64 on the CPU."""
        label_logp_n = logp_nV.gather(1, labels_n[:, None])[:, 0]
        scaled_nV = self._workspace.matrix("pooled", logp_nV.shape, logp_nV)
        # Below exp(-87), exp is slow. log P is at least -log V at the top token.
        has_tiny = bool(logp_nV.amin() / min(self._temperatures) < NEGLIGIBLE)
        columns = []
        for temperature in self._temperatures:
            if temperature == 1.0:
                columns.append(-label_logp_n)
                continue
            torch.mul(logp_nV, 1.0 / temperature, out=scaled_nV)
            if has_tiny:
                scaled_nV.clamp_(min=NEGLIGIBLE)
            columns.append(scaled_nV.exp_().sum(-1).log() - label_logp_n / temperature)
        return torch.stack(columns).double().cpu()


def _select_rows(
    answers: Sequence[Answer], rows: Rows, is_kept_n: Tensor
) -> tuple[list[Answer], Rows]:
    if is_kept_n.all():
        return list(answers), rows
    kept_n = is_kept_n.nonzero()[:, 0]
    picked = [replace(answer, distribution=answer.distribution.take(kept_n)) for answer in answers]
    return picked, rows.part(kept_n.to(rows.labels.device))


def _sizes(answers: Sequence[Answer], num_bytes: int) -> tuple[int, int]:
    """V, and the rows of each buffer of logits."""
    vocab_size = vocab_size_of(answers[0].distribution)
    return vocab_size, buffer_rows(vocab_size, num_bytes // (len(answers) + MAX_BUFFERS))


def _disagreement(
    answers: Sequence[Answer], block: slice, step: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield sums over every `step`-th row: (K, K) JSD and different top-1 tokens, and the count."""
    first = block.start + -block.start % step
    if first >= block.stop:
        return
    logits = [answer.distribution.logits(slice(first, block.stop, step)) for answer in answers]
    for strip in strips(RawRows(logits[0])):
        logits_KnV = torch.stack([x[strip].to(logits[0].device) for x in logits])
        top1_Kn = torch.stack([top_tokens(logits_nV) for logits_nV in logits_KnV])
        differs_KK = (top1_Kn[:, None] != top1_Kn[None]).sum(-1)
        jsd_KK = pairwise_jsd(logits_KnV.log_softmax(-1)).sum(-1)
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
