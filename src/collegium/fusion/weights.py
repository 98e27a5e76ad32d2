"""Weighting rules: map per-row scalars of each teacher to unnormalized log-weights.

Shapes: N rows (or one block of them), K teachers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.errors import RecipeError, nearest
from collegium.types import STRICT, Rows

MIN_ENTROPY = 1e-6
"""Floor in nats for the `inverse` form of `Entropy`. Teachers below it get equal weights."""
MIN_LOGP = -1e4
"""Floor of a label log-probability as evidence, so that a teacher that excluded it can recover."""
NEGLIGIBLE_DECAY = 1e-20
"""Decay factor below which an earlier row of a document has no effect in float64."""


@plain_dataclass(frozen=True, slots=True)
class RowStats:
    """Per-row statistics of each (calibrated) teacher distribution, the input of a weighting."""

    entropy_KN: Tensor
    """(K, N) nats."""
    label_logp_KN: Tensor
    """(K, N) log-probability of the row's label. A causal rule uses it for later rows only."""
    max_logp_KN: Tensor
    """(K, N) log-probability of the most likely token."""
    consensus_kl_KN: Tensor | None = None
    """(K, N) nats, KL(P_k || mean of all P). None unless the rule sets `needs_consensus`."""
    answered_KN: Tensor | None = None
    """(K, N) bool: the teacher answers the row. None for all. Statistics of other rows are 0."""
    shared_N: Tensor | None = None
    """(N,) bool: every teacher answers the row. None for all."""

    @classmethod
    def stack(cls, parts: Sequence[RowStats]) -> RowStats:
        """Stack the (N,) statistics of each teacher into (K, N)."""
        masks = [part.answered_KN for part in parts]
        answered_KN = None
        if any(mask_N is not None for mask_N in masks):
            everywhere_N = torch.ones_like(parts[0].entropy_KN, dtype=torch.bool)
            answered_KN = torch.stack([everywhere_N if m is None else m for m in masks])
        return cls(
            torch.stack([part.entropy_KN for part in parts]),
            torch.stack([part.label_logp_KN for part in parts]),
            torch.stack([part.max_logp_KN for part in parts]),
            answered_KN=answered_KN,
            shared_N=parts[0].shared_N,
        )

    @classmethod
    def cat(cls, parts: Sequence[RowStats]) -> RowStats:
        """Concatenate the statistics of consecutive blocks of rows."""
        kl = [part.consensus_kl_KN for part in parts]
        measured = [kl_Kn for kl_Kn in kl if kl_Kn is not None]
        return cls(
            torch.cat([part.entropy_KN for part in parts], dim=-1),
            torch.cat([part.label_logp_KN for part in parts], dim=-1),
            torch.cat([part.max_logp_KN for part in parts], dim=-1),
            torch.cat(measured, dim=-1) if len(measured) == len(kl) else None,
            _cat_masks([part.answered_KN for part in parts]),
            _cat_masks([part.shared_N for part in parts]),
        )

    def with_nan(self) -> RowStats:
        """The same statistics with NaN at rows without an answer, for reports."""
        if self.answered_KN is None:
            return self
        is_missing_KN = ~self.answered_KN
        return replace(
            self,
            entropy_KN=self.entropy_KN.masked_fill(is_missing_KN, torch.nan),
            label_logp_KN=self.label_logp_KN.masked_fill(is_missing_KN, torch.nan),
            max_logp_KN=self.max_logp_KN.masked_fill(is_missing_KN, torch.nan),
        )

    def consensus_kl(self) -> Tensor:
        """Return `consensus_kl_KN` for a rule that requires it.

        Raises:
            ValueError: it was not measured.
        """
        if self.consensus_kl_KN is None:
            raise ValueError(
                "RowStats.consensus_kl: got None; must be measured for rules with "
                "`needs_consensus`; use `fuse`, scalars of single teachers are not enough"
            )
        return self.consensus_kl_KN


