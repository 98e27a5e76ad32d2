"""One target distribution per row out of K teachers, streamed: memory does not grow with K.

Shapes: N rows of a batch, n rows of one block, V vocabulary, K teachers.
Order: logits / T_k -> log-softmax -> statistics -> weights -> pool -> pooled temperature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Annotated, Literal

import torch
from pydantic import Field, InstanceOf
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.fusion.weights import (
    WEIGHTINGS,
    Carry,
    PrefixLikelihood,
    RowStats,
    Weighting,
    check_names,
)
from collegium.types import STRICT, Rows, TeacherRows

LOWEST_SCORE = -1e300
"""Stands for a log-weight of -inf where a rule may still change its mind, so that differences stay defined."""
FLOOR_SHARE = 1e-8
"""Log-probabilities of -inf become this share of the dtype's lowest value."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Fusion:
    """How several teachers become one target."""

    weighting: InstanceOf[Weighting] = field(default_factory=PrefixLikelihood)
    """Which teacher to trust on which row."""
    pool: Literal["linear", "log_linear"] = "linear"
    """linear: sum_k w_k P_k, covers what any teacher believes. log_linear: prod_k P_k^w_k / Z, what all can agree on."""
    temperatures: dict[str, Annotated[float, Field(gt=0)]] = field(default_factory=dict)
    """T_k by teacher name, applied to its logits before everything else; 1 where missing."""
    pooled_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the pooled distribution: p^(1/T), renormalized."""

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
    """(K, n) nats."""
    label_logp_Kn: Tensor
    """(K, n) log-probability of the row's label."""
    max_logp_Kn: Tensor
    """(K, n) log-probability of the most likely token."""
    log_normalizer_n: Tensor | None
    """(n,) log Z of the log-linear pool, None for the linear pool."""
    pooled_temperature: float
    """What turned the pool into `logp_nV`."""

    def disagreement_n(self) -> Tensor:
        """How far the teachers are apart at each row: (n,) nats, 0 where all agree.

        Linear pool P: JSD_w = H(P) - sum_k w_k H_k. Log-linear pool: -log Z = sum_k w_k KL(P || P_k). Both are taken
        before the pooled temperature.
        """
        if self.log_normalizer_n is not None:
            return -self.log_normalizer_n
        logp_nV = self.logp_nV
        if self.pooled_temperature != 1.0:
            logp_nV = torch.log_softmax(logp_nV * self.pooled_temperature, dim=-1)
        within_n = (self.weights_Kn * self.entropy_Kn).sum(0)
        entropy_n = -logp_nV.exp().mul_(logp_nV).sum(-1)
        return (entropy_n - within_n).clamp(min=0.0)


class FusedTarget:
    """The target distribution of the rows of one batch, block by block, without gradient.

    Whatever K is, four (n, V) tensors are alive at most: the pool, two buffers and the current teacher's logits.

    Raises:
        RecipeError: the fusion names a teacher that is not there.
    """

    def __init__(self, fusion: Fusion, teachers: Sequence[TeacherRows], rows: Rows) -> None:
        self._fusion = fusion
        self._teachers = teachers
        self._names = [teacher.name for teacher in teachers]
        fusion.check(self._names)
        self._is_excluded = [fusion.weighting.excludes(name) for name in self._names]
        self._rows = rows
        self._next_row = 0
        self._carries: list[Carry | None] = [None] * len(teachers)
        self._swept_KN: Tensor | None = None
        self._reader = RowReader()

    @torch.no_grad()
    def block(self, block: slice) -> FusedBlock:
        """Fuse the rows of `block`; blocks must follow one another from row 0.

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
        pool = _Pool(self._fusion.pool, num_teachers=self._is_excluded.count(False))
        members = [
            self._add(number, slice(start, stop), pool) for number in range(len(self._teachers))
        ]
        stats = RowStats.stack([member[0] for member in members])
        return self._fused(pool, stats, torch.stack([member[1] for member in members]))

    def _add(self, number: int, block: slice, pool: _Pool) -> tuple[RowStats, Tensor]:
        """Pool one teacher's distribution; its statistics and (n,) scores are all that stays of it."""
        stats, member_nV = self._read(number, block, keep=pool.space)
        score_n = self._scores(number, stats, block)
        if not self._is_excluded[number]:
            pool.add(member_nV, score_n)
        return stats, score_n

    def _fused(self, pool: _Pool, stats: RowStats, score_Kn: Tensor) -> FusedBlock:
        logp_nV, log_normalizer_n = pool.result()
        temperature = self._fusion.pooled_temperature
        if temperature != 1.0:
            logp_nV = torch.log_softmax(logp_nV / temperature, dim=-1)
        return FusedBlock(
            logp_nV=logp_nV,
            weights_Kn=torch.softmax(score_Kn, dim=0).to(logp_nV.dtype),
            entropy_Kn=stats.entropy_KN,
            label_logp_Kn=stats.label_logp_KN,
            max_logp_Kn=stats.max_logp_KN,
            log_normalizer_n=log_normalizer_n,
            pooled_temperature=temperature,
        )

    def _read(
        self, number: int, block: slice, *, keep: Literal["prob", "logp"]
    ) -> tuple[RowStats, Tensor]:
        teacher = self._teachers[number]
        return self._reader.read(
            teacher.scores.logits(block),
            self._rows.labels[block],
            temperature=self._fusion.temperatures.get(teacher.name, 1.0),
            keep=keep,
        )

    def _scores(self, number: int, stats: RowStats, block: slice) -> Tensor:
        """(n,) unnormalized log-weights of one teacher."""
        if self._swept_KN is not None:
            score_n = self._swept_KN[number, block]
        else:
            score_1n, self._carries[number] = self._fusion.weighting.log_scores(
                RowStats.stack([stats]),
                rows_of(self._rows, block),
                self._names[number : number + 1],
                self._carries[number],
            )
            score_n = score_1n[0]
        if self._is_excluded[number]:
            return torch.full_like(score_n, -torch.inf)
        return score_n.clamp(min=LOWEST_SCORE)

    def _sweep(self, block_size: int) -> Tensor:
        """(K, N) scores of all rows, for rules that need every statistic before the first row is fused."""
        num_rows = len(self._rows)
        starts = range(0, num_rows, block_size)
        blocks = [slice(start, min(start + block_size, num_rows)) for start in starts]
        per_teacher = [
            RowStats.cat([self._read(number, block, keep="logp")[0] for block in blocks])
            for number in range(len(self._teachers))
        ]
        stats = RowStats.stack(per_teacher)
        return self._fusion.weighting.log_scores(stats, self._rows, self._names)[0]


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
        _floor_(logp_nV)
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


