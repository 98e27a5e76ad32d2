"""What tells weightings apart: do they favor the right teacher, what do they cost, and is a difference more than luck.

Shapes: N rows, K teachers, D documents. All values are in nats.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from collegium.fusion.fits import fit_em_weights
from collegium.fusion.weights import RowStats


def rank_correlation(weights_KN: Tensor, nll_KN: Tensor) -> float | None:
    """Mean over the rows of the Spearman correlation over the teachers of weight and -NLL.

    1: at every token the better teacher has more weight. Equal values share their mean rank. Rows where all weights or all NLL are
    equal say nothing and are left out; None where no row is left.
    """
    weight_KN, quality_KN = _centered_ranks(weights_KN), _centered_ranks(-nll_KN)
    spread_N = (weight_KN.square().sum(0) * quality_KN.square().sum(0)).sqrt()
    has_order_N = spread_N > 0
    if not has_order_N.any():
        return None
    product_N = (weight_KN * quality_KN).sum(0)[has_order_N]
    return float((product_N / spread_N[has_order_N]).mean())


def _centered_ranks(value_KN: Tensor) -> Tensor:
    """Ranks over the teachers, equal values sharing the mean of theirs, minus their mean: (K, N) float64."""
    is_below_KKN = value_KN[:, None] > value_KN[None]
    is_equal_KKN = value_KN[:, None] == value_KN[None]
    rank_KN = is_below_KKN.sum(1).double() + (is_equal_KKN.sum(1).double() - 1) / 2
    return rank_KN - rank_KN.mean(0)


def best_teacher_share(weights_KN: Tensor, nll_KN: Tensor) -> float:
    """P(highest weight = best teacher): share of the rows whose teacher of highest weight has the lowest NLL.

    Teachers of equal weight count as one of them drawn at random: uniform weights score
    1/K where no two teachers are equally good.
    """
    is_highest_KN = (weights_KN == weights_KN.amax(0)).double()
    is_best_KN = nll_KN == nll_KN.amin(0)
    return float(((is_highest_KN * is_best_KN).sum(0) / is_highest_KN.sum(0)).mean())


def regret(nll_N: Tensor, label_logp_KN: Tensor) -> dict[str, float]:
    """NLL of a fused target minus that of the best convex weights in hindsight.

    Returns:
        `constant`: against the best weights that are the same at every row (EM on these very rows); `per_token`: against the best
        weights at each row, which put everything on its best teacher. Negative values are possible for the first alone.
    """
    logp_KN = label_logp_KN.double()
    names = [str(k) for k in range(len(logp_KN))]
    best = fit_em_weights(RowStats(logp_KN, logp_KN, logp_KN), names).weights
    weight_K = logp_KN.new_tensor(list(best.values()))
    constant_N = -(weight_K.log()[:, None] + logp_KN).logsumexp(0) + weight_K.sum().log()
    nll = float(nll_N.mean())
    return {
        "constant": nll - float(constant_N.mean()),
        "per_token": nll + float(logp_KN.amax(0).mean()),
    }


def difference_interval(
    nll_N: Tensor, other_N: Tensor, samples_N: Tensor, *, seed: int = 0, draws: int = 1000
) -> tuple[float, float] | None:
    """95 % interval of mean NLL minus mean other NLL, by drawing documents with replacement; None for fewer than two documents.

    Each draw takes the same documents for both, so what is hard for both cancels out.

    Source: Koehn 2004, "Statistical significance tests for machine translation evaluation".
    """
    _, place_N, count_D = torch.unique(samples_N, return_inverse=True, return_counts=True)
    size = len(count_D)
    if size < 2:
        return None
    total_D = torch.zeros(size, dtype=torch.float64)
    total_D.index_add_(0, place_N, nll_N.double() - other_N.double())
    # How often each document is drawn is all that matters.
    times_dD = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=draws)
    differences = (times_dD @ total_D.numpy()) / (times_dD @ count_D.numpy())
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(low), float(high)
