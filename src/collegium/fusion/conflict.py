"""Disagreement of the teachers at a row, and policies for rows where they disagree.

Shapes: n rows of one block, V vocabulary, K teachers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field

from collegium.options import Tensor, option, torch

MIN_WEIGHT_ENTROPY = 1e-3
"""Floor in nats of H(w): below it one teacher has all the weight, and c would be a noisy ratio."""


@dataclass(frozen=True, slots=True)
class ConflictBlock:
    """Disagreement at n rows and the effect of the policy there."""

    disagreement_n: Tensor
    """(n,) c = JSD_w / H(w) in [0, 1], before the policy."""
    applied_n: Tensor
    """(n,) 1 where the policy changed the target, else 0. For `truth_fallback`, 1 - kd_factor."""
    kd_factor_n: Tensor | None = None
    """(n,) factor on the weight of the divergence, the rest goes to the label. None for all 1."""

    @classmethod
    def of(cls, policy: Conflict, disagreement_n: Tensor, is_changed_n: Tensor) -> ConflictBlock:
        """The effect of a policy on rows with this disagreement and possibly changed weights."""
        if not policy.yields_to_labels:
            return cls(disagreement_n, is_changed_n.to(disagreement_n.dtype))
        kd_factor_n = policy.kd_factor(disagreement_n)
        return cls(disagreement_n, 1.0 - kd_factor_n, kd_factor_n)

    def corrected(self, corrected_n: Tensor | None) -> ConflictBlock:
        """The same with the (n,) rows that `Conflict.correct_` changed, if any changed."""
        if corrected_n is None:
            return self
        return replace(self, applied_n=corrected_n.to(self.applied_n.dtype))


def disagreement(mixture_entropy_n: Tensor, entropy_Kn: Tensor, weights_Kn: Tensor) -> Tensor:
    """Compute c = JSD_w / H(w), JSD_w = H(sum_k w_k P_k) - sum_k w_k H(P_k): (n,) in [0, 1].

    0 where all teachers with weight agree or only one has weight, 1 where supports are disjoint.
    The mixture is the linear pool, even if the target is another pool. Entropies are in nats, and
    each column of the weights sums to 1.
    """
    # JSD and not the entropy of the mixture: teachers that are all uncertain do not disagree.
    jsd_n = mixture_entropy_n - (weights_Kn * entropy_Kn).sum(0)
    weight_entropy_n = torch.special.entr(weights_Kn).sum(0)
    conflict_n = (jsd_n / weight_entropy_n.clamp(min=MIN_WEIGHT_ENTROPY)).clamp(0.0, 1.0)
    # A single teacher has no disagreement, but its two entropies differ by rounding.
    return torch.where(weight_entropy_n > 0, conflict_n, 0.0)


class Conflict:
    """A policy for rows where teachers disagree. Its three methods are no-ops by default."""

    is_active: ClassVar[bool] = True
    """True if the policy needs the disagreement to be measured."""
    uses_label: ClassVar[bool] = False
    """True if a row's label enters its own target, which makes its NLL meaningless."""
    yields_to_labels: ClassVar[bool] = False
    """True if the policy moves weight from the divergence to the cross-entropy."""

    corrects_target: ClassVar[bool] = False
    """True if the policy changes the finished target."""

    def kd_factor(self, disagreement_n: Tensor) -> Tensor:
        """Return the (n,) factor in [0, 1] on the weight of the divergence."""
        return torch.ones_like(disagreement_n)

    def scores(self, score_Kn: Tensor, label_logp_Kn: Tensor, disagreement_n: Tensor) -> Tensor:
        """Return the (K, n) log-weights that replace `score_Kn` in the pool."""
        return score_Kn

    def correct_(self, logp_nV: Tensor, labels_n: Tensor) -> Tensor | None:
        """Correct the finished target in place. Returns (n,) where it changed, None if never."""
        return None


@option
class NoConflictPolicy(Conflict):
    """Use the fused target unchanged, even where the teachers disagree."""

    is_active = False


