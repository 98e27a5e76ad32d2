"""Fuse the answers of several teachers into one target distribution per row.

    live answers ─▶ StreamedTarget    block by block over the vocabulary; memory is constant in K
    named answers ─▶ merge (merge.py) once per batch on the union of the named tokens and a tail

Shapes: N rows of a batch, n rows of one block, V vocabulary, K teachers.
Order: logits / T_k, statistics, weights, pool, conflict policy, pooled temperature.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field, model_validator

from collegium.distributions import Answer, Capabilities, NamedRows
from collegium.errors import RecipeError, nearest
from collegium.fusion.conflict import (
    CONFLICTS,
    Conflict,
    ConflictBlock,
    NoConflictPolicy,
    disagreement,
)
from collegium.fusion.fitted import WEIGHTINGS, Route
from collegium.fusion.merge import merge
from collegium.fusion.pools import (
    MIN_SCORE,
    Member,
    Pool,
    PoolKind,
    TeacherReader,
    answered_mask,
    check_coverage,
    masked_scores,
)
from collegium.fusion.routing import RoutedReader
from collegium.fusion.rules import PrefixLikelihood
from collegium.fusion.weighting import Carry, RowStats, Weighting
from collegium.kernels.rows import DenseTarget, RowKernels, Workspace
from collegium.options import OneOf, option, torch
from collegium.types import Batch, Rows

if TYPE_CHECKING:
    from torch import Tensor


@option
class Fusion:
    """The rule that turns several teachers into one target."""

    weighting: Annotated[Weighting, OneOf(WEIGHTINGS)] = field(default_factory=PrefixLikelihood)
    """Weight of each teacher at each row."""
    pool: PoolKind = "linear"
    """linear: sum_k w_k P_k, covers every mode of every teacher.
    log_linear: prod_k P_k^w_k / Z, keeps what all teachers allow.
    power_mean: (sum_k w_k P_k^r)^(1/r) / Z, between the two."""
    exponent: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """r of power_mean. Near 1 it is the linear pool, near 0 the log-linear one."""
    temperatures: dict[str, Annotated[float, Field(gt=0)]] = field(default_factory=dict)
    """T_k by teacher name, applied to its logits first. 1 where missing."""
    pooled_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the pooled distribution: p^(1/T), renormalized."""
    conflict: Annotated[Conflict, OneOf(CONFLICTS)] = field(default_factory=NoConflictPolicy)
    """Policy for rows where the teachers contradict each other."""

    @model_validator(mode="after")
    def _exponent_has_effect(self) -> Fusion:
        if self.pool != "power_mean" and self.exponent != 0.5:
            raise ValueError(
                f"exponent: got {self.exponent:g} with pool `{self.pool}`; must be omitted unless "
                "the pool is `power_mean`; remove it"
            )
        return self

    @property
    def uses_label(self) -> bool:
        """True if the label of a row enters its target, which then cannot be judged by its NLL."""
        return self.weighting.uses_label or self.conflict.uses_label

    def problems(self, teachers: Collection[str]) -> Iterator[str]:
        """Yield `key: problem` for names that are no teacher, and teachers without an entry."""
        names: dict[str, Iterable[str]] = {"temperatures": self.temperatures}
        for path, name in self.weighting.teacher_fields().items():
            names[".".join(("weighting", *path))] = [name]
        for path, table in self.weighting.teacher_tables().items():
            key = ".".join(("weighting", *path))
            names[key] = table
            remedy = "0 leaves it out" if self.weighting.zero_excludes else "fit it again"
            for name in teachers:
                if name not in table:
                    text = f"got none for teacher `{name}`; must give one to each; {remedy}"
                    yield f"fusion.{key}: {text}"
        for key, listed in names.items():
            for name in listed:
                if name not in teachers:
                    hint = nearest(name, teachers)
                    yield f"fusion.{key}: got `{name}`; must be a teacher{hint}"

    def check(self, teachers: Collection[str]) -> None:
        """Check that every name in the options is a teacher of this run.

        Raises:
            RecipeError: a name belongs to no teacher, or a teacher has no weight.
        """
        if problems := list(self.problems(teachers)):
            raise RecipeError("\n".join(problems))


