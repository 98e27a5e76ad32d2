"""One target distribution per row out of K teachers, streamed: memory does not grow with K.

Shapes: N rows of a batch, n rows of one block, V vocabulary, K teachers.
Order: logits / T_k -> log-softmax -> statistics -> weights -> pool -> conflict policy -> pooled temperature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Annotated

import torch
from pydantic import Field, InstanceOf, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.fusion.conflict import (
    Conflict,
    ConflictBlock,
    NoConflictPolicy,
    disagreement,
)
from collegium.fusion.routing import Route, RoutedReader
from collegium.fusion.stream import Member, Pool, PoolKind, TeacherReader
from collegium.fusion.weights import (
    Carry,
    PrefixLikelihood,
    RowStats,
    Weighting,
    check_names,
)
from collegium.kernels.rows import DenseTarget, RowKernels, Workspace
from collegium.types import STRICT, HiddenRows, Rows, TeacherRows

MIN_SCORE = -1e300
"""Stands for a log-weight of -inf where a rule may still change its mind, so that differences stay defined."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Fusion:
    """How several teachers become one target."""

    weighting: InstanceOf[Weighting] = field(default_factory=PrefixLikelihood)
    """Which teacher to trust on which row."""
    pool: PoolKind = "linear"
    """linear: sum_k w_k P_k, covers what any teacher believes. log_linear: prod_k P_k^w_k / Z, what all can agree on.
    power_mean: (sum_k w_k P_k^r)^(1/r) / Z, between the two."""
    exponent: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """r of power_mean, and of that pool only: near 1 it is the linear pool, near 0 the log-linear one."""
    temperatures: dict[str, Annotated[float, Field(gt=0)]] = field(default_factory=dict)
    """T_k by teacher name, applied to its logits before everything else; 1 where missing."""
    pooled_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the pooled distribution: p^(1/T), renormalized."""
    conflict: InstanceOf[Conflict] = field(default_factory=NoConflictPolicy)
    """What to do at rows where the teachers contradict each other."""

    @model_validator(mode="after")
    def _exponent_has_effect(self) -> Fusion:
        if self.pool != "power_mean" and self.exponent != 0.5:
            raise ValueError(
                f"exponent: got {self.exponent:g} with pool `{self.pool}`; must be left out unless the pool is "
                "`power_mean`; leave it out"
            )
        return self

    @property
    def uses_label(self) -> bool:
        """Whether the label of a row enters its own target; such a fusion cannot be judged by the NLL of its target."""
        return self.weighting.uses_label or self.conflict.uses_label

    def check(self, teachers: Sequence[str]) -> None:
        """Hold every teacher name in the options against the teachers of the run.

        Raises:
            RecipeError: a name belongs to no teacher, or a teacher lacks a weight.
        """
        self.weighting.check(teachers)
        check_names("fusion.temperatures", self.temperatures, teachers)


@plain_dataclass(frozen=True, slots=True)
class FusedBlock:
    """The target at n rows, and what the teachers said there (after their temperatures)."""

    logp_nV: Tensor
    """(n, V) log-probabilities of the target."""
    weights_Kn: Tensor
    """(K, n) weights, each column sums to 1."""
    entropy_Kn: Tensor
    """(K, n) nats; like the next two NaN where a teacher was not read, because the row is routed to another."""
    label_logp_Kn: Tensor
    """(K, n) log-probability of the row's label."""
    max_logp_Kn: Tensor
    """(K, n) log-probability of the most likely token."""
    log_normalizer_n: Tensor | None
    """(n,) log Z of the log-linear pool, log Z / (1 - r) of the power mean, None for the linear pool."""
    pooled_temperature: float
    """What turned the pool into `logp_nV`."""
    conflict: ConflictBlock | None = None
    """What the conflict policy saw and did; None without one."""

    def disagreement_n(self) -> Tensor:
        """How far the teachers are apart at each row: (n,) nats, 0 where all agree.

        Linear pool P: JSD_w = H(P) - sum_k w_k H_k. Log-linear pool: -log Z = sum_k w_k KL(P || P_k). Power mean:
        -log Z / (1 - r), which is near JSD_w for r near 1 and near the other for r near 0. All are taken before the pooled
        temperature, with the weights of this block; for a corrected target the linear pool's has no meaning.
        """
        if self.log_normalizer_n is not None:
            return -self.log_normalizer_n
        logp_nV = self.logp_nV
        if self.pooled_temperature != 1.0:
            logp_nV = torch.log_softmax(logp_nV * self.pooled_temperature, dim=-1)
        has_weight_Kn = self.weights_Kn > 0  # the entropy of others may be unknown
        weighted_Kn = self.weights_Kn * self.entropy_Kn
        within_n = torch.where(has_weight_Kn, weighted_Kn, 0.0).sum(0)
        entropy_n = -logp_nV.exp().mul_(logp_nV).sum(-1)
        jsd_n = (entropy_n - within_n).clamp(min=0.0)
        # The two entropies of a single voice are summed differently, and differ by a rounding.
        return torch.where((self.weights_Kn == 1.0).any(0), 0.0, jsd_n)


