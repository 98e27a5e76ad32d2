"""Weighting rules that are fitted, compare teachers, or read the label, and the table of all rules.

Shapes: N rows (or one block of them), K teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.fusion.isotonic import interpolate
from collegium.fusion.routing import Route
from collegium.fusion.weights import (
    MIN_LOGP,
    BestSingle,
    Carry,
    Entropy,
    Fixed,
    PrefixLikelihood,
    RowStats,
    Uniform,
    Weighting,
    averaged,
    check_sum_to_one,
    constant_scores,
)
from collegium.types import STRICT, Rows, domain_number


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DomainWeights(Weighting):
    """One weight per teacher and domain of the document: a soft routing table."""

    weights: dict[str, dict[str, Annotated[float, Field(ge=0)]]]
    """Domain -> weight by teacher name. The weights of a domain sum to 1."""
    default: dict[str, Annotated[float, Field(ge=0)]]
    """Weight by teacher name in domains that are not listed, and for rows without a domain."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> DomainWeights:
        for table in (*self.weights.values(), self.default):
            check_sum_to_one(table)
        return self

    @property
    def streams(self) -> bool:
        return True

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        return {("default",): self.default, **{("weights", d): t for d, t in self.weights.items()}}

    def domain_names(self) -> Mapping[tuple[str, ...], Sequence[str]]:
        return {("weights",): list(self.weights)}

    def excludes(self, teacher: str) -> bool:
        return all(table[teacher] == 0.0 for table in (*self.weights.values(), self.default))

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        score_KN = constant_scores([self.default[teacher] for teacher in teachers], stats)
        if rows.domains is not None:
            for domain, table in self.weights.items():
                domain_score_KN = constant_scores([table[name] for name in teachers], stats)
                is_here_N = rows.domains == domain_number(domain)
                score_KN = torch.where(is_here_N, domain_score_KN, score_KN)
        return score_KN, None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CalibratedEntropy(Weighting):
    """Entropy weights on a calibrated scale: w_k = softmax_k(-m_k(H_k) / tau), m_k increasing.

    m_k maps a teacher's entropy to its mean NLL at that entropy on the calibration split, so
    being certain and wrong no longer pays. Only the weights change, not the teachers'
    distributions. Fit the maps with `fit_entropy_maps`.
    """

    maps: dict[str, list[list[float]]]
    """Knots [entropy, NLL] by teacher name, in nats, both ascending, interpolated linearly."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Difference in expected NLL, in nats, that changes the odds by a factor of e."""

    @model_validator(mode="after")
    def _maps_increase(self) -> CalibratedEntropy:
        for name, knots in self.maps.items():
            has_pairs = len(knots) > 0 and all(len(knot) == 2 for knot in knots)
            if not has_pairs or any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(knots)):
                raise ValueError(
                    f"maps: the knots of `{name}` must be pairs [entropy, NLL], both ascending; "
                    "fit them again"
                )
        return self

    @property
    def streams(self) -> bool:
        return True

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        return {("maps",): self.maps}

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        pairs = zip(stats.entropy_KN, teachers, strict=True)
        expected_KN = torch.stack([interpolate(h_N, self.maps[name]) for h_N, name in pairs])
        return -expected_KN / self.tau, None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Consensus(Weighting):
    """Trust the teacher closest to the mean of all: w_k = softmax_k(-KL(P_k || Pbar) / tau).

    Pbar = 1/K sum_k P_k, and KL <= log K nats. An outlier loses weight, whether it is wrong or
    the only one that is right. The weights need two passes over all distributions of a row, so
    each head is applied three times instead of once.
    """

    tau: Annotated[float, Field(gt=0)] = 0.3
    """Difference in divergence, in nats, that changes the odds by a factor of e."""

    @property
    def streams(self) -> bool:
        return False

    @property
    def needs_consensus(self) -> bool:
        return True

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        # Measured after the teachers' temperatures, like everything in `stats`.
        return -stats.consensus_kl().double() / self.tau, None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConfidenceAware(Weighting):
    """CA-MKD, label-aware: w_k = (1 - softmax_k(CE_k)) / (K - 1), with CE_k = -log P_k(label).

    No weight exceeds 1 / (K - 1), so with many teachers the rule can drop bad ones but hardly
    prefer a good one. It reads the label that it weighs: its target knows more than any teacher,
    and acts like a larger share of cross-entropy.

    Source: Zhang, Chen and Wang, "Confidence-aware multi-teacher knowledge distillation",
    ICASSP 2022.
    """

    # K = 5: one perfect teacher gets .2496 and the others .1876. The label leaks into the target:
    # 2.447 nats in a toy where the true distribution has 2.426.
    granularity: Literal["token", "sequence"] = "token"
    """Rows to average CE_k over first: none, or the row's document."""

    @property
    def streams(self) -> bool:
        return False

    @property
    def uses_label(self) -> bool:
        return True

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        ce_KN = averaged(_cross_entropy(stats), rows, self.granularity, stats.answered_KN)
        if stats.answered_KN is not None:
            # Without a share in either sum.
            ce_KN = ce_KN.masked_fill(~stats.answered_KN, -torch.inf)
        if len(ce_KN) == 1:
            return torch.zeros_like(ce_KN), None
        # 1 - softmax_k as the share of the others: exact where softmax_k rounds to 1.
        is_self_KK1 = torch.eye(len(ce_KN), dtype=torch.bool, device=ce_KN.device)[:, :, None]
        return ce_KN.masked_fill(is_self_KK1, -torch.inf).logsumexp(1) - ce_KN.logsumexp(0), None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MinCE(Weighting):
    """FuseLLM's MinCE, label-aware: all weight on the teacher of lowest mean CE_k in the document.

    Teachers of exactly equal CE share the weight. The labels of the whole document decide, even
    at its first row.

    Source: Wan et al., "Knowledge fusion of large language models", ICLR 2024.
    """

    @property
    def streams(self) -> bool:
        return False

    @property
    def uses_label(self) -> bool:
        return True

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        ce_KN = _document_ce(stats, rows)
        return torch.zeros_like(ce_KN).masked_fill(ce_KN > ce_KN.amin(0), -torch.inf), None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AvgCE(Weighting):
    """FuseLLM's AvgCE, label-aware: w_k = softmax_k(exp(-CE_k)), or softmax_k(-CE_k / tau).

    CE_k is the mean over the document: its labels decide, even at its first row. FuseLLM's form is
    a softmax over values between 0 and 1, so close to uniform. With `tau` the rule can select.

    Source: Wan et al., "Knowledge fusion of large language models", ICLR 2024. The form with
    `tau` is ours.
    """

    # In FuseLLM's form, CEs of 2, 2.5 and 3 nats give weights of .35, .33 and .32.
    tau: Annotated[float, Field(gt=0)] | None = None
    """Nats per token that change the odds by a factor of e. None for FuseLLM's form."""

    @property
    def streams(self) -> bool:
        return False

    @property
    def uses_label(self) -> bool:
        return True

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        ce_KN = _document_ce(stats, rows)
        return (torch.exp(-ce_KN) if self.tau is None else -ce_KN / self.tau), None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gate(Weighting):
    """A learned gate: w_k = softmax_k(a_k + b . f_k), with K + 4 parameters fitted by `fit_gate`.

    f_k = [H_k, max_v log P_k(v), KL(P_k || Pbar), sum_{s<t} decay^(t-s) NLL_k(s)] in nats, each
    centered over the teachers. Pbar is the mean of all teachers, and the sum runs over the
    earlier rows of the document. Causal: a row's label never enters its own weight. Each head is
    applied three times, or twice where b of the divergence is 0.
    """

    # On specialists: 5.08 nats, as with domain weights, but without domain labels.
    offsets: dict[str, float]
    """a_k by teacher name. Only their differences matter."""
    entropy: float = 0.0
    """b of the entropy."""
    max_logp: float = 0.0
    """b of the log-probability of the most likely token."""
    consensus: float = 0.0
    """b of the divergence from the mean of all teachers."""
    prefix_nll: float = 0.0
    """b of the decayed NLL of the document's earlier rows."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Decay factor of a row's NLL per row of age."""

    @property
    def streams(self) -> bool:
        return False

    @property
    def needs_consensus(self) -> bool:
        return self.consensus != 0.0

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        return {("offsets",): self.offsets}

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        feature_KNF = gate_features(
            stats, rows, decay=self.decay, with_consensus=self.needs_consensus
        )
        b_F = feature_KNF.new_tensor([self.entropy, self.max_logp, self.consensus, self.prefix_nll])
        a_K = feature_KNF.new_tensor([self.offsets[teacher] for teacher in teachers])
        return feature_KNF @ b_F + a_K[:, None], None