class _Pool:
    """A weighted mean of distributions (or of their logarithms) that meets its members one by one.

    After k members with log-weights s_1 ... s_k, the mean holds sum_j softmax_j(s) X_j; the next one enters with
    the weight exp(s_k - logsumexp(s_1 ... s_k)), so nothing over- or underflows whatever the scale of the scores.
    """

    def __init__(self, kind: Literal["linear", "log_linear"], num_teachers: int) -> None:
        # A single member is its own pool: no way through exp and log, which would round.
        self.space: Literal["prob", "logp"] = (
            "prob" if kind == "linear" and num_teachers > 1 else "logp"
        )
        self._kind = kind
        self._num_teachers = num_teachers
        self._mean_nV: Tensor | None = None
        self._total_n: Tensor | None = None

    def add(self, member_nV: Tensor, score_n: Tensor) -> None:
        """Take in one member, given in the pool's `space`; it is copied, not kept."""
        if self._mean_nV is None or self._total_n is None:
            self._mean_nV, self._total_n = member_nV.clone(), score_n
            return
        self._total_n = torch.logaddexp(self._total_n, score_n)
        dtype = self._mean_nV.dtype  # of the first member, when a later one is wider or narrower
        share_n1 = (score_n - self._total_n).exp().to(dtype)[:, None]
        self._mean_nV.lerp_(member_nV.to(dtype), share_n1)

    def result(self) -> tuple[Tensor, Tensor | None]:
        """(n, V) log-probabilities of the pool, and log Z (n,) of the log-linear one."""
        assert self._mean_nV is not None
        mean_nV = self._mean_nV
        if self.space == "prob":
            return mean_nV.clamp_(min=torch.finfo(mean_nV.dtype).tiny).log_(), None
        if self._kind == "linear":
            return mean_nV, None
        if self._num_teachers == 1:
            return mean_nV, mean_nV.new_zeros(mean_nV.shape[0])
        log_normalizer_n = torch.logsumexp(mean_nV, dim=-1)
        return mean_nV.sub_(log_normalizer_n[:, None]), log_normalizer_n


def describe(fusion: Fusion) -> str:
    """A short name, such as `prefix_likelihood(eta=0.3, decay=0.9), linear`."""
    parts = [_call(_name_of(fusion.weighting), _options_of(fusion.weighting)), fusion.pool]
    if fusion.temperatures:
        parts.append(_call("temperatures", fusion.temperatures))
    if fusion.pooled_temperature != 1.0:
        parts.append(f"pooled_temperature={fusion.pooled_temperature:.3g}")
    return ", ".join(parts)


def to_recipe(fusion: Fusion) -> dict[str, object]:
    """The `fusion:` section of a recipe that gives this fusion: plain dicts, strings and numbers."""
    weighting = {"name": _name_of(fusion.weighting), **_options_of(fusion.weighting)}
    return {
        "weighting": weighting,
        "pool": fusion.pool,
        "temperatures": dict(fusion.temperatures),
        "pooled_temperature": fusion.pooled_temperature,
    }


def _name_of(weighting: Weighting) -> str:
    for name, option_class in WEIGHTINGS.items():
        if type(weighting) is option_class:
            return name
    return type(weighting).__name__


def _options_of(weighting: Weighting) -> dict[str, object]:
    return dataclasses.asdict(weighting) if dataclasses.is_dataclass(weighting) else {}


def _call(name: str, options: Mapping[str, object]) -> str:
    """`name(key=value, ...)`; a dict among the values is written out in its place."""
    flat: dict[str, object] = {}
    for key, value in options.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    inner = ", ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in flat.items()
    )
    return f"{name}({inner})" if inner else name


def _floor_(logp_nV: Tensor) -> Tensor:
    """Make -inf finite in place: a token that a model rules out must not turn 0 * log 0 into NaN.

    The floor leaves room to be divided by a temperature.
    """
    return logp_nV.clamp_(min=FLOOR_SHARE * torch.finfo(logp_nV.dtype).min)


def rows_of(rows: Rows, block: slice) -> Rows:
    """The rows of one block."""
    return Rows(rows.index[block], rows.labels[block], rows.documents[block], rows.samples[block])
