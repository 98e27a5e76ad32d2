"""Divergences between target and student, per row, in log space.

Shapes: n rows of one block, V vocabulary. P is the target, Q the student. All values are in nats.

Each divergence consists of plain differentiable operations, without temperatures, masks or weights.
Target log-probabilities of -inf are clamped to `LOG_FLOOR`. Their probability is still exactly
zero, and neither values nor gradients become infinite or NaN.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.types import STRICT, Divergence

LOG_FLOOR = -1e4
"""Smallest log-probability of a target. Its exp is exactly 0, in float64 too."""

Skew = Annotated[float, Field(gt=0, lt=1)]


def _kl(logp_nV: Tensor, logq_nV: Tensor) -> Tensor:
    """sum_v p (log p - log q) for finite log-probabilities, 0 where p underflows."""
    return torch.linalg.vecdot(logp_nV.exp(), logp_nV - logq_nV)


def _mix(share: float, logp_nV: Tensor, logq_nV: Tensor) -> Tensor:
    """log(share * p + (1 - share) * q)."""
    # In probability space the log is NaN if both underflow: linkedin/Liger-Kernel#769, #1453.
    return torch.logaddexp(logp_nV + math.log(share), logq_nV + math.log1p(-share))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ForwardKL:
    """KL(P || Q) = sum_v P (log P - log Q). The gradient at the student's logits is Q - P.

    Source: Hinton et al. 2015, arXiv 1503.02531, up to the entropy of P.
    """

    def __call__(self, target_logp_nV: Tensor, student_logp_nV: Tensor) -> Tensor:
        """(n, V), (n, V) -> (n,)."""
        return _kl(target_logp_nV.clamp(min=LOG_FLOOR), student_logp_nV)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReverseKL:
    """KL(Q || P) = sum_v Q (log Q - log P). Mode-seeking, at most -`LOG_FLOOR` if P has zeros.

    Source: MiniLLM, arXiv 2306.08543.
    """

    def __call__(self, target_logp_nV: Tensor, student_logp_nV: Tensor) -> Tensor:
        """(n, V), (n, V) -> (n,)."""
        return _kl(student_logp_nV, target_logp_nV.clamp(min=LOG_FLOOR))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JensenShannon:
    """(KL(P || M) + KL(Q || M)) / 2 with M = (P + Q) / 2. Symmetric, at most ln 2.

    Source: Lin 1991, Divergence measures based on the Shannon entropy, with equal weights.
    """

    def __call__(self, target_logp_nV: Tensor, student_logp_nV: Tensor) -> Tensor:
        """(n, V), (n, V) -> (n,)."""
        # Equal weights only: a generalized JSD vanishes as its beta approaches 0 or 1 instead of
        # becoming a KL divergence (modelscope/ms-swift#10078).
        target_logp_nV = target_logp_nV.clamp(min=LOG_FLOOR)
        mixture_nV = _mix(0.5, target_logp_nV, student_logp_nV)
        return 0.5 * (_kl(target_logp_nV, mixture_nV) + _kl(student_logp_nV, mixture_nV))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SkewedForwardKL:
    """KL(P || skew P + (1 - skew) Q), at most -ln skew.

    Source: DistiLLM, arXiv 2402.03898, skew KL.
    """

    skew: Skew = 0.1
    """Share of the target in the mixture that replaces the student."""

    def __call__(self, target_logp_nV: Tensor, student_logp_nV: Tensor) -> Tensor:
        """(n, V), (n, V) -> (n,)."""
        target_logp_nV = target_logp_nV.clamp(min=LOG_FLOOR)
        return _kl(target_logp_nV, _mix(self.skew, target_logp_nV, student_logp_nV))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SkewedReverseKL:
    """KL(Q || (1 - skew) P + skew Q), at most -ln skew.

    Source: DistiLLM, arXiv 2402.03898, skew reverse KL.
    """

    skew: Skew = 0.1
    """Share of the student in the mixture that replaces the target."""

    def __call__(self, target_logp_nV: Tensor, student_logp_nV: Tensor) -> Tensor:
        """(n, V), (n, V) -> (n,)."""
        # The gradient flows through the mixture, which DistiLLM-2 detaches.
        target_logp_nV = target_logp_nV.clamp(min=LOG_FLOOR)
        return _kl(student_logp_nV, _mix(self.skew, student_logp_nV, target_logp_nV))


DivergenceOption = ForwardKL | ReverseKL | JensenShannon | SkewedForwardKL | SkewedReverseKL
"""Type of a recipe option that selects a divergence."""

DIVERGENCES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "skewed_forward_kl": SkewedForwardKL,
    "skewed_reverse_kl": SkewedReverseKL,
}
"""Divergences by their names in a recipe."""
