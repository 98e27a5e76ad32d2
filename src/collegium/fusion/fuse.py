"""Fuse the answers of several teachers into one target distribution per row.

    live answers ─▶ StreamedTarget    block by block over the vocabulary; memory is constant in K
    named answers ─▶ merge (merge.py) once per batch on the union of the named tokens and a tail

Shapes: N rows of a batch, n rows of one block, V vocabulary, K teachers.
Order: logits / T_k, statistics, weights, pool, conflict policy, pooled temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from collegium.distributions import Answer, Capabilities, NamedRows
from collegium.errors import RecipeError
from collegium.fusion.conflict import ConflictBlock, disagreement
from collegium.fusion.fitted import Route
from collegium.fusion.merge import merge
from collegium.fusion.options import Fusion
from collegium.fusion.pools import MIN_SCORE, Pool, TeacherReader, check_coverage, masked_scores
from collegium.fusion.routing import RoutedReader
from collegium.fusion.weighting import Carry, RowStats
from collegium.kernels.rows import DenseTarget, RawRows, RowKernels, Workspace
from collegium.options import Tensor, torch
from collegium.types import Batch, Rows, map_tensors


@dataclass(frozen=True, slots=True)
class TargetUse:
    """How an objective reads a target over the whole vocabulary."""

    temperature: float = 1.0
    """T of P^(1/T), to which the block of a corrected target is softened already."""
    reads_logp: bool = True
    """False if only P log P is read, as by forward KL at T = 1. Else log P is exact below e^-87."""


UNDERFLOW_MARGIN = 1e8
"""Pooled probabilities of this many times the smallest normal one have lost no member."""


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
    use: TargetUse = TargetUse(),
) -> Target:
    """Fuse `answers` at `rows`.

    Where any answer is full, all are pooled over the whole vocabulary, named ones with their tail
    spread evenly. Else they meet on the union of their named tokens and the tail. A teacher has
    weight 0 at rows that it does not answer.

    The arithmetic over the vocabulary is plain PyTorch without `kernels`, and the blocks of a
    streamed target are in new memory without a `workspace`. `use` is that of a streamed target.

    Raises:
        RecipeError: the fusion names a teacher that is missing.
        DataError: a row names a missing teacher, or no teacher answers it.
    """
    if problems := list(fusion.problems([answer.name for answer in answers])):
        raise RecipeError("\n".join(problems))
    if all(isinstance(answer.distribution, NamedRows) for answer in answers):
        with torch.no_grad():
            return FinishedTarget(*merge(fusion, answers, rows))
    return StreamedTarget(fusion, answers, rows, kernels=kernels, workspace=workspace, use=use)


@dataclass(frozen=True, slots=True)
class FinishedTarget:
    """Named rows that are fused once per batch, or were before, such as those of a fused cache."""

    rows: NamedRows
    weights_KN: Tensor | None = None
    """(K, N) weights, each column sums to 1. None if they were not kept."""
    conflict: ConflictBlock | None = None

    def block(self, block: slice) -> TargetBlock:
        weights_Kn = None if self.weights_KN is None else self.weights_KN[:, block]
        conflict = self.conflict and map_tensors(self.conflict, lambda tensor_N: tensor_N[block])
        return TargetBlock(self.rows.block(block), weights_Kn, conflict=conflict)

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
        use: TargetUse = TargetUse(),
    ) -> None:
        self._fusion = fusion
        self._use = use
        self._names = [answer.name for answer in answers]
        self._logit_bytes = [answer.distribution.logit_bytes for answer in answers]
        self._is_excluded = [fusion.weighting.excludes(name) for name in self._names]
        self._rows = rows
        self._next_row = 0
        self._carries: list[Carry | None] = [None] * len(answers)
        self._ahead: list[RowStats] = []
        self._swept_KN: Tensor | None = None
        """(K, N) scores of all rows, for rules that need every statistic before the first row."""
        temperatures = fusion.temperatures
        self._reader = TeacherReader(
            answers, rows, temperatures, kernels=kernels, workspace=workspace
        )
        num_members = self._is_excluded.count(False)
        # The only pooled member stays in the buffer in which its head wrote it.
        self._buffer = "pool" if num_members == 1 else "logits"
        kernels, exponent = self._reader.kernels, fusion.exponent
        self._empty_pool = Pool(fusion.pool, num_members, kernels, exponent, workspace)
        self._needs_logp = use.reads_logp or fusion.pooled_temperature != 1.0
        # A CPU checks each block for members that may have underflowed: exp and sums are faster.
        self._empty_pool.in_logs = self._needs_logp and rows.labels.device.type != "cpu"
        self._routed: RoutedReader | None = None
        if isinstance(fusion.weighting, Route):
            self._routed = RoutedReader(fusion.weighting, answers, rows, temperatures)
        else:
            members = [a for a, out in zip(answers, self._is_excluded, strict=True) if not out]
            check_coverage(members, rows)

    def bytes_per_logit(self, student_bytes: int, *, is_softened: bool = False) -> int:
        fusion, sizes = self._fusion, self._logit_bytes
        wide = max(4, *(size or 4 for size in sizes))
        logits = max(student_bytes, *(size or 0 for size in sizes))
        if (
            fusion.pool == "power_mean"
            or fusion.conflict.is_active
            or fusion.weighting.needs_consensus
            or fusion.pooled_temperature != 1.0
            or self._routed is not None
            or self._empty_pool.in_logs
        ):
            # Further buffers, besides the pool and the logits of one teacher.
            return logits + 4 * wide
        pooled = [size for size, out in zip(sizes, self._is_excluded, strict=True) if not out]
        if len(pooled) > 1 or pooled[0] is None:
            return logits + wide
        # A single member keeps the dtype of its head.
        return logits + pooled[0] + (wide if is_softened and pooled[0] < wide else 0)

    def block(self, block: slice) -> TargetBlock:
        start, stop, step = block.indices(len(self._rows))
        if start != self._next_row or step != 1 or stop <= start:
            raise ValueError(
                f"StreamedTarget.block: got {block}; must start at row {self._next_row} of "
                f"{len(self._rows)}; read contiguous blocks in increasing order"
            )
        self._next_row = stop
        with torch.no_grad():
            if start == 0:
                for first in range(0, len(self._rows), stop):
                    self.read_ahead(slice(first, min(first + stop, len(self._rows))))
            if self._routed is not None:
                return self._route(slice(start, stop), self._routed)
            return self._pool(slice(start, stop))

    def _route(self, block: slice, routed: RoutedReader) -> TargetBlock:
        stats, score_Kn, logp_nV = routed.read(block)
        conflict = None
        if self._fusion.conflict.is_active:
            # A single teacher has no disagreement; only policies that read the label can act.
            none_n = torch.zeros_like(logp_nV[:, 0])
            conflict = ConflictBlock.of(self._fusion.conflict, none_n, none_n.bool())
        weights_Kn = score_Kn.softmax(0).to(logp_nV.dtype)
        target = DenseTarget(RawRows(logp_nV), "logp")
        return self._finish(block, TargetBlock(target, weights_Kn, stats, conflict=conflict))

    def _pool(self, block: slice) -> TargetBlock:
        policy = self._fusion.conflict
        pools = [replace(self._empty_pool)]
        # Disagreement has the scale of the weights' entropy only for the linear pool.
        if policy.is_active and self._fusion.pool != "linear":
            pools.insert(0, replace(self._empty_pool, kind="linear", workspace=None))
        columns = [self._add(number, block, pools) for number in range(len(self._names))]
        all_stats, scores, entropies = zip(*columns, strict=True)
        stats, score_Kn = RowStats.stack(all_stats), torch.stack(scores)
        target, log_z_n = pools[-1].result()
        if self._needs_logp and target.kind == "prob" and _has_underflow(target.rows.values_nV):
            # Kept for the following blocks: most underflow like this one, or none does.
            self._empty_pool.in_logs = True
            target, log_z_n = self._pool_again(block, score_Kn).result()
        conflict = None
        if policy.is_active:
            target = target.as_logp_()
            mixture_nV = (target if len(pools) == 1 else pools[0].result()[0]).logp_()
            weights_Kn = score_Kn.softmax(0).to(stats.entropy_KN.dtype)
            mixture_entropy_n = -mixture_nV.exp().mul_(mixture_nV).sum(-1)
            disagreement_n = disagreement(mixture_entropy_n, torch.stack(entropies), weights_Kn)
            changed_Kn = policy.scores(score_Kn, stats.label_logp_KN, disagreement_n)
            is_changed_n = (changed_Kn != score_Kn).any(0)
            if is_changed_n.any():
                score_Kn = changed_Kn
                target, log_z_n = self._pool_again(block, score_Kn).result()
                target = target.as_logp_()
            conflict = ConflictBlock.of(policy, disagreement_n, is_changed_n)
        weights_Kn = score_Kn.softmax(0).to(target.rows.dtype)
        fused = TargetBlock(target, weights_Kn, stats.with_nan(), log_z_n, conflict=conflict)
        return self._finish(block, fused)

    def _add(self, number: int, block: slice, pools: list[Pool]) -> tuple[RowStats, Tensor, Tensor]:
        """Pool one teacher's distribution; return its statistics, (n,) scores and (n,) entropy."""
        buffer = "logits" if self._is_excluded[number] else self._buffer
        member = self._reader.member(number, block, buffer=buffer)
        score_n = self._scores(number, member.stats, block)
        entropy_n = member.stats.entropy_KN
        if self._fusion.conflict.is_active:
            entropy_n = self._reader.entropy(number, member)
        for pool in [] if self._is_excluded[number] else pools:
            pool.add(member, score_n)
        return member.stats, score_n, entropy_n

    def _pool_again(self, block: slice, score_Kn: Tensor) -> Pool:
        """The pool under the weights of a conflict policy, or in log space."""
        pool = replace(self._empty_pool)
        for number, score_n in enumerate(score_Kn):
            if not self._is_excluded[number]:
                member = self._reader.member(number, block, buffer=self._buffer)
                pool.add(member, score_n.clamp(min=MIN_SCORE))
        return pool

    def _finish(self, rows: slice, fused: TargetBlock) -> TargetBlock:
        """Apply the pooled temperature, then a policy that corrects the target.

        The policy sees the target that the student is trained on, at the objective's temperature.
        """
        target, temperature = fused.target, self._fusion.pooled_temperature
        assert isinstance(target, DenseTarget)
        if temperature != 1.0:
            logp_nV = torch.log_softmax(target.logp_() / temperature, dim=-1)
            fused.target = target = DenseTarget(RawRows(logp_nV), "logp")
            fused.pooled_temperature = temperature
        if fused.conflict is not None and self._fusion.conflict.corrects_target:
            softness = self._use.temperature
            if softness != 1.0:
                logp_nV = torch.log_softmax(target.logp_() / softness, dim=-1)
                fused.target = target = DenseTarget(RawRows(logp_nV), "logp", temperature=softness)
            labels_n = self._rows.labels[rows]
            corrected_n = self._fusion.conflict.correct_(target.rows.values_nV, labels_n)
            fused.conflict = fused.conflict.corrected(corrected_n)
        return fused

    def _scores(self, number: int, stats: RowStats, block: slice) -> Tensor:
        """(n,) unnormalized log-weights of one teacher."""
        if self._swept_KN is not None:
            score_n = self._swept_KN[number, block]
        else:
            rows, carry = self._rows.part(block), self._carries[number]
            (score_n,), self._carries[number] = self._fusion.weighting.stream(
                RowStats.stack([stats]), rows, [self._names[number]], carry
            )
        if self._is_excluded[number]:
            return torch.full_like(score_n, -torch.inf)
        return masked_scores(score_n, stats).clamp(min=MIN_SCORE)

    def read_ahead(self, block: slice) -> None:
        """Read the statistics of the next rows for a rule that needs all of them at the first row.

        Targets that share buffered answers and read ahead in turns share each product with a head.
        Without it, the first block reads all rows. A no-op for other rules.
        """
        if self._fusion.weighting.streams or self._swept_KN is not None:
            return
        consensus = self._fusion.weighting.needs_consensus
        self._ahead.append(self._reader.stats(block, consensus=consensus))
        if block.stop == len(self._rows):
            stats, self._ahead = RowStats.cat(self._ahead), []
            score_KN = self._fusion.weighting.log_scores(stats, self._rows, self._names)
            self._swept_KN = masked_scores(score_KN, stats)


def _has_underflow(prob_nV: Tensor) -> bool:
    """Whether a member of the pool may have lost probabilities that log P would show."""
    return bool(prob_nV.min() < UNDERFLOW_MARGIN * torch.finfo(prob_nV.dtype).tiny)
