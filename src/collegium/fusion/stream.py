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
from collegium.types import Rows, TeacherRows

PoolKind = Literal["linear", "log_linear", "power_mean"]
FLOOR_SHARE = 1e-8
"""Log-probabilities of -inf become this share of the dtype's lowest value."""


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


class TeacherReader:
    """Reads all teachers of a batch at their temperatures, one block and one teacher at a time."""

    def __init__(
        self, teachers: Sequence[TeacherRows], rows: Rows, temperatures: Mapping[str, float]
    ) -> None:
        self._teachers = teachers
        self._rows = rows
        self._temperatures = temperatures
        self._reader = RowReader()

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
            return RowStats.stack([self.read(k, block, keep="logp")[0] for k in numbers])
        pool = Pool("linear", len(self._teachers))
        members = []
        for number in numbers:
            stats, member_nV = self.read(number, block, keep=pool.space)
            pool.add(member_nV, torch.zeros_like(stats.entropy_KN, dtype=torch.float64))
            members.append(stats)
        stats = RowStats.stack(members)
        mean_logp_nV, _ = pool.result()
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

    def __init__(self, kind: PoolKind, num_teachers: int, *, exponent: float = 0.5) -> None:
        # A single member is its own pool: no way through exp and log, which would round.
        self.space: Literal["prob", "logp"] = (
            "prob" if kind == "linear" and num_teachers > 1 else "logp"
        )
        self._kind = kind
        self._num_teachers = num_teachers
        self._exponent = exponent
        self._is_power = kind == "power_mean" and num_teachers > 1
        self._mean_nV: Tensor | None = None
        self._total_n: Tensor | None = None

    def add(self, member_nV: Tensor, score_n: Tensor) -> None:
        """Take in one member, given in the pool's `space`; it is copied, not kept, and may be overwritten."""
        if self._is_power:
            member_nV = member_nV.mul_(self._exponent)
        if self._mean_nV is None or self._total_n is None:
            self._mean_nV, self._total_n = member_nV.clone(), score_n
            return
        before_n = self._total_n
        self._total_n = torch.logaddexp(before_n, score_n)
        dtype = self._mean_nV.dtype  # of the first member, when a later one is wider or narrower
        log_share_n1 = (score_n - self._total_n)[:, None]
        if self._is_power:
            kept_n1 = (before_n - self._total_n)[:, None]
            self._mean_nV.add_(kept_n1.to(dtype))
            entering_nV = member_nV.to(dtype).add_(log_share_n1.to(dtype))
            torch.logaddexp(self._mean_nV, entering_nV, out=self._mean_nV)
            return
        self._mean_nV.lerp_(member_nV.to(dtype), log_share_n1.exp().to(dtype))

    def result(self) -> tuple[Tensor, Tensor | None]:
        """(n, V) log-probabilities of the pool, and (n,) log Z: how much of it was common to all members.

        log Z is None for the linear pool, which has none; for the power mean it is divided by 1 - r.
        """
        assert self._mean_nV is not None
        mean_nV = self._mean_nV
        if self.space == "prob":
            return mean_nV.clamp_(min=torch.finfo(mean_nV.dtype).tiny).log_(), None
        if self._kind == "linear":
            return mean_nV, None
        if self._num_teachers == 1:
            return mean_nV, mean_nV.new_zeros(mean_nV.shape[0])
        if self._is_power:
            mean_nV.div_(self._exponent)
        log_normalizer_n = torch.logsumexp(mean_nV, dim=-1)
        mean_nV.sub_(log_normalizer_n[:, None])
        return mean_nV, log_normalizer_n / (1.0 - self._exponent if self._is_power else 1.0)


def floor_(logp_nV: Tensor) -> Tensor:
    """Make -inf finite in place: a token that a model rules out must not turn 0 * log 0 into NaN.

    The floor leaves room to be divided by a temperature.
    """
    return logp_nV.clamp_(min=FLOOR_SHARE * torch.finfo(logp_nV.dtype).min)
