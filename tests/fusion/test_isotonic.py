"""Maps from entropy to NLL: isotonic, optimal, and robust to an overconfident teacher."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

import reference
from collegium.fusion.calibration import linear_pool_nll
from collegium.fusion.isotonic import fit_entropy_maps, interpolate, pool_adjacent_violators
from collegium.fusion.rules import CalibratedEntropy
from collegium.fusion.weights import Entropy, RowStats
from fusion_cases import NAMES, make_rows
from refusals import check_message, refused


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_regression_is_the_closest_nondecreasing_sequence(seed):
    """By the minimax formula: g_i = max_{a <= i} min_{b >= i} mean of a..b."""
    generator = torch.Generator().manual_seed(seed)
    value_N = torch.randn(12, generator=generator, dtype=torch.float64)
    weight_N = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1

    def mean(a: int, b: int) -> float:
        part = slice(a, b + 1)
        return float((value_N[part] * weight_N[part]).sum() / weight_N[part].sum())

    expected = [max(min(mean(a, b) for b in range(i, 12)) for a in range(i + 1)) for i in range(12)]
    assert pool_adjacent_violators(value_N, weight_N).tolist() == pytest.approx(expected)


def test_interpolation_is_linear_between_knots_and_constant_beyond():
    knots = [[0.5, 1.0], [1.0, 3.0], [2.0, 3.5]]
    x_N = torch.tensor([0.0, 0.5, 0.6, 1.0, 1.7, 2.0, 9.0])
    expected = [reference.interpolated(x, knots) for x in x_N.tolist()]
    assert interpolate(x_N, knots).tolist() == pytest.approx(expected)
    assert interpolate(x_N, [[1.0, 2.0]]).tolist() == [2.0] * 7


def _stats(num_rows: int, *, seed: int = 0) -> RowStats:
    """Two calibrated teachers and an overconfident one, the first."""
    generator = torch.Generator().manual_seed(seed)
    entropy_KN = 0.2 + 3 * torch.rand(3, num_rows, generator=generator, dtype=torch.float64)
    nll_KN = entropy_KN * (0.5 + torch.rand(3, num_rows, generator=generator, dtype=torch.float64))
    entropy_KN[0] *= 0.1
    return RowStats(entropy_KN, -nll_KN, -entropy_KN)


def test_maps_give_the_mean_nll_at_an_entropy():
    maps = fit_entropy_maps(_stats(2000), NAMES, max_knots=8)
    assert list(maps) == NAMES
    for knots in maps.values():
        assert len(knots) == 8
        assert all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(knots))
    for entropy, nll in maps["prose"]:
        assert nll == pytest.approx(entropy, rel=0.2)
    for entropy, nll in maps["law"]:
        assert nll > 5 * entropy


def test_overconfident_teacher_no_longer_wins():
    stats, held_out = _stats(2000), _stats(500, seed=1)
    rows = make_rows(torch.zeros(500, dtype=torch.long), [0] * 500)
    maps = {
        name: [list(knot) for knot in knots]
        for name, knots in fit_entropy_maps(stats, NAMES).items()
    }
    weighting = CalibratedEntropy(maps=maps)
    calibrated, raw = (
        rule.log_scores(held_out, rows, NAMES)[0].softmax(0).mean(1)
        for rule in (weighting, Entropy())
    )
    assert raw[0] > 0.6
    assert calibrated[0] == pytest.approx(1 / 3, abs=0.05)
    nll = [
        float(linear_pool_nll(held_out, rule, rows, NAMES).mean())
        for rule in (weighting, Entropy())
    ]
    assert nll[0] < nll[1] - 0.05


def test_few_or_equal_rows_still_give_a_map_and_none_are_refused():
    stats = RowStats(*[torch.ones(3, 4, dtype=torch.float64)] * 3)
    assert all(len(knots) == 1 for knots in fit_entropy_maps(stats, NAMES).values())
    empty = RowStats(*[torch.ones(3, 0)] * 3)
    with refused(ValueError, "fit_entropy_maps: "):
        fit_entropy_maps(empty, NAMES)


@pytest.mark.parametrize("knots", [[], [[1.0]], [[1.0, 2.0], [1.0, 3.0]], [[1.0, 2.0], [2.0, 1.0]]])
def test_invalid_maps_are_refused(knots):
    with pytest.raises(ValidationError) as caught:
        CalibratedEntropy(maps={"law": knots})
    check_message(caught.value.errors()[0]["msg"], "Value error, maps: ")
