"""Streaming over teachers: read one teacher's rows at a time, and pool them in one accumulator.

Shapes: N rows, n rows of one block, m rows that one teacher answers, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from collegium.distributions import Answer, Distribution, NamedRows, WrappedRows
from collegium.errors import DataError
from collegium.fusion.weighting import RowStats
from collegium.kernels.plain import TorchKernels
from collegium.kernels.rows import (
    DenseTarget,
    LogSumExp,
    RawRows,
    RowKernels,
    RunningMean,
    Workspace,
    floor_,
    to_logits,
)
from collegium.options import Tensor, torch
from collegium.types import Rows

PoolKind = Literal["linear", "log_linear", "power_mean"]
MIN_SCORE = -1e300
"""Finite stand-in for a log-weight of -inf. Avoids NaN in later differences."""


class RowReader:
    """Statistics and log-probabilities of one teacher, in two (n, V) buffers that are reused."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def read(
        self, logits_nV: Tensor, labels_n: Tensor, *, temperature: float = 1.0
    ) -> tuple[RowStats, Tensor]:
        """Calibrate n rows: (n,) statistics, and (n, V) finite log-probabilities.

        The second is valid until the next call.
        """
        buffer, shape = self._workspace.matrix, logits_nV.shape
        logp_nV, prob_nV = buffer("logp", shape, logits_nV), buffer("prob", shape, logits_nV)
        if temperature != 1.0:
            logits_nV = torch.div(logits_nV, temperature, out=prob_nV)
        torch.log_softmax(logits_nV, -1, out=logp_nV)
        floor_(logp_nV)
        torch.exp(logp_nV, out=prob_nV)
        label_logp_n = logp_nV.gather(1, labels_n[:, None])[:, 0]
        max_logp_n, top_n = logp_nV.max(-1)
        # The log-probability of a nearly certain token is a rounding of 0: the others determine it.
        prob_nV.scatter_(1, top_n[:, None], 0.0)
        rest_n = prob_nV.sum(-1)
        top_logp_n = torch.where(rest_n < 0.5, torch.log1p(-rest_n), max_logp_n)
        entropy_n = -prob_nV.mul_(logp_nV).sum(-1) - top_logp_n.exp() * top_logp_n
        return RowStats(entropy_n, label_logp_n, max_logp_n), logp_nV


@dataclass(frozen=True, slots=True)
class Member:
    """One teacher's distribution at n rows; valid until the next member is read."""

    rows: RawRows
    logsumexp: LogSumExp
    stats: RowStats
    """(n,) each."""
    is_scratch: bool
    """Whether the values may be overwritten."""
    is_normalized: bool = True
    """False for draws at another temperature, which are unbiased only as they are."""