@plain_dataclass(frozen=True, slots=True)
class FusedRows:
    """The target at n rows in the form in which it was pooled."""

    target: DenseTarget
    """Overwritten by the next block where a workspace was given."""
    weights_Kn: Tensor
    """(K, n) weights, each column sums to 1."""
    stats: RowStats
    """(K, n) each, of the teachers."""
    log_normalizer_n: Tensor | None
    """As in `FusedBlock`."""
    conflict: ConflictBlock | None


class FusedTarget:
    """The target distribution of the rows of one batch, block by block, without gradient.

    Whatever K is, two (n, V) tensors are alive at most: the pool and the current teacher's logits; one or two more for the power mean,
    for rules that compare teachers with their mean and under a conflict policy, which compares the teachers by their linear pool. A
    policy that changes weights pools its blocks twice.

    Under `route` a row is read from its own teacher alone, and nothing is pooled.

    Raises:
        RecipeError: the fusion names a teacher that is not there.
        DataError: a row names one that is not there.
        ValueError: a teacher was asked about some of the rows only, and the fusion needs all.
    """

    def __init__(
        self,
        fusion: Fusion,
        teachers: Sequence[TeacherRows],
        rows: Rows,
        *,
        kernels: RowKernels | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        """Fuse `teachers` at `rows`; with a `workspace`, every block of `rows_of` is made in its buffers."""
        self._fusion = fusion
        self._teachers = teachers
        self._names = [teacher.name for teacher in teachers]
        fusion.check(self._names)
        self._is_excluded = [fusion.weighting.excludes(name) for name in self._names]
        self._rows = rows
        self._next_row = 0
        self._carries: list[Carry | None] = [None] * len(teachers)
        self._swept_KN: Tensor | None = None
        self._kernels = kernels
        self._workspace = workspace
        self._reader = TeacherReader(
            teachers, rows, fusion.temperatures, kernels=kernels, workspace=workspace
        )
        self._routed: RoutedReader | None = None
        if isinstance(fusion.weighting, Route):
            self._routed = RoutedReader(fusion.weighting, teachers, rows, fusion.temperatures)
        elif any(teacher.answered is not None for teacher in teachers):
            raise ValueError(
                "FusedTarget: got answers for some rows; must be for all rows of the batch"
            )

    def bytes_per_logit(self, student_bytes: int, *, is_softened: bool = False) -> int:
        """What `rows_of` and the student's logits after it take per element of a block, all (n, V) tensors together.

        Args:
            student_bytes: of one logit of the student; they are made in the buffer of the teachers' logits.
            is_softened: the target becomes log-probabilities, for which half precision has no room.
        """
        sizes = [
            t.scores.head.weight.element_size() if isinstance(t.scores, HiddenRows) else None
            for t in self._teachers
        ]
        wide = max(4, *(size or 4 for size in sizes))
        logits = max(student_bytes, *(size or 0 for size in sizes))
        if not self._is_plain:
            return logits + 4 * wide
        pooled = [size for size, out in zip(sizes, self._is_excluded, strict=True) if not out]
        if len(pooled) > 1 or pooled[0] is None:
            return logits + wide
        # A single member stays as its head gave it.
        return logits + pooled[0] + (wide if is_softened and pooled[0] < wide else 0)

    @property
    def _is_plain(self) -> bool:
        """Whether the pool and the logits of one teacher are all that `rows_of` holds of the size of a block."""
        return (
            self._fusion.pool != "power_mean"
            and not self._fusion.conflict.is_active
            and not self._fusion.weighting.needs_consensus
            and self._fusion.pooled_temperature == 1.0
            and self._routed is None
        )

    @torch.no_grad()
    def block(self, block: slice) -> FusedBlock:
        """Fuse the rows of `block`; blocks must follow one another from row 0.

        Raises:
            ValueError: the block does not start where the one before ended.
        """
        fused = self.rows_of(block)
        return FusedBlock(
            logp_nV=fused.target.logp_(),
            weights_Kn=fused.weights_Kn,
            entropy_Kn=fused.stats.entropy_KN,
            label_logp_Kn=fused.stats.label_logp_KN,
            max_logp_Kn=fused.stats.max_logp_KN,
            log_normalizer_n=fused.log_normalizer_n,
            pooled_temperature=self._fusion.pooled_temperature,
            conflict=fused.conflict,
        )

    @torch.no_grad()
    def rows_of(self, block: slice) -> FusedRows:
        """As `block`, but the target stays as it was pooled: for those who need no logarithms of it.

        Raises:
            ValueError: the block does not start where the one before ended.
        """
        start, stop, step = block.indices(len(self._rows))
        if start != self._next_row or step != 1 or stop <= start:
            raise ValueError(
                f"FusedTarget.block: got {block}; must start at row {self._next_row} of {len(self._rows)}; "
                "ask for contiguous blocks in increasing order"
            )
        self._next_row = stop
        if not self._fusion.weighting.streams and self._swept_KN is None:
            self._swept_KN = self._sweep(stop - start)
        if self._routed is not None:
            return self._from_one_each(slice(start, stop), self._routed)
        return self._fused(slice(start, stop))

    def _from_one_each(self, block: slice, routed: RoutedReader) -> FusedRows:
        stats, score_Kn, logp_nV = routed.read(block)
        conflict = None
        if self._fusion.conflict.is_active:
            # One voice contradicts nobody; only a policy that looks at the label alone finds something to do.
            none_n = torch.zeros_like(logp_nV[:, 0])
            conflict = self._conflict(none_n, none_n.bool())
        target = DenseTarget.of_logp(logp_nV)
        return self._finished(block, stats, score_Kn, pooled=(target, None), conflict=conflict)

    def _fused(self, block: slice) -> FusedRows:
        policy = self._fusion.conflict
        pool = self._new_pool(self._fusion.pool)
        # Only the linear pool tells how far the teachers are apart in units of their weights.
        is_extra = policy.is_active and self._fusion.pool != "linear"
        mixture = self._new_pool("linear", is_extra=True) if is_extra else None
        numbers = range(len(self._names))
        members = [self._add(number, block, pool, mixture) for number in numbers]
        stats = RowStats.stack([member[0] for member in members])
        score_Kn = torch.stack([member[1] for member in members])
        pooled = pool.result()
        conflict = None
        if policy.is_active:
            pooled = _as_logp(pooled)
            mixture_nV = (pooled if mixture is None else mixture.result())[0].logp_()
            weights_Kn = score_Kn.softmax(0).to(stats.entropy_KN.dtype)
            disagreement_n = disagreement(mixture_nV, stats.entropy_KN, weights_Kn)
            changed_Kn = policy.scores(score_Kn, stats.label_logp_KN, disagreement_n)
            is_changed_n = (changed_Kn != score_Kn).any(0)
            if is_changed_n.any():
                score_Kn, pooled = changed_Kn, _as_logp(self._pooled_again(block, changed_Kn))
            conflict = self._conflict(disagreement_n, is_changed_n)
        return self._finished(block, stats, score_Kn, pooled=pooled, conflict=conflict)

    def _add(
        self, number: int, block: slice, pool: Pool, mixture: Pool | None
    ) -> tuple[RowStats, Tensor]:
        """Pool one teacher's distribution; its statistics and (n,) scores are all that stays of it."""
        member = self._member(number, block)
        score_n = self._scores(number, member.stats, block)
        if not self._is_excluded[number]:
            if mixture is not None:
                mixture.add(member, score_n)
            pool.add(member, score_n)
        return member.stats, score_n

    def _member(self, number: int, block: slice) -> Member:
        # The only one that is pooled is the pool: it may stay where it was made.
        is_pool = self._is_excluded.count(False) == 1 and not self._is_excluded[number]
        return self._reader.member(number, block, buffer="pool" if is_pool else "logits")

    def _pooled_again(self, block: slice, score_Kn: Tensor) -> tuple[DenseTarget, Tensor | None]:
        """The pool with the weights that a conflict policy chose."""
        pool = self._new_pool(self._fusion.pool)
        for number, score_n in enumerate(score_Kn):
            if not self._is_excluded[number]:
                pool.add(self._member(number, block), _finite(score_n))
        return pool.result()

    def _new_pool(self, kind: PoolKind, *, is_extra: bool = False) -> Pool:
        return Pool(
            kind,
            self._is_excluded.count(False),
            exponent=self._fusion.exponent,
            kernels=self._kernels,
            workspace=None if is_extra else self._workspace,
        )

    def _conflict(self, disagreement_n: Tensor, is_changed_n: Tensor) -> ConflictBlock:
        policy = self._fusion.conflict
        applied_n = is_changed_n.to(disagreement_n.dtype)
        if not policy.yields_to_labels:
            return ConflictBlock(disagreement_n, applied_n)
        kd_factor_n = policy.kd_factor(disagreement_n)
        return ConflictBlock(disagreement_n, 1.0 - kd_factor_n, kd_factor_n)

    def _finished(
        self,
        block: slice,
        stats: RowStats,
        score_Kn: Tensor,
        *,
        pooled: tuple[DenseTarget, Tensor | None],
        conflict: ConflictBlock | None,
    ) -> FusedRows:
        target, log_normalizer_n = pooled
        temperature = self._fusion.pooled_temperature
        if temperature != 1.0:
            logp_nV = torch.log_softmax(target.logp_() / temperature, dim=-1)
            target = DenseTarget.of_logp(logp_nV)
        if conflict is not None:
            corrected_n = self._fusion.conflict.correct_(
                target.rows.values_nV, self._rows.labels[block]
            )
            if corrected_n is not None:
                applied_n = corrected_n.to(conflict.applied_n.dtype)
                conflict = dataclasses.replace(conflict, applied_n=applied_n)
        return FusedRows(
            target=target,
            weights_Kn=torch.softmax(score_Kn, dim=0).to(target.rows.dtype),
            stats=stats,
            log_normalizer_n=log_normalizer_n,
            conflict=conflict,
        )

    def _scores(self, number: int, stats: RowStats, block: slice) -> Tensor:
        """(n,) unnormalized log-weights of one teacher."""
        if self._swept_KN is not None:
            score_n = self._swept_KN[number, block]
        else:
            score_1n, self._carries[number] = self._fusion.weighting.log_scores(
                RowStats.stack([stats]),
                self._rows.part(block),
                self._names[number : number + 1],
                self._carries[number],
            )
            score_n = score_1n[0]
        if self._is_excluded[number]:
            return torch.full_like(score_n, -torch.inf)
        return _finite(score_n)

    def _sweep(self, block_size: int) -> Tensor:
        """(K, N) scores of all rows, for rules that need every statistic before the first row is fused."""
        num_rows, weighting = len(self._rows), self._fusion.weighting
        starts = range(0, num_rows, block_size)
        blocks = [slice(start, min(start + block_size, num_rows)) for start in starts]
        stats = RowStats.cat(
            [self._reader.stats(block, consensus=weighting.needs_consensus) for block in blocks]
        )
        return weighting.log_scores(stats, self._rows, self._names)[0]


def _finite(score_n: Tensor) -> Tensor:
    return score_n.clamp(min=MIN_SCORE)


def _as_logp(pooled: tuple[DenseTarget, Tensor | None]) -> tuple[DenseTarget, Tensor | None]:
    return DenseTarget.of_logp(pooled[0].logp_()), pooled[1]