@dataclass(slots=True)
class TargetBlock:
    """The target at n rows."""

    target: DenseTarget | NamedRows
    """A dense target is overwritten by the next block where a workspace was given."""
    weights_Kn: Tensor | None = None
    """(K, n) weights, each column sums to 1; None for a finished target."""
    stats: RowStats | None = None
    """(K, n) each, after the temperatures; NaN where a teacher was not read."""
    log_normalizer_n: Tensor | None = None
    """(n,) log Z of the log-linear pool, log Z / (1 - r) of the power mean, else None."""
    pooled_temperature: float = 1.0
    conflict: ConflictBlock | None = None
    """Measurements of the conflict policy; None without one."""

    @property
    def kd_factor_n(self) -> Tensor | None:
        """(n,) factor on the divergence; the remainder to 1 goes to the label. None for 1."""
        return None if self.conflict is None else self.conflict.kd_factor_n

    def logp(self) -> Tensor:
        """(n, V) finite log-probabilities, written over the values of a dense target."""
        assert isinstance(self.target, DenseTarget)
        self.target = self.target.as_logp_()
        return self.target.rows.values_nV

    def disagreement_n(self) -> Tensor:
        """Disagreement of the teachers at each row in nats, (n,); 0 where all agree.

        Linear pool P: JSD_w = H(P) - sum_k w_k H_k. Log-linear pool: -log Z = sum_k w_k
        KL(P || P_k). Power mean: -log Z / (1 - r), close to JSD_w for r near 1 and to -log Z for r
        near 0. All are taken before the pooled temperature. Undefined for a corrected target.
        """
        if self.log_normalizer_n is not None:
            return (-self.log_normalizer_n).clamp(min=0.0)
        assert self.weights_Kn is not None
        assert self.stats is not None
        logp_nV = self.logp()
        if self.pooled_temperature != 1.0:
            logp_nV = torch.log_softmax(logp_nV * self.pooled_temperature, dim=-1)
        weighted_Kn = self.weights_Kn * self.stats.entropy_KN
        # The entropy of a teacher without weight may be NaN.
        within_n = torch.where(self.weights_Kn > 0, weighted_Kn, 0.0).sum(0)
        entropy_n = -logp_nV.exp().mul_(logp_nV).sum(-1)
        jsd_n = (entropy_n - within_n).clamp(min=0.0)
        # With a single teacher the two entropies are equal up to rounding.
        return torch.where((self.weights_Kn == 1.0).any(0), 0.0, jsd_n)


class Target(Protocol):
    """The target distributions of the rows of one batch, read in blocks from the first row on."""

    def block(self, block: slice) -> TargetBlock:
        """The target at the rows of `block`.

        Raises:
            ValueError: a streamed target is not read in contiguous blocks.
        """
        ...

    def bytes_per_logit(self, student_bytes: int, *, is_softened: bool = False) -> int:
        """Bytes per element of a block, of all (n, V) tensors alive at once.

        Args:
            student_bytes: of one logit of the student, whose buffer the teachers' logits share.
            is_softened: the target becomes log-probabilities, which half precision cannot hold.
        """
        ...


class TargetSource(Protocol):
    """A source of finished targets, such as a fused cache, that replaces all teachers."""

    @property
    def capabilities(self) -> Capabilities: ...

    def target(self, batch: Batch, rows: Rows) -> Target:
        """The target at all rows of a batch, on its device."""
        ...


def fuse(
    fusion: Fusion,
    answers: Sequence[Answer],
    rows: Rows,
    *,
    kernels: RowKernels | None = None,
    workspace: Workspace | None = None,
) -> Target:
    """Fuse `answers` at `rows`.

    Where any answer is full, all are pooled over the whole vocabulary, named ones with their tail
    spread evenly. Else they meet on the union of their named tokens and the tail. A teacher has
    weight 0 at rows that it does not answer.

    Args:
        fusion: weighting, pool, temperatures and conflict policy.
        answers: of the teachers that the fusion names.
        rows: all rows of the batch.
        kernels: arithmetic over the vocabulary; plain PyTorch by default.
        workspace: buffers for the blocks of a streamed target; new memory by default.

    Raises:
        RecipeError: the fusion names a teacher that is missing.
        DataError: a row names a missing teacher, or no teacher answers it.
    """
    fusion.check([answer.name for answer in answers])
    if all(isinstance(answer.distribution, NamedRows) for answer in answers):
        return MergedTarget(fusion, answers, rows)
    return StreamedTarget(fusion, answers, rows, kernels=kernels, workspace=workspace)


class MergedTarget:
    """Named answers fused once, on the union of their named tokens and the tail."""

    def __init__(self, fusion: Fusion, answers: Sequence[Answer], rows: Rows) -> None:
        with torch.no_grad():
            self._merged = merge(
                answers,
                rows,
                weighting=fusion.weighting,
                pool=fusion.pool,
                exponent=fusion.exponent,
                temperatures=fusion.temperatures,
                conflict=fusion.conflict,
            )

    def block(self, block: slice) -> TargetBlock:
        merged = self._merged
        conflict = merged.conflict
        return TargetBlock(
            merged.rows.block(block),
            merged.weights_KN[:, block],
            conflict=None if conflict is None else conflict.block(block),
        )

    def bytes_per_logit(self, student_bytes: int, *, is_softened: bool = False) -> int:
        return student_bytes