class TeacherReader:
    """Reads the answers of a batch at their temperatures, one block and one teacher at a time."""

    def __init__(
        self,
        answers: Sequence[Answer],
        rows: Rows,
        temperatures: Mapping[str, float],
        *,
        kernels: RowKernels | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self._rows = rows
        self.kernels = kernels or TorchKernels()
        self._workspace = workspace or Workspace()
        self._temperatures = [temperatures.get(answer.name, 1.0) for answer in answers]
        self._answered_KN, self._shared_N = coverage(answers, rows)
        self._distributions: list[Distribution] = []
        for answer, temperature in zip(answers, self._temperatures, strict=True):
            distribution = answer.distribution
            if isinstance(distribution, NamedRows):
                distribution = distribution.tempered(temperature)
            if answer.rows is not None:
                distribution = _Expanded(distribution, answer.rows.cpu(), len(rows))
            self._distributions.append(distribution)

    def raw(self, number: int, block: slice, *, buffer: str = "logits") -> tuple[RawRows, bool]:
        """One teacher's raw values at its temperature, and whether they may be overwritten."""
        distribution = self._distributions[number]
        raw, is_scratch = distribution.raw(block, self._workspace, buffer)
        # The logits of named rows are log-probabilities at their temperature already.
        if distribution.is_full:
            raw = raw.tempered(self._temperatures[number])
        return raw, is_scratch

    def member(self, number: int, block: slice, *, buffer: str = "logits") -> Member:
        """Apply one teacher's head to n rows, into a workspace buffer, and read its statistics."""
        distribution, temperature = self._distributions[number], self._temperatures[number]
        raw, is_scratch = self.raw(number, block, buffer=buffer)
        labels_n = self._rows.labels[block]
        scalars = distribution.scalars(block, temperature)
        # The logits of named rows are log-probabilities already.
        zero_n = torch.zeros_like(raw.values_nV[:, 0], dtype=raw.dtype)
        logsumexp = LogSumExp(zero_n, zero_n)
        if scalars is None:
            computed, entropy_n = self.kernels.read(raw)
            if distribution.is_full:
                logsumexp = computed
            label_logp_n = computed.logp(raw.at_labels(labels_n)[0])
            scalars = entropy_n, label_logp_n, -computed.log_sum_n
        answered_KN, shared_N = self._answered_KN, self._shared_N
        answered_n = None if answered_KN is None else answered_KN[number, block]
        shared_n = None if shared_N is None else shared_N[block]
        stats = RowStats(*scalars, answered_KN=answered_n, shared_N=shared_n)
        is_normalized = not (distribution.is_sampled and temperature != 1.0)
        return Member(raw, logsumexp, stats, is_scratch, is_normalized)

    def stats(self, block: slice, *, consensus: bool = False) -> RowStats:
        """(K, n) statistics: one application of each head, two with the `consensus`.

        KL(P_k || Pbar) = -H_k - sum_v P_k log Pbar. Pbar is the mean of those that answer a row.
        """
        numbers = range(len(self._distributions))
        if not consensus:
            return RowStats.stack([self.member(number, block).stats for number in numbers])
        # The pool of a single teacher would be in the buffer that its values are read into again.
        workspace = self._workspace if len(self._distributions) > 1 else None
        pool = Pool("linear", len(self._distributions), self.kernels, workspace=workspace)
        members, entropies = [], []
        for number in numbers:
            member = self.member(number, block)
            score_n = torch.zeros_like(member.stats.entropy_KN, dtype=torch.float64)
            pool.add(member, masked_scores(score_n, member.stats).clamp(min=MIN_SCORE))
            members.append(member)
            entropies.append(self.entropy(number, member))
        stats = RowStats.stack([member.stats for member in members])
        mean_logp_nV = pool.result()[0].logp_()
        cross = []
        for number, member in enumerate(members):
            rows, _ = self.raw(number, block)
            prob_nV = self._workspace.matrix("cross", mean_logp_nV.shape, mean_logp_nV)
            prob_nV = to_logits(rows, prob_nV).sub_(member.logsumexp.max_n[:, None])
            prob_nV.sub_(member.logsumexp.log_sum_n[:, None]).exp_()
            cross.append(-prob_nV.mul_(mean_logp_nV).sum(-1))
        kl_Kn = (torch.stack(cross) - torch.stack(entropies)).clamp(min=0.0)
        return replace(stats, consensus_kl_KN=kl_Kn)

    def entropy(self, number: int, member: Member) -> Tensor:
        """(n,) entropy of a member as it is pooled.

        Stored statistics describe the whole distribution, which named tokens and a tail coarsen.
        """
        if self._distributions[number].is_full:
            return member.stats.entropy_KN
        return self.kernels.read(member.rows)[1]


def coverage(answers: Sequence[Answer], rows: Rows) -> tuple[Tensor | None, Tensor | None]:
    """The masks `answered_KN` and `shared_N` of `RowStats`. None where all answer every row.

    A teacher without an answer in a document has no share in its weights.
    """
    if all(answer.rows is None for answer in answers):
        return None, None
    _, place_N = torch.unique_consecutive(rows.documents, return_inverse=True)
    answered_KN = place_N.new_zeros(len(answers), len(rows), dtype=torch.bool)
    for answered_N, answer in zip(answered_KN, answers, strict=True):
        answered_N[... if answer.rows is None else answer.rows.to(place_N.device)] = True
    num_answers_KD = torch.zeros_like(answered_KN, dtype=torch.int64)
    num_answers_KD.index_add_(1, place_N, answered_KN.long())
    return answered_KN, (answered_KN | (num_answers_KD == 0)[:, place_N]).all(0)


def check_coverage(answers: Sequence[Answer], rows: Rows) -> None:
    """Refuse rows that no teacher answers.

    Raises:
        DataError: some rows have no answer.
    """
    answered_KN, _ = coverage(answers, rows)
    if answered_KN is not None and (num_missing := int((~answered_KN.any(0)).sum())):
        raise DataError(
            f"teachers: got no answer at {num_missing} of {len(rows)} rows; must be at "
            "least one teacher per row; add a teacher for them, or remove those rows"
        )


def masked_scores(score_KN: Tensor, stats: RowStats) -> Tensor:
    """(K, N) or (N,) log-weights with -inf where the teacher does not answer.

    Of (K, N), a row whose answers all have weight 0 gets equal weights for them.
    """
    if stats.answered_KN is None:
        return score_KN
    score_KN = score_KN.masked_fill(~stats.answered_KN, -torch.inf)
    if score_KN.dim() == 1:
        return score_KN
    is_empty_N = (score_KN == -torch.inf).all(0)
    return torch.where(stats.answered_KN & is_empty_N, 0.0, score_KN)


@dataclass(frozen=True)
class _Expanded(WrappedRows):
    """An answer for m of N rows; the other rows hold zeros, which a weight of 0 leaves out."""

    rows_m: Tensor
    num_rows: int

    @property
    def logit_bytes(self) -> int | None:
        return self.inner.logit_bytes

    def __len__(self) -> int:
        return self.num_rows

    def raw(self, block: slice, workspace: Workspace, buffer: str) -> tuple[RawRows, bool]:
        part, at_m = rows_inside(self.rows_m, block)
        if part.start == part.stop:
            # One row gives the vocabulary size and dtype; a teacher without a row has no answer.
            part = slice(0, 1)
        raw, _ = self.inner.raw(part, workspace, f"{buffer} of some rows")
        values_nV = _expand(raw.values_nV[: len(at_m)], at_m, block)
        return replace(raw, values_nV=values_nV), True

    def logits(self, block: slice) -> Tensor:
        part, at_m = rows_inside(self.rows_m, block)
        return _expand(self.inner.logits(part), at_m, block)

    def scalars(self, block: slice, temperature: float) -> tuple[Tensor, Tensor, Tensor] | None:
        part, at_m = rows_inside(self.rows_m, block)
        if (scalars := self.inner.scalars(part, temperature)) is None:
            return None
        entropy_n, label_logp_n, max_logp_n = (_expand(x_m, at_m, block) for x_m in scalars)
        return entropy_n, label_logp_n, max_logp_n


def rows_inside(rows_m: Tensor, block: slice) -> tuple[slice, Tensor]:
    """The range of ascending rows on the CPU that lies in a block, and their indices in it."""
    part = slice(*torch.searchsorted(rows_m, torch.tensor([block.start, block.stop])).tolist())
    return part, rows_m[part] - block.start


def _expand(values: Tensor, at_m: Tensor, block: slice) -> Tensor:
    """(m, ...) -> (n, ...) with zeros at the other rows of the block."""
    expanded = values.new_zeros(block.stop - block.start, *values.shape[1:])
    expanded[at_m.to(values.device)] = values
    return expanded


@dataclass(eq=False)
class Pool:
    """A weighted mean of distributions whose members arrive one by one, in one (n, V) accumulator.

    linear: M = sum_k w_k P_k, or log M `in_logs`. log_linear: M = sum_k w_k log P_k.
    power_mean: M = log sum_k w_k P_k^r, in log space. After k members with log-weights s_1 ... s_k
    the weights are softmax_j(s). The next member enters with weight
    exp(s_k - logsumexp(s_1 ... s_k)), so no scale of the scores overflows or underflows.
    """

    kind: PoolKind
    num_members: int
    kernels: RowKernels
    exponent: float = 0.5
    workspace: Workspace | None = None
    """Its buffer `pool` is the accumulator, else new memory."""
    in_logs: bool = False
    """Pool log-probabilities linearly: slower, and exact below e^-87, where float32 has no P."""
    _num_added: int = field(default=0, init=False)
    _is_normalized: bool = field(default=True, init=False)
    _mean: RunningMean | None = field(default=None, init=False)
    _total_n: Tensor | None = field(default=None, init=False)
    _only: Member | None = field(default=None, init=False)

    def add(self, member: Member, score_n: Tensor) -> None:
        """Add one member. Its values are copied, except those of a single scratch member."""
        self._num_added += 1
        self._is_normalized &= member.is_normalized
        if self.num_members == 1:
            # A single member is the pool: exp and log on the way would round.
            self._only = member
            return
        share_n = None
        if self._mean is None or self._total_n is None:
            is_log = self.kind != "linear" or self.in_logs
            self._mean = RunningMean(self._buffer(member.rows), is_log=is_log)
            self._total_n = score_n
        else:
            before_n = self._total_n
            self._total_n = torch.logaddexp(before_n, score_n)
            share_n = score_n - self._total_n
            if self.kind == "power_mean" or (self.kind == "linear" and self.in_logs):
                return self._add_power(member, share_n, before_n - self._total_n)
            share_n = share_n.exp()
        mean, dtype = self._mean, self._mean.values_nV.dtype  # of the first member
        mean.num_remaining = self.num_members - self._num_added
        share_n = None if share_n is None else share_n.to(dtype)
        self.kernels.add_(mean, member.rows, member.logsumexp.to(dtype), share_n)
        if self.kind == "power_mean":
            mean.values_nV.mul_(self.exponent)

    def _add_power(self, member: Member, log_share_n: Tensor, log_kept_n: Tensor) -> None:
        assert self._mean is not None
        mean_nV = self._mean.values_nV
        entering_nV, dtype = torch.empty_like(mean_nV), mean_nV.dtype
        entering = RunningMean(entering_nV, is_log=True)
        self.kernels.add_(entering, member.rows, member.logsumexp.to(dtype), None)
        if self.kind == "power_mean":
            entering_nV.mul_(self.exponent)
        entering_nV.add_(log_share_n[:, None].to(dtype))
        mean_nV.add_(log_kept_n[:, None].to(dtype))
        torch.logaddexp(mean_nV, entering_nV, out=mean_nV)

    def result(self) -> tuple[DenseTarget, Tensor | None]:
        """The pool, and (n,) log Z, the mass that all members have in common.

        log Z is None for the linear pool, and divided by 1 - r for the power mean.
        """
        is_normalized = self._is_normalized
        if self._only is not None:
            only, rows = self._only, self._only.rows
            if not only.is_scratch or self.workspace is None:
                # The values belong to the teacher, or the next member overwrites them.
                values_nV = to_logits(rows, torch.empty_like(rows.values_nV, dtype=rows.dtype))
                rows = RawRows(values_nV)
            target = DenseTarget(rows, "logits", only.logsumexp, is_normalized=is_normalized)
            log_z_n = None if self.kind == "linear" else torch.zeros_like(only.logsumexp.max_n)
            return target, log_z_n
        assert self._mean is not None
        mean_nV = self._mean.values_nV  # the last member has multiplied the unit out
        rows = RawRows(mean_nV)
        if self.kind == "linear":
            kind = "logp" if self.in_logs else "prob"
            return DenseTarget(rows, kind, is_normalized=is_normalized), None
        if self.kind == "power_mean":
            mean_nV.div_(self.exponent)
        logsumexp, _ = self.kernels.read(rows)
        scale = 1.0 - self.exponent if self.kind == "power_mean" else 1.0
        return DenseTarget(rows, "logits", logsumexp), logsumexp.total() / scale

    def _buffer(self, rows: RawRows) -> Tensor:
        values_nV, dtype = rows.values_nV, rows.dtype
        if self.workspace is None:
            return torch.empty_like(values_nV, dtype=dtype)
        like = values_nV.new_empty(0, dtype=dtype)
        return self.workspace.matrix("pool", values_nV.shape, like)