def _cat_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate masks along the rows; all or none of them are given."""
    given = [mask_n for mask_n in masks if mask_n is not None]
    return torch.cat(given, dim=-1) if given else None


@plain_dataclass(frozen=True, slots=True)
class Carry:
    """State that a weighting carries from one block to the next."""

    evidence_K: Tensor
    """(K,) float64: decayed sum of label log-probabilities up to and including the last row."""
    document: Tensor
    """Scalar int64: the document of the last row."""


def check_names(where: str, names: Iterable[str], teachers: Sequence[str]) -> None:
    """Check that every name is a teacher of this run.

    Raises:
        RecipeError: a name is not a teacher.
    """
    for name in names:
        if name not in teachers:
            raise RecipeError(
                f"{where}: got `{name}`; must be the name of a teacher{nearest(name, teachers)}"
            )


class Weighting(ABC):
    """A rule that maps statistics of rows to unnormalized log-weights of teachers.

    A rule *streams* when the score of a teacher depends only on that teacher's statistics up to
    the current row. It is then evaluated inside the loop over blocks, and each head is applied
    once. Other rules see all rows and teachers at once, which costs a first sweep: each head is
    applied twice.
    """

    @property
    @abstractmethod
    def streams(self) -> bool:
        """True if `log_scores` can be called per block and per teacher."""

    @abstractmethod
    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        """Score the teachers at these rows. Weights are the softmax of the scores over K.

        Args:
            stats: (K, n) each, in the order of `teachers`.
            rows: the same n rows, in document order.
            carry: the carry returned for the preceding rows, None at the first.

        Returns:
            (K, n) float64 scores, and the carry for the following rows.
        """

    @property
    def needs_consensus(self) -> bool:
        """True if the rule reads `consensus_kl_KN`, at the cost of two more passes of each head."""
        return False

    @property
    def uses_label(self) -> bool:
        """True if a row's label enters its own weight, which makes the target's NLL meaningless."""
        return False

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        """Options that require one entry per teacher: path inside the options -> table."""
        return {}

    def teacher_fields(self) -> Mapping[tuple[str, ...], str]:
        """Options that hold one teacher's name: path inside the options -> name."""
        return {}

    def domain_names(self) -> Mapping[tuple[str, ...], Sequence[str]]:
        """Options that list domains: path inside the options -> names."""
        return {}

    def names(self) -> frozenset[str]:
        """Names of the teachers that this rule's options mention."""
        listed = {name for table in self.teacher_tables().values() for name in table}
        return frozenset(listed | set(self.teacher_fields().values()))

    def excludes(self, teacher: str) -> bool:
        """True if this teacher's weight is zero at every row, independent of its outputs."""
        return False

    def check(self, teachers: Sequence[str]) -> None:
        """Check that the options name teachers of this run, and all of them where required.

        Raises:
            RecipeError: a name is not a teacher, or a teacher lacks a weight.
        """
        check_names("fusion.weighting", sorted(self.names()), teachers)
        for path, table in self.teacher_tables().items():
            entry = path[0].removesuffix("s")
            for teacher in teachers:
                if teacher not in table:
                    remedy = f"add `{teacher}: 0.0` to leave it out"
                    # Offsets and maps are fitted: 0 would not exclude a teacher there.
                    raise RecipeError(
                        f"fusion.weighting: got no {entry} for teacher `{teacher}`; must give one "
                        "to each; " + ("fit it again" if entry in ("offset", "map") else remedy)
                    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Uniform(Weighting):
    """w_k = 1/K."""

    @property
    def streams(self) -> bool:
        return True

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        return torch.zeros_like(stats.entropy_KN, dtype=torch.float64), None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Fixed(Weighting):
    """One weight per teacher, the same at every row."""

    weights: dict[str, Annotated[float, Field(ge=0)]]
    """Weight by teacher name. The weights sum to 1, and a weight of 0 leaves the teacher out."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> Fixed:
        check_sum_to_one(self.weights)
        return self

    @property
    def streams(self) -> bool:
        return True

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        return {("weights",): self.weights}

    def excludes(self, teacher: str) -> bool:
        return self.weights[teacher] == 0.0

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        weights = [self.weights[teacher] for teacher in teachers]
        return constant_scores(weights, stats), None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BestSingle(Weighting):
    """All the weight on one teacher."""

    teacher: str
    """Name of the only teacher with weight."""

    @property
    def streams(self) -> bool:
        return True

    def teacher_fields(self) -> Mapping[tuple[str, ...], str]:
        return {("teacher",): self.teacher}

    def excludes(self, teacher: str) -> bool:
        return teacher != self.teacher

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        weights = [float(teacher == self.teacher) for teacher in teachers]
        return constant_scores(weights, stats), None


@dataclass(frozen=True, kw_only=True, config=STRICT)
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
    def streams(self) -> bool:
        return self.granularity == "token" and self.form != "complement"

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        entropy_KN = averaged(stats.entropy_KN.double(), rows, self.granularity, stats.answered_KN)
        if self.form == "softmax":
            return -entropy_KN / self.tau, None
        if self.form == "inverse":
            return -entropy_KN.clamp(min=MIN_ENTROPY).log(), None
        # One teacher holds all the entropy, so its complement is 0 and the log would be -inf.
        if len(teachers) == 1:
            return torch.zeros_like(entropy_KN), None
        share_KN = entropy_KN / entropy_KN.sum(0).clamp(min=MIN_ENTROPY)
        return torch.log1p(-share_KN.clamp(max=1.0)), None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrefixLikelihood(Weighting):
    """Trust the teacher that predicted the document so far: tempered Bayesian model averaging.

    w_k,t = softmax_k(eta * sum_{s<t} decay^(t-s) log P_k(y_s)) over the earlier rows s of the same
    document, and uniform at its first row. Causal: a row's label never enters its own weight.
    """

    # On specialists a memory of ten or more tokens gives 5.09 to 5.10 nats, one of two gives 5.52.
    # A large eta selects one teacher and loses averaging: 2.66 nats for eta 1 and 2.53 for uniform
    # weights in a toy with generalists.
    eta: Annotated[float, Field(ge=0)] = 0.3
    """Rate at which evidence becomes weight: 0 is uniform, large values select one teacher."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Decay factor of a row's evidence per row of age."""

    @property
    def streams(self) -> bool:
        return True

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        documents_n = rows.documents
        # `clamp` copies, so the in-place scan below does not touch the statistics.
        evidence_Kn = stats.label_logp_KN.double().clamp(min=MIN_LOGP)
        zero = evidence_Kn.new_zeros(())
        if stats.shared_N is not None:
            # Evidence is comparable only at rows that every teacher answers.
            evidence_Kn = torch.where(stats.shared_N, evidence_Kn, zero)
        carried_K = torch.zeros_like(evidence_Kn[:, 0])
        if carry is not None:
            continues = documents_n[0] == carry.document
            carried_K = torch.where(continues, self.decay * carry.evidence_K, zero)
            evidence_Kn[:, 0] += carried_K
        self._decayed_scan_(evidence_Kn, documents_n)
        score_Kn = torch.empty_like(evidence_Kn)
        score_Kn[:, 0] = carried_K
        is_same = documents_n[1:] == documents_n[:-1]
        score_Kn[:, 1:] = torch.where(is_same, self.decay * evidence_Kn[:, :-1], zero)
        # Cloned: a view would keep the evidence of the whole block alive.
        return self.eta * score_Kn, Carry(evidence_Kn[:, -1].clone(), documents_n[-1].clone())

    def _decayed_scan_(self, evidence_Kn: Tensor, documents_n: Tensor) -> None:
        """C_t = x_t + decay * C_{t-1} within each document, in place, by log2(n) doublings."""
        # Vectorized over rows. With decay 0.9 the loop ends after 9 doublings, whatever n is.
        zero = evidence_Kn.new_zeros(())
        distance = 1
        while distance < evidence_Kn.shape[1] and self.decay**distance > NEGLIGIBLE_DECAY:
            # A document's rows are contiguous, so equal ends mean one document in between.
            # Select instead of multiplying by a mask: a NaN of another document must not leak.
            is_same = documents_n[distance:] == documents_n[:-distance]
            earlier_Kn = self.decay**distance * evidence_Kn[:, :-distance]
            evidence_Kn[:, distance:] += torch.where(is_same, earlier_Kn, zero)
            distance *= 2


def averaged(
    value_KN: Tensor,
    rows: Rows,
    granularity: Literal["token", "sequence", "batch"],
    answered_KN: Tensor | None = None,
) -> Tensor:
    """(K, N) values, each replaced by the mean over its row, its document or all rows.

    Rows that a teacher does not answer are left out of its means.
    """
    if granularity == "token":
        return value_KN
    if granularity == "batch" and answered_KN is None:
        return value_KN.mean(1, keepdim=True).expand_as(value_KN)
    documents_N = torch.zeros_like(rows.documents) if granularity == "batch" else rows.documents
    _, place_N, count_D = torch.unique_consecutive(
        documents_N, return_inverse=True, return_counts=True
    )
    sum_KD = value_KN.new_zeros(value_KN.shape[0], count_D.shape[0])
    if answered_KN is None:
        sum_KD.index_add_(1, place_N, value_KN)
        return (sum_KD / count_D)[:, place_N]
    sum_KD.index_add_(1, place_N, value_KN * answered_KN)
    count_KD = torch.zeros_like(sum_KD).index_add_(1, place_N, answered_KN.to(value_KN.dtype))
    return (sum_KD / count_KD.clamp(min=1.0))[:, place_N]


def constant_scores(weights: Sequence[float], stats: RowStats) -> Tensor:
    """Return (K, N) log w_k, the same at every row, and -inf for a weight of zero."""
    weight_K = torch.tensor(weights, dtype=torch.float64, device=stats.entropy_KN.device)
    return weight_K.log()[:, None].expand(stats.entropy_KN.shape)


def check_sum_to_one(weights: Mapping[str, float]) -> None:
    """Check that the weights sum to 1.

    Raises:
        ValueError: they do not.
    """
    total = math.fsum(weights.values())
    # Loose enough for weights typed with four decimals, such as 0.3333 three times.
    if abs(total - 1.0) > 1e-3:
        values = ", ".join(f"{weight:g}" for weight in weights.values())
        raise ValueError(
            f"teacher weights sum to {total:.2f} ({values}); they must sum to 1; "
            "divide each by their sum"
        )
