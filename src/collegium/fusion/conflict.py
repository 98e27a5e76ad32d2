"""What to do where the teachers contradict each other: the disagreement of a row, and policies that act on it.

Shapes: n rows of one block, V vocabulary, K teachers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass as plain_dataclass
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.types import STRICT

MIN_WEIGHT_ENTROPY = 1e-3
"""Nats: below, one teacher has all the weight, nobody is there to contradict it, and a ratio would be noise."""


@plain_dataclass(frozen=True, slots=True)
class ConflictBlock:
    """What a policy saw and did at n rows."""

    disagreement_n: Tensor
    """(n,) c = JSD_w / H(w) in [0, 1], before the policy."""
    applied_n: Tensor
    """(n,) 1 where the policy changed the target, 0 elsewhere; of the truth fallback, the share that went to the label."""
    kd_factor_n: Tensor | None = None
    """(n,) factor on the weight of the divergence; what is missing to 1 goes to the label. None for 1 everywhere."""


def disagreement(mixture_logp_nV: Tensor, entropy_Kn: Tensor, weights_Kn: Tensor) -> Tensor:
    """c = JSD_w / H(w), JSD_w = H(sum_k w_k P_k) - sum_k w_k H(P_k): (n,) in [0, 1].

    0 where all teachers with weight agree or only one has weight, 1 where no token is possible for two of them. Measured on the disagreement
    and not on the entropy of the mixture: teachers that are uncertain together do not contradict each other.

    Args:
        mixture_logp_nV: log of the linear pool, also when the target is another pool.
        entropy_Kn: nats, of each teacher.
        weights_Kn: each column sums to 1.
    """
    mixture_entropy_n = -mixture_logp_nV.exp().mul_(mixture_logp_nV).sum(-1)
    jsd_n = mixture_entropy_n - (weights_Kn * entropy_Kn).sum(0)
    weight_entropy_n = torch.special.entr(weights_Kn).sum(0)
    conflict_n = (jsd_n / weight_entropy_n.clamp(min=MIN_WEIGHT_ENTROPY)).clamp(0.0, 1.0)
    # The two entropies of a single voice are summed differently, and differ by a rounding.
    return torch.where(weight_entropy_n > 0, conflict_n, 0.0)


class Conflict:
    """A policy for rows where teachers disagree; each of its three methods leaves the rows alone by default."""

    @property
    def is_active(self) -> bool:
        """Whether there is anything to measure and to do."""
        return True

    @property
    def uses_label(self) -> bool:
        """Whether the label of a row enters its own target; such a target cannot be judged by its NLL."""
        return False

    @property
    def yields_to_labels(self) -> bool:
        """Whether the policy lowers the weight of the divergence and raises that of the label instead."""
        return False

    def kd_factor(self, disagreement_n: Tensor) -> Tensor:
        """(n,) factor in [0, 1] on the weight of the divergence."""
        return torch.ones_like(disagreement_n)

    def scores(self, score_Kn: Tensor, label_logp_Kn: Tensor, disagreement_n: Tensor) -> Tensor:
        """(K, n) log-weights to pool with instead of `score_Kn`."""
        return score_Kn

    def correct_(self, logp_nV: Tensor, labels_n: Tensor) -> Tensor | None:
        """Change the finished target in place; (n,) where it was changed, None for a policy that never does."""
        return None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoConflictPolicy(Conflict):
    """Teach the fused target as it is, also where the teachers contradict each other."""

    @property
    def is_active(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TruthFallback(Conflict):
    """Listen to the label where the teachers disagree: lambda_t = lambda (1 - c)^power, CE weight 1 - lambda_t.

    The label decides how the row is trained, not what the target is.
    """

    power: Annotated[float, Field(gt=0)] = 1.0
    """How fast trust in the teachers falls with their disagreement c."""

    @property
    def yields_to_labels(self) -> bool:
        return True

    def kd_factor(self, disagreement_n: Tensor) -> Tensor:
        return (1.0 - disagreement_n) ** self.power


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TargetCorrection(Conflict):
    """Where the fused target's most likely token is wrong, mix in just enough of the label: it then leads by `margin`.

    P' = (1 - m) P + m onehot(y), m = (p_max - p_y + margin) / (1 + p_max - p_y). All other tokens keep their proportions. It
    acts on the finished target, after the pooled temperature. Label-aware: such a target cannot be judged by its NLL.

    Source: Jin et al., MFT, arXiv 2506.15702.
    """

    margin: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """By how much probability the label leads the next token."""

    @property
    def uses_label(self) -> bool:
        return True

    def correct_(self, logp_nV: Tensor, labels_n: Tensor) -> Tensor:
        label_logp_n = logp_nV.gather(1, labels_n[:, None])[:, 0]
        top_logp_n = logp_nV.amax(-1)
        is_wrong_n = label_logp_n < top_logp_n
        gap_n = top_logp_n.exp() - label_logp_n.exp()
        share_n = torch.where(is_wrong_n, (gap_n + self.margin) / (1.0 + gap_n), 0.0)
        logp_nV += torch.log1p(-share_n)[:, None]
        kept_n = logp_nV.gather(1, labels_n[:, None])[:, 0]
        corrected_n = torch.logaddexp(kept_n, share_n.log())
        logp_nV.scatter_(1, labels_n[:, None], corrected_n[:, None])
        return is_wrong_n


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConsistentSubset(Conflict):
    """Where c > threshold, drop the teachers that rule out the label: P_k(y) < share * max_j P_j(y).

    The others keep their proportions; the best of them always stays. Only teachers with weight take part. Label-aware: such a target
    cannot be judged by its NLL. Rows where a teacher is dropped cost one more application of each head to their block.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Disagreement c from which teachers may be dropped."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the best teacher's probability of the label, what a teacher must reach to stay."""

    @property
    def uses_label(self) -> bool:
        return True

    def scores(self, score_Kn: Tensor, label_logp_Kn: Tensor, disagreement_n: Tensor) -> Tensor:
        has_weight_Kn = score_Kn.softmax(0) > 0
        logp_Kn = label_logp_Kn.double().masked_fill(~has_weight_Kn, -torch.inf)
        least_n = logp_Kn.amax(0) + math.log(self.share)
        is_dropped_Kn = (logp_Kn < least_n) & has_weight_Kn & (disagreement_n > self.threshold)
        return score_Kn.masked_fill(is_dropped_Kn, -torch.inf)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FollowHighest(Conflict):
    """Where c > threshold, follow the teacher of highest weight alone instead of averaging contradictions.

    Teachers of exactly equal weight share it. Rows where it applies cost one more application of each head to their block.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Disagreement c from which a single teacher is followed."""

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