@option
class TruthFallback(Conflict):
    """Shift weight to the label where teachers disagree: lambda_t = lambda (1 - c)^power.

    The CE weight is 1 - lambda_t. The label changes the loss weights of the row, not its target.
    """

    yields_to_labels = True
    power: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of 1 - c: larger values reduce the teachers' weight faster."""

    def kd_factor(self, disagreement_n: Tensor) -> Tensor:
        return (1.0 - disagreement_n) ** self.power


@option
class TargetCorrection(Conflict):
    """Mix in the label where the target's argmax is wrong, until it leads by `margin`.

    P' = (1 - m) P + m onehot(y), m = (p_max - p_y + margin) / (1 + p_max - p_y). All other tokens
    keep their proportions. Applied to the finished target, after the pooled temperature and that
    of the objective. Label-aware, so the NLL of such a target is meaningless.

    Source: Jin et al., MFT, arXiv 2506.15702.
    """

    uses_label = True
    corrects_target = True
    # The corrected target has an NLL of 1.4, yet its students are slightly worse than without a
    # policy: perplexity 307 against 304, and 290 against 283 (docs/which-fusion.md).
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Probability by which the label leads the runner-up."""

    def correct_(self, logp_nV: Tensor, labels_n: Tensor) -> Tensor:
        label_logp_n = logp_nV.gather(1, labels_n[:, None])[:, 0]
        top_logp_n = logp_nV.amax(-1)
        is_wrong_n = label_logp_n < top_logp_n
        gap_n = top_logp_n.exp() - label_logp_n.exp()
        share_n = torch.where(is_wrong_n, (gap_n + self.margin) / (1.0 + gap_n), 0.0)
        # In log space: the label may have a probability of 0 in P.
        logp_nV += torch.log1p(-share_n)[:, None]
        kept_n = logp_nV.gather(1, labels_n[:, None])[:, 0]
        corrected_n = torch.logaddexp(kept_n, share_n.log())
        logp_nV.scatter_(1, labels_n[:, None], corrected_n[:, None])
        return is_wrong_n


@option
class ConsistentSubset(Conflict):
    """Drop teachers that rule out the label, P_k(y) < share * max_j P_j(y), where c > threshold.

    The others keep their proportions, and the best always stays. Only teachers with weight are
    compared. Label-aware, so the NLL of such a target is meaningless. A block with a dropped
    teacher costs one more application of each head.
    """

    uses_label = True
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Disagreement c above which teachers may be dropped."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Fraction of the best teacher's label probability that a teacher must reach to stay."""

    def scores(self, score_Kn: Tensor, label_logp_Kn: Tensor, disagreement_n: Tensor) -> Tensor:
        # A teacher without weight that knows the label must not exclude all the others.
        has_weight_Kn = score_Kn.softmax(0) > 0
        logp_Kn = label_logp_Kn.double().masked_fill(~has_weight_Kn, -torch.inf)
        min_logp_n = logp_Kn.amax(0) + math.log(self.share)
        is_dropped_Kn = (logp_Kn < min_logp_n) & has_weight_Kn & (disagreement_n > self.threshold)
        return score_Kn.masked_fill(is_dropped_Kn, -torch.inf)


@option
class FollowHighest(Conflict):
    """Follow only the teacher of highest weight, instead of averaging, where c > threshold.

    Teachers of equal weight share it. A block where this applies reads each head once more.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Disagreement c above which a single teacher is followed."""

    def scores(self, score_Kn: Tensor, label_logp_Kn: Tensor, disagreement_n: Tensor) -> Tensor:
        is_lower_Kn = (score_Kn < score_Kn.amax(0)) & (score_Kn.softmax(0) > 0)
        return score_Kn.masked_fill(is_lower_Kn & (disagreement_n > self.threshold), -torch.inf)


CONFLICTS: dict[str, type[Conflict]] = {
    "none": NoConflictPolicy,
    "truth_fallback": TruthFallback,
    "target_correction": TargetCorrection,
    "consistent_subset": ConsistentSubset,
    "follow_highest": FollowHighest,
}
"""Name in a recipe -> option class."""
