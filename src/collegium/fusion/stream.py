"""What streams over the teachers: reading one teacher's rows, and a pool that meets its members one by one.

Shapes: n rows of one block, V vocabulary, K teachers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from collegium.fusion.weights import RowStats
from collegium.kernels.plain import TorchKernels
from collegium.kernels.rows import (
    DenseTarget,
    LogSumExp,
    RawRows,
    RowKernels,
    Workspace,
    floor_,
    head_product,
    to_logits,
)
from collegium.types import HiddenRows, Rows, TeacherRows

PoolKind = Literal["linear", "log_linear", "power_mean"]


class RowReader:
    """Reads one teacher's statistics and distribution in two (n, V) buffers that the next reading overwrites.

    Fresh memory of this size costs more than the arithmetic: every page of it is faulted in and cleared.
    """

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None

    def read(
        self,
        logits_nV: Tensor,
        labels_n: Tensor,
        *,
        temperature: float = 1.0,
        keep: Literal["prob", "logp"] = "logp",
    ) -> tuple[RowStats, Tensor]:
        """Calibrate n rows: (n,) statistics, and (n, V) log-probabilities or probabilities.

        The second is valid until the next reading. Log-probabilities are finite everywhere.
        """
        logp_nV, prob_nV = self._buffers_like(logits_nV)
        if temperature != 1.0:
            logits_nV = torch.div(logits_nV, temperature, out=prob_nV)
        torch.log_softmax(logits_nV, -1, out=logp_nV)
        floor_(logp_nV)
        torch.exp(logp_nV, out=prob_nV)
        label_logp_n = logp_nV.gather(1, labels_n[:, None])[:, 0]
        max_logp_n = logp_nV.amax(-1)
        kept_nV, product_nV = (prob_nV, logp_nV) if keep == "prob" else (logp_nV, prob_nV)
        entropy_n = -torch.mul(prob_nV, logp_nV, out=product_nV).sum(-1)
        return RowStats(entropy_n, label_logp_n, max_logp_n), kept_nV

    def _buffers_like(self, logits_nV: Tensor) -> tuple[Tensor, Tensor]:
        num_rows = logits_nV.shape[0]
        old = self._buffers
        if old is None or old[0].shape[0] < num_rows or old[0].dtype != logits_nV.dtype:
            old = self._buffers = (torch.empty_like(logits_nV), torch.empty_like(logits_nV))
        return old[0][:num_rows], old[1][:num_rows]


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One teacher's distribution at n rows, as its head gave it; valid until the next member is read."""

    rows: RawRows
    log_sum: LogSumExp
    stats: RowStats
    """(n,) each."""
    is_ours: bool
    """Whether the values may be overwritten."""