@dataclass(frozen=True, slots=True)
class FinishedTarget:
    """A target that was fused before, such as one read from a fused cache."""

    rows: NamedRows

    def block(self, block: slice) -> TargetBlock:
        return TargetBlock(self.rows.block(block))

    def bytes_per_logit(self, student_bytes: int, *, is_softened: bool = False) -> int:
        return student_bytes


class StreamedTarget:
    """A target over the whole vocabulary, fused block by block without gradient.

    Two (n, V) tensors are alive at most, for any K: the pool and the logits of the current teacher.
    The power mean, rules that compare teachers with their mean, and conflict policies need one or
    two more. A policy that changes weights pools its blocks twice. Under `route` each row is read
    from one teacher and nothing is pooled.
    """

    def __init__(
        self,
        fusion: Fusion,
        answers: Sequence[Answer],
        rows: Rows,
        *,
        kernels: RowKernels | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self._fusion = fusion
        self._answers = answers
        self._names = [answer.name for answer in answers]
        self._is_excluded = [fusion.weighting.excludes(name) for name in self._names]
        self._rows = rows
        self._next_row = 0
        self._carries: list[Carry | None] = [None] * len(answers)
        self._swept_KN: Tensor | None = None
        self._kernels = kernels
        self._workspace = workspace
        self._reader = TeacherReader(
            answers, rows, fusion.temperatures, kernels=kernels, workspace=workspace
        )
        self._routed: RoutedReader | None = None
        if isinstance(fusion.weighting, Route):
            self._routed = RoutedReader(fusion.weighting, answers, rows, fusion.temperatures)
        else:
            members = [a for a, out in zip(answers, self._is_excluded, strict=True) if not out]
            check_coverage(answered_mask(members, rows))

    def bytes_per_logit(self, student_bytes: int, *, is_softened: bool = False) -> int:
        sizes = [answer.distribution.logit_bytes for answer in self._answers]
        wide = max(4, *(size or 4 for size in sizes))
        logits = max(student_bytes, *(size or 0 for size in sizes))
        if not self._is_plain:
            return logits + 4 * wide
        pooled = [size for size, out in zip(sizes, self._is_excluded, strict=True) if not out]
        if len(pooled) > 1 or pooled[0] is None:
            return logits + wide
        # A single member keeps the dtype of its head.
        return logits + pooled[0] + (wide if is_softened and pooled[0] < wide else 0)

    @property
    def _is_plain(self) -> bool:
        """Whether the pool and one teacher's logits are the only buffers of the size of a block."""
        return (
            self._fusion.pool != "power_mean"
            and not self._fusion.conflict.is_active
            and not self._fusion.weighting.needs_consensus
            and self._fusion.pooled_temperature == 1.0
            and self._routed is None
        )

    def block(self, block: slice) -> TargetBlock:
        start, stop, step = block.indices(len(self._rows))
        if start != self._next_row or step != 1 or stop <= start:
            raise ValueError(
                f"StreamedTarget.block: got {block}; must start at row {self._next_row} of "
                f"{len(self._rows)}; read contiguous blocks in increasing order"
            )
        self._next_row = stop
        with torch.no_grad():
            if not self._fusion.weighting.streams and self._swept_KN is None:
                self._swept_KN = self._sweep(stop - start)
            if self._routed is not None:
                return self._route(slice(start, stop), self._routed)
            return self._pool(slice(start, stop))

    def _route(self, block: slice, routed: RoutedReader) -> TargetBlock:
        stats, score_Kn, logp_nV = routed.read(block)
        conflict = None
        if self._fusion.conflict.is_active:
            # A single teacher has no disagreement; only policies that read the label can act.
            none_n = torch.zeros_like(logp_nV[:, 0])
            conflict = self._conflict_block(none_n, none_n.bool())
        target = DenseTarget.of_logp(logp_nV)
        return self._finish(block, stats, score_Kn, pooled=(target, None), conflict=conflict)

    def _pool(self, block: slice) -> TargetBlock:
        policy = self._fusion.conflict
        pool = self._new_pool(self._fusion.pool)
        # Disagreement has the scale of the weights' entropy only for the linear pool.
        is_extra = policy.is_active and self._fusion.pool != "linear"
        mixture = self._new_pool("linear", is_extra=True) if is_extra else None
        members = [self._add(number, block, pool, mixture) for number in range(len(self._names))]
        stats = RowStats.stack([member[0] for member in members])
        score_Kn = torch.stack([member[1] for member in members])
        entropy_Kn = torch.stack([member[2] for member in members])
        pooled = pool.result()
        conflict = None
        if policy.is_active:
            pooled = _as_logp(pooled)
            mixture_nV = (pooled if mixture is None else mixture.result())[0].logp_()
            weights_Kn = score_Kn.softmax(0).to(stats.entropy_KN.dtype)
            mixture_entropy_n = -mixture_nV.exp().mul_(mixture_nV).sum(-1)
            disagreement_n = disagreement(mixture_entropy_n, entropy_Kn, weights_Kn)
            changed_Kn = policy.scores(score_Kn, stats.label_logp_KN, disagreement_n)
            is_changed_n = (changed_Kn != score_Kn).any(0)
            if is_changed_n.any():
                score_Kn, pooled = changed_Kn, _as_logp(self._pool_again(block, changed_Kn))
            conflict = self._conflict_block(disagreement_n, is_changed_n)
        return self._finish(block, stats, score_Kn, pooled=pooled, conflict=conflict)

    def _add(
        self, number: int, block: slice, pool: Pool, mixture: Pool | None
    ) -> tuple[RowStats, Tensor, Tensor]:
        """Pool one teacher's distribution; return its statistics, (n,) scores and (n,) entropy."""
        member = self._member(number, block)
        score_n = self._scores(number, member.stats, block)
        entropy_n = member.stats.entropy_KN
        if self._fusion.conflict.is_active:
            entropy_n = self._reader.entropy(number, member)
        if not self._is_excluded[number]:
            if mixture is not None:
                mixture.add(member, score_n)
            pool.add(member, score_n)
        return member.stats, score_n, entropy_n

    def _member(self, number: int, block: slice) -> Member:
        # The only pooled member stays in the buffer in which its head wrote it.
        is_pool = self._is_excluded.count(False) == 1 and not self._is_excluded[number]
        return self._reader.member(number, block, buffer="pool" if is_pool else "logits")

    def _pool_again(self, block: slice, score_Kn: Tensor) -> tuple[DenseTarget, Tensor | None]:
        """The pool under the weights of a conflict policy."""
        pool = self._new_pool(self._fusion.pool)
        for number, score_n in enumerate(score_Kn):
            if not self._is_excluded[number]:
                pool.add(self._member(number, block), score_n.clamp(min=MIN_SCORE))
        return pool.result()

    def _new_pool(self, kind: PoolKind, *, is_extra: bool = False) -> Pool:
        return Pool(
            kind,
            self._is_excluded.count(False),
            exponent=self._fusion.exponent,
            kernels=self._kernels,
            workspace=None if is_extra else self._workspace,
        )

    def _conflict_block(self, disagreement_n: Tensor, is_changed_n: Tensor) -> ConflictBlock:
        return ConflictBlock.of(self._fusion.conflict, disagreement_n, is_changed_n)

    def _finish(
        self,
        block: slice,
        stats: RowStats,
        score_Kn: Tensor,
        *,
        pooled: tuple[DenseTarget, Tensor | None],
        conflict: ConflictBlock | None,
    ) -> TargetBlock:
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
                conflict = replace(conflict, applied_n=corrected_n.to(conflict.applied_n.dtype))
        return TargetBlock(
            target,
            torch.softmax(score_Kn, dim=0).to(target.rows.dtype),
            stats.with_nan(),
            log_normalizer_n,
            temperature,
            conflict,
        )

    def _scores(self, number: int, stats: RowStats, block: slice) -> Tensor:
        """(n,) unnormalized log-weights of one teacher."""
        if self._swept_KN is not None:
            score_n = self._swept_KN[number, block]
        else:
            score_1n, self._carries[number] = self._fusion.weighting.stream(
                RowStats.stack([stats]),
                self._rows.part(block),
                [self._names[number]],
                self._carries[number],
            )
            score_n = score_1n[0]
        if self._is_excluded[number]:
            return torch.full_like(score_n, -torch.inf)
        return masked_scores(score_n, stats).clamp(min=MIN_SCORE)

    def _sweep(self, block_size: int) -> Tensor:
        """(K, N) scores of all rows, for rules that need every statistic before the first row."""
        num_rows, weighting = len(self._rows), self._fusion.weighting
        starts = range(0, num_rows, block_size)
        blocks = [slice(start, min(start + block_size, num_rows)) for start in starts]
        stats = RowStats.cat(
            [self._reader.stats(block, consensus=weighting.needs_consensus) for block in blocks]
        )
        return masked_scores(weighting.log_scores(stats, self._rows, self._names), stats)


def _as_logp(pooled: tuple[DenseTarget, Tensor | None]) -> tuple[DenseTarget, Tensor | None]:
    return pooled[0].as_logp_(), pooled[1]
