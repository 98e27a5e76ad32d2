"""Isotonic regression of the NLL on the entropy, one increasing map per teacher.

Shapes: N rows of the calibration split, M knots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collegium.fusion.weights import RowStats

MAX_KNOTS = 32
"""Knots of a fitted map: enough for its shape, few enough to read in a recipe."""


def pool_adjacent_violators(value_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """Return the nondecreasing sequence closest to `value_N` in (weighted) squares: (N,) float64.

    Adjacent values that are out of order are replaced by their mean until none are.

    Source: Ayer et al. 1955.
    """
    weights = [1.0] * len(value_N) if weight_N is None else weight_N.tolist()
    blocks: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(value_N.tolist(), weights, strict=True):
        mean, total, count = value, weight, 1
        while blocks and blocks[-1][0] >= mean:
            left_mean, left_total, left_count = blocks.pop()
            mean = (left_mean * left_total + mean * total) / (left_total + total)
            total, count = left_total + total, left_count + count
        blocks.append((mean, total, count))
    means = [mean for mean, _, count in blocks for _ in range(count)]
    return torch.tensor(means, dtype=torch.float64)


def fit_entropy_maps(
    stats: RowStats, teachers: Sequence[str], *, max_knots: int = MAX_KNOTS
) -> dict[str, list[tuple[float, float]]]:
    """Fit an increasing map H -> E[NLL | H] per teacher, as knots (entropy, NLL) in nats.

    Entropies ascend. Rows are binned by entropy into bins of equal mass, and the bins' mean NLL is
    made nondecreasing. An overconfident teacher has a map far above the diagonal. A teacher whose
    entropy carries no information has a flat one.

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
    pairs = zip(entropy_M.tolist(), pool_adjacent_violators(nll_M, count_M).tolist(), strict=True)
    # Knots must ascend strictly: equal entropies after rounding keep the last, highest NLL.
    knots: dict[float, float] = {}
    for entropy, nll in pairs:
        knots[round(entropy, 4)] = round(nll, 4)
    return list(knots.items())


def interpolate(entropy_N: Tensor, knots: Sequence[Sequence[float]]) -> Tensor:
    """Interpolate linearly between the knots, constant beyond both ends: (N,) float64."""
    x_M, y_M = torch.tensor(knots, dtype=torch.float64, device=entropy_N.device).T.contiguous()
    # `searchsorted` below needs two knots, but a teacher of constant entropy has one.
    if len(x_M) == 1:
        return y_M.expand(len(entropy_N))
    inside_N = entropy_N.double().clamp(x_M[0], x_M[-1])
    right_N = torch.searchsorted(x_M, inside_N.contiguous()).clamp(1, len(x_M) - 1)
    left_N = right_N - 1
    share_N = (inside_N - x_M[left_N]) / (x_M[right_N] - x_M[left_N])
    return torch.lerp(y_M[left_N], y_M[right_N], share_N)