class TeacherReader:
    """Reads all teachers of a batch at their temperatures, one block and one teacher at a time."""

    def __init__(
        self,
        teachers: Sequence[TeacherRows],
        rows: Rows,
        temperatures: Mapping[str, float],
        *,
        kernels: RowKernels | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self._teachers = teachers
        self._rows = rows
        self._temperatures = temperatures
        self._reader = RowReader()
        self._kernels = kernels or TorchKernels()
        self._workspace = workspace or Workspace()

    def member(self, number: int, block: slice, *, buffer: str = "logits") -> Member:
        """Apply one teacher's head to n rows, into a buffer of the workspace, and read its statistics."""
        teacher = self._teachers[number]
        raw, is_ours = self._raw(teacher, block, buffer)
        raw = raw.tempered(self._temperatures.get(teacher.name, 1.0))
        reading = self._kernels.read(raw, self._rows.labels[block])
        stats = RowStats(reading.entropy_n, reading.label_logp_n, reading.max_logp_n)
        return Member(raw, reading.logsumexp, stats, is_ours)

    def _raw(self, teacher: TeacherRows, block: slice, buffer: str) -> tuple[RawRows, bool]:
        scores = teacher.scores
        if not isinstance(scores, HiddenRows):
            return RawRows(scores.logits(block)), False
        hidden_nD, weight_VD = scores.hidden[block], scores.head.weight
        shape = (hidden_nD.shape[0], weight_VD.shape[0])
        out_nV = self._workspace.matrix(buffer, shape, weight_VD)
        return head_product(hidden_nD, scores.head, out_nV), True

    def read(
        self, number: int, block: slice, *, keep: Literal["prob", "logp"]
    ) -> tuple[RowStats, Tensor]:
        """(n,) statistics and (n, V) distribution of one teacher, the latter valid until the next reading."""
        teacher = self._teachers[number]
        return self._reader.read(
            teacher.scores.logits(block),
            self._rows.labels[block],
            temperature=self._temperatures.get(teacher.name, 1.0),
            keep=keep,
        )

    def stats(self, block: slice, *, consensus: bool = False) -> RowStats:
        """(K, n) statistics of all teachers: one application of each head, two with the `consensus`.

        KL(P_k || Pbar) = -H_k - sum_v P_k log Pbar, with Pbar = 1/K sum_k P_k, which must be known first.
        """
        numbers = range(len(self._teachers))
        if not consensus:
            return RowStats.stack([self.member(k, block).stats for k in numbers])
        pool = Pool("linear", len(self._teachers), kernels=self._kernels)
        members = []
        for number in numbers:
            member = self.member(number, block)
            entropy_n = member.stats.entropy_KN
            pool.add(member, torch.zeros_like(entropy_n, dtype=torch.float64))
            members.append(member.stats)
        stats = RowStats.stack(members)
        mean_logp_nV = pool.result()[0].logp_()
        cross = []
        for number in numbers:
            prob_nV = self.read(number, block, keep="prob")[1]
            cross.append(-prob_nV.mul_(mean_logp_nV).sum(-1))
        kl_Kn = (torch.stack(cross) - stats.entropy_KN).clamp(min=0.0)
        return dataclasses.replace(stats, consensus_kl_KN=kl_Kn)


class Pool:
    """A weighted mean of distributions that meets its members one by one, in one (n, V) accumulator.

    linear: M = sum_k w_k P_k. log_linear: M = sum_k w_k log P_k. power_mean: M = log sum_k w_k P_k^r, all in log space. After k members
    with log-weights s_1 ... s_k the weights are softmax_j(s); the next one enters with the weight
    exp(s_k - logsumexp(s_1 ... s_k)), so nothing over- or underflows whatever the scale of the scores.
    """

    def __init__(
        self,
        kind: PoolKind,
        num_teachers: int,
        *,
        exponent: float = 0.5,
        kernels: RowKernels | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        """Expect `num_teachers` members; the accumulator is the buffer `pool` of the workspace, without one new memory."""
        self._kind = kind
        # A single member is its own pool: no way through exp and log, which would round.
        self._is_single = num_teachers == 1
        self._num_missing = num_teachers
        self._exponent = exponent
        self._kernels = kernels or TorchKernels()
        self._workspace = workspace
        self._mean_nV: Tensor | None = None
        self._unit_n: Tensor | None = None
        self._total_n: Tensor | None = None
        self._only: Member | None = None

    def add(self, member: Member, score_n: Tensor) -> None:
        """Take in one member; its values are copied, except those of a single member that is ours."""
        self._num_missing -= 1
        if self._is_single:
            self._only = member
            return
        if self._mean_nV is None or self._total_n is None:
            self._mean_nV, self._total_n = self._buffer(member), score_n
            share_n = None
        else:
            before_n = self._total_n
            self._total_n = torch.logaddexp(before_n, score_n)
            share_n = score_n - self._total_n
            if self._kind == "power_mean":
                return self._add_power(member, share_n, before_n - self._total_n)
            share_n = share_n.exp()
        mean_nV = self._mean_nV
        dtype = mean_nV.dtype  # of the first member, when a later one is wider or narrower
        self._unit_n = self._kernels.add_(
            mean_nV,
            member.rows,
            member.log_sum.to(dtype),
            None if share_n is None else share_n.to(dtype),
            is_log=self._kind != "linear",
            unit_n=self._unit_n,
            is_last=self._num_missing == 0,
        )
        if self._kind == "power_mean":
            mean_nV.mul_(self._exponent)

    def _add_power(self, member: Member, log_share_n: Tensor, log_kept_n: Tensor) -> None:
        mean_nV = self._mean_nV
        assert mean_nV is not None
        entering_nV, dtype = torch.empty_like(mean_nV), mean_nV.dtype
        self._kernels.add_(entering_nV, member.rows, member.log_sum.to(dtype), None, is_log=True)
        entering_nV.mul_(self._exponent).add_(log_share_n[:, None].to(dtype))
        mean_nV.add_(log_kept_n[:, None].to(dtype))
        torch.logaddexp(mean_nV, entering_nV, out=mean_nV)

    def result(self) -> tuple[DenseTarget, Tensor | None]:
        """The pool, and (n,) log Z: how much of it was common to all members.

        log Z is None for the linear pool, which has none; for the power mean it is divided by 1 - r.
        """
        if self._only is not None:
            target = self._single(self._only)
            zero_n = torch.zeros_like(self._only.log_sum.max_n)
            return target, None if self._kind == "linear" else zero_n
        assert self._mean_nV is not None
        mean_nV = self._mean_nV
        if self._unit_n is not None:
            mean_nV.mul_(self._unit_n[:, None])
            self._unit_n = None
        if self._kind == "linear":
            return DenseTarget(RawRows(mean_nV), "prob"), None
        if self._kind == "power_mean":
            mean_nV.div_(self._exponent)
        log_sum = log_sum_of(self._kernels, mean_nV)
        scale = 1.0 - self._exponent if self._kind == "power_mean" else 1.0
        return DenseTarget(RawRows(mean_nV), "logits", log_sum), log_sum.total() / scale

    def _single(self, member: Member) -> DenseTarget:
        rows = member.rows
        if not member.is_ours or self._workspace is None:
            # The values belong to the teacher, or the next reading overwrites them.
            values_nV = to_logits(rows, torch.empty_like(rows.values_nV, dtype=rows.dtype))
            rows = RawRows(values_nV)
        return DenseTarget(rows, "logits", member.log_sum)

    def _buffer(self, member: Member) -> Tensor:
        values_nV, dtype = member.rows.values_nV, member.rows.dtype
        if self._workspace is None:
            return torch.empty_like(values_nV, dtype=dtype)
        shape = (values_nV.shape[0], values_nV.shape[1])
        return self._workspace.matrix("pool", shape, values_nV.new_empty(0, dtype=dtype))


def log_sum_of(kernels: RowKernels, logits_nV: Tensor) -> LogSumExp:
    """log sum_v exp z, without memory of the size of the rows."""
    labels_n = torch.zeros(logits_nV.shape[0], dtype=torch.int64, device=logits_nV.device)
    return kernels.read(RawRows(logits_nV), labels_n).logsumexp
