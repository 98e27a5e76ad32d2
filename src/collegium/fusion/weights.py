"""Which teacher to trust on which row: weighting rules, from scalars per row to unnormalized log-weights.

Shapes: N rows (or one block of them), K teachers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.errors import RecipeError, nearest
from collegium.types import STRICT, Rows

MIN_ENTROPY = 1e-6
"""Nats below which the `inverse` form of `Entropy` tells two teachers no longer apart."""
MIN_LOGP = -1e4
"""Floor of one label's log-probability as evidence: a teacher that excluded it can recover later."""
NEGLIGIBLE_DECAY = 1e-20
"""Factor below which an earlier row of a document no longer counts in float64."""


@plain_dataclass(frozen=True, slots=True)
class RowStats:
    """What a weighting may know about each teacher's (calibrated) distribution at each row."""

    entropy_KN: Tensor
    """(K, N) nats."""
    label_logp_KN: Tensor
    """(K, N) log-probability of the row's label; a rule may use it for later rows only."""
    max_logp_KN: Tensor
    """(K, N) log-probability of the most likely token."""
    consensus_kl_KN: Tensor | None = None
    """(K, N) nats, KL(P_k || mean of all P); None unless a rule asked for it."""

    @classmethod
    def stack(cls, parts: Sequence[RowStats]) -> RowStats:
        """Statistics (N,) of each teacher -> (K, N)."""
        return cls(
            torch.stack([part.entropy_KN for part in parts]),
            torch.stack([part.label_logp_KN for part in parts]),
            torch.stack([part.max_logp_KN for part in parts]),
        )

    @classmethod
    def cat(cls, parts: Sequence[RowStats]) -> RowStats:
        """Statistics of consecutive rows -> those of all these rows."""
        kl = [part.consensus_kl_KN for part in parts]
        known = [kl_Kn for kl_Kn in kl if kl_Kn is not None]
        return cls(
            torch.cat([part.entropy_KN for part in parts], dim=-1),
            torch.cat([part.label_logp_KN for part in parts], dim=-1),
            torch.cat([part.max_logp_KN for part in parts], dim=-1),
            torch.cat(known, dim=-1) if len(known) == len(kl) else None,
        )

    def consensus_kl(self) -> Tensor:
        """`consensus_kl_KN`, for rules that cannot do without.

        Raises:
            ValueError: nobody measured it.
        """
        if self.consensus_kl_KN is None:
            raise ValueError(
                "RowStats.consensus_kl: got none; must be measured for rules with `needs_consensus`; "
                "let a FusedTarget read the teachers, scalars of single teachers are not enough"
            )
        return self.consensus_kl_KN


@plain_dataclass(frozen=True, slots=True)
class Carry:
    """What a weighting remembers at the end of a block for the rows that follow."""

    evidence_K: Tensor
    """(K,) float64: decayed sum of label log-probabilities up to and including the last row."""
    document: Tensor
    """Scalar int64: the document of that row."""


def check_names(where: str, names: Iterable[str], teachers: Sequence[str]) -> None:
    """Hold every name against the teachers of the run.

    Raises:
        RecipeError: a name belongs to no teacher.
    """
    for name in names:
        if name not in teachers:
            raise RecipeError(
                f"{where}: got `{name}`; must be the name of a teacher{nearest(name, teachers)}"
            )


