"""Divergences between target and student, per row, in log space.

Shapes: n rows of one block, S tokens of the support. P is the target, Q the student.
All values are in nats.

Each divergence consists of plain differentiable operations, without temperatures, masks or weights.
Target log-probabilities of -inf are clamped to `LOG_FLOOR`. Their probability is still exactly
zero, and neither values nor gradients become infinite or NaN.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from collegium.options import option, torch

if TYPE_CHECKING:
    from torch import Tensor

LOG_FLOOR = -1e4
"""Smallest log-probability of a target. Its exp is exactly 0, in float64 too."""

Skew = Annotated[float, Field(gt=0, lt=1)]


class Divergence(ABC):
    """A divergence between two distributions per row, on one support of S tokens.

    The support is the vocabulary, or the named tokens of a target and their tail.
    """

    allows_draws: ClassVar[bool] = False
    """True if the value is linear in the target up to a constant, so that draws are unbiased."""
    needs_all_tokens: ClassVar[bool] = False
    """True if the tail of a target cannot count as one token."""

    @abstractmethod
    def __call__(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        """(n, S), (n, S) log-probabilities -> (n,) nats."""


def _kl(logp_nS: Tensor, logq_nS: Tensor) -> Tensor:
    """sum_v p (log p - log q) for finite log-probabilities, 0 where p underflows."""
    return torch.linalg.vecdot(logp_nS.exp(), logp_nS - logq_nS)


def _mix(share: float, logp_nS: Tensor, logq_nS: Tensor) -> Tensor:
    """log(share * p + (1 - share) * q)."""
    # In probability space the log is NaN if both underflow: linkedin/Liger-Kernel#769, #1453.
    return torch.logaddexp(logp_nS + math.log(share), logq_nS + math.log1p(-share))


@option
class ForwardKL(Divergence):
    """KL(P || Q) = sum_v P (log P - log Q). The gradient at the student's logits is Q - P.

    Source: Hinton et al. 2015, arXiv 1503.02531, up to the entropy of P.
    """

    allows_draws: ClassVar[bool] = True

    def __call__(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        return _kl(target_logp_nS.clamp(min=LOG_FLOOR), student_logp_nS)


@option
class ReverseKL(Divergence):
    """KL(Q || P) = sum_v Q (log Q - log P). Mode-seeking, at most -`LOG_FLOOR` if P has zeros.

    Source: MiniLLM, arXiv 2306.08543.
    """

    def __call__(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        return _kl(student_logp_nS, target_logp_nS.clamp(min=LOG_FLOOR))


@option
class JensenShannon(Divergence):
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, at most ln 2.

    Symmetric for beta = 1/2. It vanishes at both ends: divided by beta it approaches KL(P || Q) as
    beta -> 0, divided by 1 - beta it approaches KL(Q || P) as beta -> 1.

    Source: Lin 1991, Divergence measures based on the Shannon entropy; for distillation GKD,
    arXiv 2306.13649.
    """

    beta: Skew = 0.5
    """Share of the target in the mixture."""

    def __call__(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        # Not divided by beta (1 - beta): a beta near 0 or 1 needs a larger learning rate, as in
        # GKD (modelscope/ms-swift#10078).
        target_logp_nS = target_logp_nS.clamp(min=LOG_FLOOR)
        mixture_nS = _mix(self.beta, target_logp_nS, student_logp_nS)
        to_target_n = _kl(target_logp_nS, mixture_nS)
        return self.beta * to_target_n + (1 - self.beta) * _kl(student_logp_nS, mixture_nS)


@option
class SkewedForwardKL(Divergence):
    """KL(P || skew P + (1 - skew) Q), at most -ln skew.

    Source: DistiLLM, arXiv 2402.03898, skew KL.
    """

    skew: Skew = 0.1
    """Share of the target in the mixture that replaces the student."""

    def __call__(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        target_logp_nS = target_logp_nS.clamp(min=LOG_FLOOR)
        return _kl(target_logp_nS, _mix(self.skew, target_logp_nS, student_logp_nS))


@option
class SkewedReverseKL(Divergence):
    """KL(Q || (1 - skew) P + skew Q), at most -ln skew.

    Source: DistiLLM, arXiv 2402.03898, skew reverse KL.
    """

    skew: Skew = 0.1
    """Share of the student in the mixture that replaces the target."""

    def __call__(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        # The gradient flows through the mixture, which DistiLLM-2 detaches.
        target_logp_nS = target_logp_nS.clamp(min=LOG_FLOOR)
        return _kl(student_logp_nS, _mix(self.skew, student_logp_nS, target_logp_nS))


@option
class AdaptiveKL(Divergence):
    """(g_head KL(P || Q) + g_tail KL(Q || P)) / (g_head + g_tail), the weights without gradient.

    The head is the smallest set of most likely tokens of P with a mass of at least `head`. g_head
    and g_tail are sum_v |P - Q| over the head and over all other tokens.

    Source: Wu et al. 2024, arXiv 2404.02657, adaptive KL (AKL).
    """

    head: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Mass of the target in the head."""

    def __call__(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        target_logp_nS = target_logp_nS.clamp(min=LOG_FLOOR)
        forward_n = _kl(target_logp_nS, student_logp_nS)
        reverse_n = _kl(student_logp_nS, target_logp_nS)
        return torch.lerp(reverse_n, forward_n, self._head_share(target_logp_nS, student_logp_nS))

    def _head_share(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        """(n,) g_head / (g_head + g_tail), 1 for equal distributions."""
        target_nS = target_logp_nS.detach().exp()
        gap_nS = (target_nS - student_logp_nS.detach().exp()).abs()
        sorted_nS, order_nS = target_nS.sort(-1, descending=True)
        is_head_nS = sorted_nS.cumsum(-1) - sorted_nS < self.head
        total_n = gap_nS.sum(-1)
        tail_n = gap_nS.gather(-1, order_nS).masked_fill(is_head_nS, 0.0).sum(-1)
        return 1 - tail_n / total_n.masked_fill(total_n == 0, 1.0)


@option
class LogitMSE(Divergence):
    """mean_v ((log P - mean_u log P) - (log Q - mean_u log Q))^2, the MSE of centered logits.

    Logits and log-probabilities differ by a constant per row, which centering removes. It equals
    the limit of 2 T^2 KL(P^(1/T) || Q^(1/T)) as T grows, so the temperature has no effect on its
    product with T^2. All tokens count alike, however unlikely, and the unit is nats squared.

    Source: Ba and Caruana 2014, arXiv 1312.6184; its limit: Hinton et al. 2015, section 2.1.
    """

    needs_all_tokens: ClassVar[bool] = True

    def __call__(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        difference_nS = target_logp_nS.clamp(min=LOG_FLOOR) - student_logp_nS
        return difference_nS.var(-1, correction=0)


@option
class TotalVariation(Divergence):
    """TV(P, Q) = 1/2 sum_v |P(v) - Q(v)|, in [0, 1]; 1 - TV is the acceptance of a draft model.

    Source: Leviathan et al., arXiv 2211.17192, for the acceptance rate of speculative decoding.
    """

    def __call__(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        target_nS = target_logp_nS.clamp(min=LOG_FLOOR).exp()
        return 0.5 * (target_nS - student_logp_nS.exp()).abs().sum(-1)


@option
class AlphaBeta(Divergence):
    """D = -1/(a b) sum_v [P^a Q^b - a/(a+b) P^(a+b) - b/(a+b) Q^(a+b)], with a, b > 0.

    (a, b) -> (1, 0) is forward KL, (0, 1) reverse KL, and (1/2, 1/2) four times the squared
    Hellinger distance. Larger a weighs tokens by the target, larger b by the student.

    Source: ABKD, arXiv 2505.04560.
    """

    alpha: Annotated[float, Field(gt=0)] = 0.2
    """Power of the target."""
    beta: Annotated[float, Field(gt=0)] = 0.7
    """Power of the student."""

    def __call__(self, target_logp_nS: Tensor, student_logp_nS: Tensor) -> Tensor:
        a, b, total = self.alpha, self.beta, self.alpha + self.beta
        target_logp_nS = target_logp_nS.clamp(min=LOG_FLOOR)
        mixed_n = (a * target_logp_nS + b * student_logp_nS).exp().sum(-1)
        target_n = (total * target_logp_nS).exp().sum(-1)
        student_n = (total * student_logp_nS).exp().sum(-1)
        return -(mixed_n - a / total * target_n - b / total * student_n) / (a * b)


DIVERGENCES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "adaptive_kl": AdaptiveKL,
    "skewed_forward_kl": SkewedForwardKL,
    "skewed_reverse_kl": SkewedReverseKL,
    "total_variation": TotalVariation,
    "logit_mse": LogitMSE,
    "alpha_beta": AlphaBeta,
}
"""Name in a recipe -> class."""
