"""Weighting rules without fitted options.

Shapes: N rows (or one block of them), K teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from collegium.fusion.weighting import Carry, Conditions, Fit, RowStats, Weighting
from collegium.options import Tensor, option, torch
from collegium.types import Rows

MIN_ENTROPY = 1e-6
"""Floor in nats for the forms `inverse` and `complement` of `Entropy`.

Towards an entropy of zero, teachers below it get equal weights: the weights stay continuous.
"""
MIN_LOGP = -1e4
"""Floor of a label log-probability as evidence, so that a teacher that excluded it can recover."""
NEGLIGIBLE_DECAY = 1e-20
"""Decay factor below which an earlier row of a document has no effect in float64."""


@option
class Uniform(Weighting):
    """w_k = 1/K."""

    streams = True

    @classmethod
    def candidates(cls, conditions: Conditions) -> Sequence[Fit]:
        return [cls().unchanged]

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        return torch.zeros_like(stats.entropy_KN, dtype=torch.float64)


@option
class BestSingle(Weighting):
    """All the weight on one teacher."""

    streams = True
    is_single = True
    teacher: str
    """Name of the only teacher with weight."""

    @classmethod
    def candidates(cls, conditions: Conditions) -> Sequence[Fit]:
        return [cls(teacher=conditions.best_single).unchanged]

    def teacher_fields(self) -> Mapping[tuple[str, ...], str]:
        return {("teacher",): self.teacher}

    def excludes(self, teacher: str) -> bool:
        return teacher != self.teacher

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        return constant_scores([float(teacher == self.teacher) for teacher in teachers], stats)


@option
class Entropy(Weighting):
    """More weight for a teacher that is more certain: w_k decreases in its entropy H_k.

    softmax: w = softmax_k(-H_k / tau). inverse: w ~ 1 / H_k. complement: w ~ 1 - H_k / sum_j H_j.
    Certainty is not correctness: an overconfident teacher wins under every form.

    Source: arXiv 2507.15198 gives w decreasing in H. The exact forms are ours, `complement` is
    that of entropy-based distillation (EBKD).
    """

    # With one teacher's logits scaled by 4, raw entropy weights gave a fused NLL of 7.55 nats.
    # Uniform weights gave 5.47, and calibrated entropy weights 5.35 (docs/which-fusion.md).

    form: Literal["softmax", "inverse", "complement"] = "softmax"
    """Formula that maps entropies to weights."""
    # NeMo-RL #2797: batch-level weights computed per data-parallel rank differed between ranks.
    granularity: Literal["token", "sequence", "batch"] = "token"
    """Rows to average the entropy over first: none, the row's document, or all rows of the batch.
    `batch` makes the weights depend on the batching."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Entropy difference in nats that changes the odds by a factor of e, for `softmax` only."""

    @model_validator(mode="after")
    def _tau_has_effect(self) -> Entropy:
        if self.form != "softmax" and self.tau != 1.0:
            raise ValueError(
                f"tau: got {self.tau:g} with form `{self.form}`; must be 1 unless the form is "
                "`softmax`; leave it out"
            )
        return self

    @property
    def streams(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.granularity == "token" and self.form != "complement"

    @classmethod
    def candidates(cls, conditions: Conditions) -> Sequence[Fit]:
        rules = [cls(), cls(form="inverse"), cls(form="complement"), cls(granularity="sequence")]
        return [rule.unchanged for rule in rules]

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        entropy_KN = averaged(stats.entropy_KN.double(), rows, self.granularity, stats.answered_KN)
        if self.form == "softmax":
            return -entropy_KN / self.tau
        if self.form == "inverse":
            return -entropy_KN.clamp(min=MIN_ENTROPY).log()
        # One teacher holds all the entropy, so its complement is 0 and the log would be -inf.
        if len(teachers) == 1:
            return torch.zeros_like(entropy_KN)
        if stats.answered_KN is not None:
            entropy_KN = entropy_KN.masked_fill(~stats.answered_KN, 0.0)
        share_KN = entropy_KN / entropy_KN.sum(0).clamp(min=MIN_ENTROPY)
        return torch.log1p(-share_KN.clamp(max=1.0))


@option
class PrefixLikelihood(Weighting):
    """Trust the teacher that predicted the document so far: tempered Bayesian model averaging.

    w_k,t = softmax_k(eta * sum_{s<t} decay^(t-s) log P_k(y_s)) over the earlier rows s of the same
    document, and uniform at its first row. Causal: a row's label never enters its own weight.
    """

    streams = True
    reads_prefix = True
    # On specialists a memory of ten or more tokens gives 5.09 to 5.10 nats, one of two gives 5.52.
    # A large eta selects one teacher and loses averaging: 2.66 nats for eta 1 and 2.53 for uniform
    # weights in a toy with generalists.
    eta: Annotated[float, Field(ge=0)] = 0.3
    """Rate at which evidence becomes weight: 0 is uniform, large values select one teacher."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Decay factor of a row's evidence per row of age."""

    @classmethod
    def candidates(cls, conditions: Conditions) -> Sequence[Fit]:
        # Decay 0.5 is too short: 5.52 nats, 5.09 to 5.10 with these (docs/results/fusion.md).
        options = ((0.1, 0.95), (0.2, 0.95), (0.3, 0.9), (0.5, 0.9))
        return [cls(eta=eta, decay=decay).unchanged for eta, decay in options]

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        return self.stream(stats, rows, teachers, None)[0]

    def stream(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None
    ) -> tuple[Tensor, Carry | None]:
        documents_n = rows.documents
        # `clamp` copies, so the in-place scan below does not touch the statistics.
        evidence_Kn = stats.label_logp_KN.double().clamp(min=MIN_LOGP)
        zero = evidence_Kn.new_zeros(())
        if stats.shared_N is not None:
            # Evidence is comparable only at rows that all teachers of the document answer.
            evidence_Kn = torch.where(stats.shared_N, evidence_Kn, zero)
        carried_K = torch.zeros_like(evidence_Kn[:, 0])
        if carry is not None:
            continues = documents_n[0] == carry.document
            carried_K = torch.where(continues, self.decay * carry.evidence_K, zero)
            evidence_Kn[:, 0] += carried_K
        # C_t = x_t + decay * C_{t-1} within each document, by log2(n) doublings that are vectorized
        # over rows. With decay 0.9 the loop ends after 9 doublings, whatever n is.
        distance = 1
        while distance < evidence_Kn.shape[1] and self.decay**distance > NEGLIGIBLE_DECAY:
            # A document's rows are contiguous, so equal ends mean one document in between.
            # Select instead of multiplying by a mask: a NaN of another document must not leak.
            is_same = documents_n[distance:] == documents_n[:-distance]
            earlier_Kn = self.decay**distance * evidence_Kn[:, :-distance]
            evidence_Kn[:, distance:] += torch.where(is_same, earlier_Kn, zero)
            distance *= 2
        is_same = documents_n[1:] == documents_n[:-1]
        earlier_Kn = torch.where(is_same, self.decay * evidence_Kn[:, :-1], zero)
        score_Kn = self.eta * torch.cat([carried_K[:, None], earlier_Kn], dim=1)
        # Cloned: a view would keep the evidence of the whole block alive.
        return score_Kn, Carry(evidence_Kn[:, -1].clone(), documents_n[-1].clone())


@option
class Consensus(Weighting):
    """Trust the teacher closest to the mean of all: w_k = softmax_k(-KL(P_k || Pbar) / tau).

    Pbar = 1/K sum_k P_k, and KL <= log K nats. An outlier loses weight, whether it is wrong or
    the only one that is right. The weights need two passes over all distributions of a row, so
    each head is applied three times instead of once.
    """

    needs_consensus = True
    tau: Annotated[float, Field(gt=0)] = 0.3
    """Difference in divergence, in nats, that changes the odds by a factor of e."""

    @classmethod
    def candidates(cls, conditions: Conditions) -> Sequence[Fit]:
        is_tried = conditions.is_extended and conditions.has_consensus
        return [cls().unchanged] if is_tried else []

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        # Measured after the teachers' temperatures, like everything in `stats`.
        return -stats.consensus_kl().double() / self.tau


@option
class ConfidenceAware(Weighting):
    """CA-MKD, label-aware: w_k = (1 - softmax_k(CE_k)) / (K - 1), with CE_k = -log P_k(label).

    No weight exceeds 1 / (K - 1), so with many teachers the rule can drop bad ones but hardly
    prefer a good one. It reads the label that it weighs: its target knows more than any teacher,
    and acts like a larger share of cross-entropy.

    Source: Zhang et al., "Confidence-aware multi-teacher knowledge distillation", ICASSP 2022.
    """

    uses_label = True
    # K = 5: one perfect teacher gets .2496 and the others .1876. The label leaks into the target:
    # 2.447 nats in a toy where the true distribution has 2.426.
    granularity: Literal["token", "sequence"] = "token"
    """Rows to average CE_k over first: none, or the row's document."""

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        # Without an answer, a teacher has no share in either sum.
        ce_KN = _mean_ce(stats, rows, self.granularity, missing=-torch.inf)
        if len(ce_KN) == 1:
            return torch.zeros_like(ce_KN)
        # 1 - softmax_k as the share of the others: exact where softmax_k rounds to 1.
        is_self_KK1 = torch.eye(len(ce_KN), dtype=torch.bool, device=ce_KN.device)[:, :, None]
        return ce_KN.masked_fill(is_self_KK1, -torch.inf).logsumexp(1) - ce_KN.logsumexp(0)


@option
class MinCE(Weighting):
    """FuseLLM's MinCE, label-aware: all weight on the teacher of lowest mean CE_k in the document.

    Teachers of equal CE share the weight. The whole document decides, even at its first row.

    Source: Wan et al., "Knowledge fusion of large language models", ICLR 2024.
    """

    uses_label = True

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        ce_KN = _mean_ce(stats, rows, "sequence", missing=torch.inf)
        return torch.zeros_like(ce_KN).masked_fill(ce_KN > ce_KN.amin(0), -torch.inf)


@option
class AvgCE(Weighting):
    """FuseLLM's AvgCE, label-aware: w_k = softmax_k(exp(-CE_k)), or softmax_k(-CE_k / tau).

    CE_k is the mean over the document: its labels decide, even at its first row. FuseLLM's form is
    a softmax over values between 0 and 1, so close to uniform. With `tau` the rule can select.

    Source: Wan et al., "Knowledge fusion of large language models", ICLR 2024; `tau` is ours.
    """

    uses_label = True
    # In FuseLLM's form, CEs of 2, 2.5 and 3 nats give weights of .35, .33 and .32.
    tau: Annotated[float, Field(gt=0)] | None = None
    """Nats per token that change the odds by a factor of e. None for FuseLLM's form."""

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        ce_KN = _mean_ce(stats, rows, "sequence", missing=torch.inf)
        return torch.exp(-ce_KN) if self.tau is None else -ce_KN / self.tau


def _mean_ce(
    stats: RowStats, rows: Rows, granularity: Literal["token", "sequence"], *, missing: float
) -> Tensor:
    """(K, N) float64 mean of -log P_k(label), at most `-MIN_LOGP`; `missing` without an answer."""
    # Finite also for a label of probability 0: inf - inf in a softmax would be NaN.
    ce_KN = -stats.label_logp_KN.double().clamp(min=MIN_LOGP)
    ce_KN = averaged(ce_KN, rows, granularity, stats.answered_KN)
    if stats.answered_KN is None:
        return ce_KN
    return ce_KN.masked_fill(~stats.answered_KN, missing)


def constant_scores(weights: Sequence[float], stats: RowStats) -> Tensor:
    """Return (K, N) log w_k, the same at every row, and -inf for a weight of zero."""
    weight_K = torch.tensor(weights, dtype=torch.float64, device=stats.entropy_KN.device)
    return weight_K.log()[:, None].expand(stats.entropy_KN.shape)


def averaged(
    value_KN: Tensor,
    rows: Rows,
    granularity: Literal["token", "sequence", "batch"],
    answered_KN: Tensor | None,
) -> Tensor:
    """(K, N) values, each replaced by the mean over its row, its document or all rows.

    Rows that a teacher does not answer are left out of its means.
    """
    if granularity == "token":
        return value_KN
    if granularity == "batch" and answered_KN is None:
        return value_KN.mean(1, keepdim=True).expand_as(value_KN)
    documents_N = torch.zeros_like(rows.documents) if granularity == "batch" else rows.documents
    unique_D, place_N = torch.unique_consecutive(documents_N, return_inverse=True)
    one_KN = torch.ones_like(value_KN) if answered_KN is None else answered_KN.to(value_KN.dtype)
    zero_KD = value_KN.new_zeros(len(value_KN), len(unique_D))
    sum_KD = zero_KD.index_add(1, place_N, value_KN * one_KN)
    count_KD = zero_KD.index_add(1, place_N, one_KN)
    return (sum_KD / count_KD.clamp(min=1.0))[:, place_N]