class Weighting(ABC):
    """A rule that turns statistics of rows into unnormalized log-weights of teachers.

    A rule *streams* when the score of a teacher needs nothing but that teacher's statistics up to this row:
    it is then evaluated inside the loop over blocks, and each head is applied once. Other rules see all rows
    and all teachers at once, which costs a first sweep: each head is applied twice.
    """

    @property
    @abstractmethod
    def streams(self) -> bool:
        """Whether `log_scores` may be asked block by block and teacher by teacher."""

    @abstractmethod
    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        """Score the teachers at these rows; the weights are the softmax over K of the scores.

        Args:
            stats: (K, n) each, of the teachers named by `teachers`, in that order.
            rows: the same n rows, in document order.
            carry: what this method returned for the rows just before, None at the first.

        Returns:
            (K, n) float64 scores, and the carry for the rows that follow.
        """

    @property
    def needs_consensus(self) -> bool:
        """Whether the rule reads `RowStats.consensus_kl_KN`: two more applications of each head."""
        return False

    @property
    def uses_label(self) -> bool:
        """Whether the label of a row enters its own weight; such a rule cannot be judged by the NLL of its target."""
        return False

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        """The options that must hold an entry for each teacher: path inside the options -> table by teacher."""
        return {}

    def teacher_fields(self) -> Mapping[tuple[str, ...], str]:
        """The options that hold the name of one teacher: path inside the options -> name."""
        return {}

    def domain_names(self) -> Mapping[tuple[str, ...], Sequence[str]]:
        """The options that list domains: path inside the options -> names."""
        return {}

    def names(self) -> frozenset[str]:
        """The teachers that the options of this rule mention."""
        listed = {name for table in self.teacher_tables().values() for name in table}
        return frozenset(listed | set(self.teacher_fields().values()))

    def excludes(self, teacher: str) -> bool:
        """Whether the weight of this teacher is zero at every row, whatever it says."""
        return False

    def check(self, teachers: Sequence[str]) -> None:
        """Hold the names in the options against the teachers of the run.

        Raises:
            RecipeError: a name belongs to no teacher, or a teacher lacks a weight.
        """
        check_names("fusion.weighting", sorted(self.names()), teachers)
        for path, table in self.teacher_tables().items():
            what = path[0].removesuffix("s")
            for teacher in teachers:
                if teacher not in table:
                    remedy = f"add `{teacher}: 0.0` to leave it out"
                    raise RecipeError(
                        f"fusion.weighting: got no {what} for teacher `{teacher}`; must give one to each; "
                        + ("fit it again" if what in ("offset", "map") else remedy)
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
    """Weight of each teacher by name; they sum to 1, and a weight of 0 leaves the teacher out."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> Fixed:
        check_sum(self.weights)
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
    """Name of the teacher that is used alone."""

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
    Certain is not correct: an overconfident teacher wins under every form.

    Source: arXiv 2507.15198 gives w decreasing in H; the exact forms are ours, `complement` is that of
    entropy-based distillation (EBKD).
    """

    form: Literal["softmax", "inverse", "complement"] = "softmax"
    """How a weight follows from the entropies."""
    granularity: Literal["token", "sequence", "batch"] = "token"
    """Over which rows an entropy is averaged first: none, the row's document, all rows of the batch.
    `batch` makes the weights depend on how the rows are batched."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Nats of difference in entropy that change the odds e-fold; of the softmax form only."""

    @model_validator(mode="after")
    def _tau_has_effect(self) -> Entropy:
        if self.form != "softmax" and self.tau != 1.0:
            raise ValueError(
                f"tau: got {self.tau:g} with form `{self.form}`; must be 1 unless the form is `softmax`; "
                "leave it out"
            )
        return self

    @property
    def streams(self) -> bool:
        return self.granularity == "token" and self.form != "complement"

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        entropy_KN = averaged(stats.entropy_KN.double(), rows, self.granularity)
        if self.form == "softmax":
            return -entropy_KN / self.tau, None
        if self.form == "inverse":
            return -entropy_KN.clamp(min=MIN_ENTROPY).log(), None
        if len(teachers) == 1:
            return torch.zeros_like(entropy_KN), None
        share_KN = entropy_KN / entropy_KN.sum(0).clamp(min=MIN_ENTROPY)
        return torch.log1p(-share_KN.clamp(max=1.0)), None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrefixLikelihood(Weighting):
    """Trust the teacher that predicted the document so far: tempered Bayesian model averaging.

    w_k,t = softmax_k(eta * sum_{s<t} decay^(t-s) log P_k(y_s)) over the earlier rows s of the same document; uniform
    at its first row. Causal: the label of a row never enters its own weight.
    """

    eta: Annotated[float, Field(ge=0)] = 0.3
    """How fast evidence turns into weight: 0 is uniform, large values select a single teacher."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Factor on a row's evidence per row of age."""

    @property
    def streams(self) -> bool:
        return True

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        documents_n = rows.documents
        evidence_Kn = stats.label_logp_KN.double().clamp(min=MIN_LOGP)
        zero = evidence_Kn.new_zeros(())
        before_K = torch.zeros_like(evidence_Kn[:, 0])
        if carry is not None:
            continues = documents_n[0] == carry.document
            before_K = torch.where(continues, self.decay * carry.evidence_K, zero)
            evidence_Kn[:, 0] += before_K
        self._scan(evidence_Kn, documents_n)
        score_Kn = torch.empty_like(evidence_Kn)
        score_Kn[:, 0] = before_K
        is_same = documents_n[1:] == documents_n[:-1]
        score_Kn[:, 1:] = torch.where(is_same, self.decay * evidence_Kn[:, :-1], zero)
        return self.eta * score_Kn, Carry(evidence_Kn[:, -1].clone(), documents_n[-1].clone())

    def _scan(self, evidence_Kn: Tensor, documents_n: Tensor) -> None:
        """C_t = x_t + decay * C_{t-1} within each document, in place, by log2(n) doublings.

        A document's rows are contiguous, so rows t - d and t of one document have only its rows between them.
        """
        zero = evidence_Kn.new_zeros(())
        distance = 1
        while distance < evidence_Kn.shape[1] and self.decay**distance > NEGLIGIBLE_DECAY:
            # Selected, not multiplied by a mask: a NaN of another document must not leak.
            is_same = documents_n[distance:] == documents_n[:-distance]
            earlier_Kn = self.decay**distance * evidence_Kn[:, :-distance]
            evidence_Kn[:, distance:] += torch.where(is_same, earlier_Kn, zero)
            distance *= 2


def averaged(
    value_KN: Tensor, rows: Rows, granularity: Literal["token", "sequence", "batch"]
) -> Tensor:
    """(K, N) values, each replaced by the mean over its row, its document or all rows."""
    if granularity == "token":
        return value_KN
    if granularity == "batch":
        return value_KN.mean(1, keepdim=True).expand_as(value_KN)
    _, place_N, count_D = torch.unique_consecutive(
        rows.documents, return_inverse=True, return_counts=True
    )
    sum_KD = value_KN.new_zeros(value_KN.shape[0], count_D.shape[0])
    sum_KD.index_add_(1, place_N, value_KN)
    return (sum_KD / count_D)[:, place_N]


def constant_scores(weights: Sequence[float], stats: RowStats) -> Tensor:
    """log w_k at every row; -inf where a weight is zero."""
    weight_K = torch.tensor(weights, dtype=torch.float64, device=stats.entropy_KN.device)
    return weight_K.log()[:, None].expand(stats.entropy_KN.shape)


def check_sum(weights: Mapping[str, float]) -> None:
    """Hold weights against their sum.

    Raises:
        ValueError: they do not sum to 1.
    """
    total = math.fsum(weights.values())
    if abs(total - 1.0) > 1e-3:
        values = ", ".join(f"{weight:g}" for weight in weights.values())
        raise ValueError(
            f"teacher weights sum to {total:.2f} ({values}); they must sum to 1; "
            f"divide each by their sum"
        )
