"""Measures of weightings: rank correlation, regret, and the significance of NLL differences.

Shapes: N rows, K teachers, D documents. All values are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.evaluate.intervals import document_interval
from collegium.fusion.fitted import em_weights
from collegium.fusion.gate import DIGITS

# Two teachers of equal entropy differ by 1e-7 where their tokens are summed in another order.
ROUNDING = 1e-6
"""Difference of weights and of nats that counts as none."""


def rank_correlation(weights_KN: Tensor, nll_KN: Tensor) -> float | None:
    """Return the Spearman correlation over the teachers of weight and -NLL, averaged over rows.

    1 means that at every row the better teacher has more weight. Ties share their mean rank. Rows
    whose weights or NLLs are all equal are skipped. None if no row is left.
    """
    weight_KN, quality_KN = _centered_ranks(weights_KN), _centered_ranks(-nll_KN)
    spread_N = (weight_KN.square().sum(0) * quality_KN.square().sum(0)).sqrt()
    has_order_N = spread_N > 0
    if not has_order_N.any():
        return None
    product_N = (weight_KN * quality_KN).sum(0)[has_order_N]
    return float((product_N / spread_N[has_order_N]).mean())


def _centered_ranks(value_KN: Tensor) -> Tensor:
    """Return ranks over the teachers minus their mean, ties sharing a rank: (K, N) float64."""
    # O(K^2 N) comparisons: K is small, and argsort does not average ties.
    difference_KKN = value_KN[:, None] - value_KN[None]
    is_below_KKN = difference_KKN > ROUNDING
    is_equal_KKN = difference_KKN.abs() <= ROUNDING
    rank_KN = is_below_KKN.sum(1).double() + (is_equal_KKN.sum(1).double() - 1) / 2
    return rank_KN - rank_KN.mean(0)


def best_teacher_share(weights_KN: Tensor, nll_KN: Tensor) -> float:
    """Return P(highest weight = best teacher) over the rows.

    Among teachers of equal weight one is drawn at random, in expectation: uniform weights score
    1/K where no two teachers are equally good.
    """
    is_highest_KN = (weights_KN >= weights_KN.amax(0) - ROUNDING).double()
    is_best_KN = nll_KN == nll_KN.amin(0)
    return float(((is_highest_KN * is_best_KN).sum(0) / is_highest_KN.sum(0)).mean())


def regret(nll_N: Tensor, label_logp_KN: Tensor) -> dict[str, float]:
    """Return the NLL of a fused target minus that of the best convex weights in hindsight.

    Returns:
        `constant`: against the best constant weights, fitted by EM on these very rows. May be
        negative. `per_token`: against the best weights at each row, which put everything on the
        best teacher of that row.
    """
    logp_KN = label_logp_KN.double()
    # As in a recipe, where weights are rounded and a weight of 0 excludes its teacher.
    weight_K = logp_KN.new_tensor([round(w, DIGITS) for w in em_weights(logp_KN).tolist()])
    constant_N = -(weight_K.log()[:, None] + logp_KN).logsumexp(0) + weight_K.sum().log()
    nll = float(nll_N.mean())
    return {
        "constant": nll - float(constant_N.mean()),
        "per_token": nll + float(logp_KN.amax(0).mean()),
    }


def difference_interval(
    nll_N: Tensor, other_N: Tensor, samples_N: Tensor
) -> tuple[float, float] | None:
    """Return the 95 % interval of mean NLL minus mean other NLL, by a bootstrap over documents.

    See `document_interval`. None for fewer than two documents.
    """
    _, document_N, count_D = torch.unique(samples_N, return_inverse=True, return_counts=True)
    total_D = torch.zeros(len(count_D), dtype=torch.float64)
    total_D.index_add_(0, document_N, nll_N.double() - other_N.double())
    return document_interval([(total_D.numpy(), count_D.numpy())])