def gate_features(
    stats: RowStats, rows: Rows, *, decay: float, with_consensus: bool = True
) -> Tensor:
    """Compute the four features of `Gate`: (K, N, 4) float64 nats, centered over the teachers.

    Without the consensus, its column is 0.

    Raises:
        ValueError: the statistics lack the divergence from the consensus.
    """
    # At eta 1 that rule scores the negative prefix NLL. It reads no teacher names.
    prefix_KN, _ = PrefixLikelihood(eta=1.0, decay=decay).log_scores(stats, rows, [])
    columns = (
        stats.entropy_KN.double(),
        stats.max_logp_KN.double(),
        stats.consensus_kl().double() if with_consensus else torch.zeros_like(prefix_KN),
        -prefix_KN,
    )
    feature_KNF = torch.stack(columns, dim=-1)
    return feature_KNF - feature_KNF.mean(0)


def _document_ce(stats: RowStats, rows: Rows) -> Tensor:
    """(K, N) mean cross-entropy over the row's document; inf where the teacher does not answer."""
    ce_KN = averaged(_cross_entropy(stats), rows, "sequence", stats.answered_KN)
    if stats.answered_KN is None:
        return ce_KN
    return ce_KN.masked_fill(~stats.answered_KN, torch.inf)


def _cross_entropy(stats: RowStats) -> Tensor:
    """Return (K, N) float64 -log P_k(label), at most `-MIN_LOGP`."""
    # Finite also for a label of probability 0: inf - inf in a softmax would be NaN.
    return -stats.label_logp_KN.double().clamp(min=MIN_LOGP)


WEIGHTINGS: dict[str, type[Weighting]] = {
    "uniform": Uniform,
    "fixed": Fixed,
    "domain_weights": DomainWeights,
    "route": Route,
    "best_single": BestSingle,
    "entropy": Entropy,
    "calibrated_entropy": CalibratedEntropy,
    "consensus": Consensus,
    "prefix_likelihood": PrefixLikelihood,
    "gate": Gate,
    # Baselines: with the label in the target, its NLL does not rank the teachers.
    "ca_mkd": ConfidenceAware,
    "min_ce": MinCE,
    "avg_ce": AvgCE,
}
"""Name in a recipe -> option class."""
