"""An increasing map from a teacher's entropy to the NLL that such an entropy has meant so far.

Shapes: N rows of the calibration split, M knots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collegium.fusion.weights import RowStats

MAX_KNOTS = 32
"""Knots that a fitted map keeps: enough for its shape, few enough for a recipe."""


def pool_adjacent_violators(value_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """The nondecreasing sequence closest to `value_N` in (weighted) squares: (N,) float64.

    Neighbors that are out of order are replaced by their mean until none is.

    Source: Ayer et al. 1955.
    """
    weights = [1.0] * len(value_N) if weight_N is None else weight_N.tolist()
    blocks: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(value_N.tolist(), weights, strict=True):
        mean, total, count = value, weight, 1
        while blocks and blocks[-1][0] >= mean:
            before, before_total, before_count = blocks.pop()
            mean = (before * before_total + mean * total) / (before_total + total)
            total, count = before_total + total, before_count + count
        blocks.append((mean, total, count))
    means = [mean for mean, _, count in blocks for _ in range(count)]
    return torch.tensor(means, dtype=torch.float64)


def fit_entropy_maps(
    stats: RowStats, teachers: Sequence[str], *, max_knots: int = MAX_KNOTS
) -> dict[str, list[tuple[float, float]]]:
    """For each teacher the increasing map H -> E[NLL | H] as knots (entropy, NLL), both in nats, entropies ascending.

    Rows are put into bins of equal mass by entropy, and the bins' mean NLL is made nondecreasing: an over-confident teacher has a map far
    above the diagonal, one whose entropy says nothing has a flat one.

    Raises:
        ValueError: there are no rows.
    """
    if stats.entropy_KN.shape[1] == 0:
        raise ValueError("fit_entropy_maps: got no rows; must have some; use a larger split")
    pairs = zip(stats.entropy_KN.double(), -stats.label_logp_KN.double(), strict=True)
    maps = [_knots(entropy_N, nll_N, max_knots) for entropy_N, nll_N in pairs]
    return dict(zip(teachers, maps, strict=True))


def _knots(entropy_N: Tensor, nll_N: Tensor, max_knots: int) -> list[tuple[float, float]]:
    order_N = entropy_N.argsort(stable=True)
    parts = torch.tensor_split(order_N, min(max_knots, len(order_N)))
    entropy_M = torch.stack([entropy_N[part].mean() for part in parts])
    nll_M = torch.stack([nll_N[part].mean() for part in parts])
    count_M = torch.tensor([float(len(part)) for part in parts])
    found = zip(entropy_M.tolist(), pool_adjacent_violators(nll_M, count_M).tolist(), strict=True)
    knots: dict[float, float] = {}
    for entropy, nll in found:
        knots[round(entropy, 4)] = round(nll, 4)
    return list(knots.items())


def interpolate(entropy_N: Tensor, knots: Sequence[Sequence[float]]) -> Tensor:
    """Straight lines between the knots, constant beyond the first and the last: (N,) float64."""
    x_M, y_M = torch.tensor(knots, dtype=torch.float64, device=entropy_N.device).T.contiguous()
    if len(x_M) == 1:
        return y_M.expand(len(entropy_N))
    inside_N = entropy_N.double().clamp(x_M[0], x_M[-1])
    right_N = torch.searchsorted(x_M, inside_N.contiguous()).clamp(1, len(x_M) - 1)
    left_N = right_N - 1
    share_N = (inside_N - x_M[left_N]) / (x_M[right_N] - x_M[left_N])
    return torch.lerp(y_M[left_N], y_M[right_N], share_N)
