"""Fitted weights are optimal, and fitted maps isotonic and robust to an overconfident teacher."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

import reference
from collegium.fusion.calibration import linear_pool_nll
from collegium.fusion.fitted import (
    WEIGHTINGS,
    CalibratedEntropy,
    DomainWeights,
    Fixed,
    Route,
    em_weights,
    interpolate,
    pool_adjacent_violators,
)
from collegium.fusion.gate import Gate
from collegium.fusion.rules import BestSingle, Consensus, Entropy, Uniform
from collegium.fusion.weighting import Conditions, RowStats
from collegium.types import Rows, map_tensors
from fusion_cases import DOMAINS, NAMES, calibration_data, make_rows, make_teachers, stats_of
from refusals import check_message, refused

V = 8


def _sampled(num_rows: int, *, noise: tuple[float, ...], seed: int = 0) -> tuple[RowStats, Rows]:
    """Teachers with the true logits plus noise, of one size per teacher."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth_NV = 1.5 * draw(num_rows, V)
    labels = torch.multinomial(truth_NV.softmax(-1), 1, generator=generator)[:, 0]
    logits = [truth_NV + size * draw(num_rows, V) for size in noise]
    rows = make_rows(labels, [t // 10 for t in range(num_rows)])
    return stats_of(make_teachers(torch.stack(logits)), rows), rows


def _nll(stats: RowStats, weighting, rows: Rows) -> float:
    return float(linear_pool_nll(stats, weighting, rows, NAMES).mean())


def test_em_weights_equal_the_plain_recurrence():
    stats, _ = _sampled(60, noise=(0.5, 1.0, 2.0))
    fitted_K = em_weights(stats.label_logp_KN, num_iterations=7)
    expected = reference.em_weights(stats.label_logp_KN.tolist(), num_iterations=7)
    assert fitted_K.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("noise", [(0.5, 1.0, 2.0), (1.0, 1.0, 1.0), (0.1, 6.0, 6.0)])
def test_em_weights_are_optimal(noise):
    """At the maximum no teacher gains from more weight: mean_t P_k(y) / P(y) <= 1."""
    stats, rows = _sampled(400, noise=noise)
    weight_K = em_weights(stats.label_logp_KN, tolerance=1e-14)
    fitted = Fixed(weights=dict(zip(NAMES, weight_K.tolist(), strict=True)))
    prob_KN = stats.label_logp_KN.exp()
    gain_K = (prob_KN / (weight_K @ prob_KN)).mean(1)
    assert gain_K.max() <= 1 + 1e-3
    assert all(abs(g - 1) < 1e-3 for g, w in zip(gain_K, weight_K, strict=True) if w > 0.01)
    singles = [BestSingle(teacher=name) for name in NAMES]
    nll = _nll(stats, fitted, rows)
    assert all(nll <= _nll(stats, other, rows) + 1e-6 for other in (Uniform(), *singles))
    assert math.fsum(fitted.weights.values()) == pytest.approx(1.0, abs=1e-5)


def test_em_drops_a_useless_teacher_and_stays_finite_for_excluded_labels():
    stats, rows = _sampled(300, noise=(0.2, 0.2, 8.0))
    stats.label_logp_KN[1, ::2] = -torch.inf
    fitted = Fixed.fit(calibration_data(stats, rows))
    assert fitted.weights["prose"] < 0.05
    assert fitted.weights["medicine"] < fitted.weights["law"]
    assert math.isfinite(_nll(stats, fitted, rows))


def _specialists(num_rows: int, *, seed: int = 0) -> tuple[RowStats, Rows]:
    """Each teacher knows one domain; documents cycle through the domains."""
    generator = torch.Generator().manual_seed(seed)
    rows = make_rows(torch.zeros(num_rows, dtype=torch.long), [t // 10 for t in range(num_rows)])
    shape = (3, num_rows)
    logp_KN = -2.5 - torch.rand(shape, generator=generator, dtype=torch.float64)
    own_N = rows.documents % 3
    logp_KN[own_N, torch.arange(num_rows)] += 2.0
    return RowStats(-logp_KN, logp_KN, logp_KN, torch.zeros_like(logp_KN)), rows


def test_domain_weights_find_the_specialists():
    stats, rows = _specialists(300)
    fitted = DomainWeights.fit(
        calibration_data(stats, rows, domains=[*DOMAINS, "absent"]), prior_rows=0.0
    )
    assert isinstance(fitted, DomainWeights)
    assert list(fitted.weights) == DOMAINS
    for domain, name in zip(DOMAINS, NAMES, strict=True):
        assert fitted.weights[domain][name] > 0.95
        is_here_N = torch.tensor([DOMAINS[int(d) % 3] == domain for d in rows.documents])
        separate_K = em_weights(stats.label_logp_KN[:, is_here_N])
        weights = list(fitted.weights[domain].values())
        assert weights == pytest.approx(separate_K.tolist(), abs=1e-4)
    assert fitted.default == Fixed.fit(calibration_data(stats, rows)).weights
    overall = Fixed(weights=fitted.default)
    assert _nll(stats, fitted, rows) < _nll(stats, overall, rows) - 0.5


def test_domain_of_few_rows_stays_close_to_the_default():
    stats, rows = _specialists(300)
    few = RowStats(*[stats.label_logp_KN[:, :20]] * 3)
    here = rows.part(slice(0, 20))
    free, shrunk = (
        DomainWeights.fit(calibration_data(few, here), prior_rows=prior).weights["court"]["law"]
        for prior in (0.0, 1e4)
    )
    assert free > 0.9
    assert shrunk == pytest.approx(0.5, abs=0.05)


def test_rows_without_domains_are_refused():
    stats, rows = _specialists(30)
    bare = Rows(rows.index, rows.labels, rows.documents, rows.samples)
    with refused(ValueError, "calibration: "):
        DomainWeights.fit(calibration_data(stats, bare))


def _penalized(stats: RowStats, rows: Rows, gate: Gate, ridge: float) -> float:
    """The objective that `Gate.fit` maximizes, by plain loops."""
    return reference.gate_value(
        {name: column.tolist() for name, column in (
            ("entropy", stats.entropy_KN), ("max_logp", stats.max_logp_KN),
            ("consensus", stats.consensus_kl()), ("label_logp", stats.label_logp_KN),
        )},
        rows.documents.tolist(),
        [gate.offsets[name] for name in NAMES],
        {name: getattr(gate, name) for name in ("entropy", "max_logp", "consensus", "prefix_nll")},
        decay=gate.decay,
        ridge=ridge,
    )  # fmt: skip


@pytest.mark.parametrize("noise", [(0.5, 1.0, 2.0), (1.0, 1.0, 1.0)])
def test_gate_is_a_maximum_along_each_axis(noise):
    stats, rows = _sampled(80, noise=noise)
    ridge = 1e-2
    gate = Gate.fit(calibration_data(stats, rows), ridge=ridge, decay=0.8)
    best = _penalized(stats, rows, gate, ridge)
    assert best > _penalized(stats, rows, Gate(offsets=dict.fromkeys(NAMES, 0.0), decay=0.8), ridge)
    for name in ("entropy", "max_logp", "consensus", "prefix_nll"):
        for step in (-0.02, 0.02):
            moved = Gate(**{**vars(gate), name: getattr(gate, name) + step})
            assert _penalized(stats, rows, moved, ridge) < best + 1e-9
    for name in NAMES:
        for step in (-0.02, 0.02):
            offsets = {**gate.offsets, name: gate.offsets[name] + step}
            moved = Gate(**{**vars(gate), "offsets": offsets})
            assert _penalized(stats, rows, moved, ridge) < best + 1e-9


def test_gate_beats_constant_weights_where_the_prefix_reveals_the_specialist():
    stats, rows = _specialists(600)
    gate = Gate.fit(calibration_data(stats, rows))
    assert gate.prefix_nll < -0.1
    assert gate.consensus == 0.0  # a feature without spread cannot be fitted
    assert (
        _nll(stats, gate, rows) < _nll(stats, Fixed.fit(calibration_data(stats, rows)), rows) - 0.3
    )


def test_gate_holds_on_rows_it_was_not_fitted_on():
    fitted_on, rows = _sampled(600, noise=(0.5, 1.0, 2.0))
    elsewhere, other_rows = _sampled(600, noise=(0.5, 1.0, 2.0), seed=1)
    gate = Gate.fit(calibration_data(fitted_on, rows))
    assert _nll(elsewhere, gate, other_rows) < _nll(elsewhere, Uniform(), other_rows) - 0.02


def test_gate_is_deterministic_and_uniform_under_a_heavy_ridge():
    stats, rows = _sampled(200, noise=(0.5, 1.0, 2.0))
    assert Gate.fit(calibration_data(stats, rows)) == Gate.fit(calibration_data(stats, rows))
    heavy = Gate.fit(calibration_data(stats, rows), ridge=1e6)
    assert max(abs(a) for a in heavy.offsets.values()) < 1e-5
    assert abs(heavy.prefix_nll) < 1e-5


def test_gate_without_a_consensus_does_not_read_it():
    stats, rows = _sampled(80, noise=(0.5, 1.0, 2.0))
    gate = Gate.fit(calibration_data(replace(stats, consensus_kl_KN=None), rows))
    assert gate.consensus == 0.0
    assert not gate.needs_consensus
    assert gate.entropy != 0.0


def test_fit_without_rows_is_refused():
    stats, rows = _specialists(10)
    none = map_tensors(stats, lambda column_KN: column_KN[:, :0])
    with refused(ValueError, "calibration: "):
        calibration_data(none, rows.part(slice(0, 0)))


def test_rules_per_domain_are_tried_only_where_the_split_has_several():
    conditions = Conditions(
        best_single="law", domains=["court"], has_consensus=True, is_extended=True
    )
    tried = {name for name, rule in WEIGHTINGS.items() if rule.candidates(conditions)}
    assert tried == set(WEIGHTINGS) - {"domain_weights", "route", "ca_mkd", "min_ce", "avg_ce"}
    several = replace(conditions, domains=DOMAINS)
    for rule in (DomainWeights, Route):
        assert rule.candidates(several) == [rule.fit]
    assert not Consensus.candidates(replace(conditions, has_consensus=False))


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


def _rows(num_rows: int) -> Rows:
    return make_rows(torch.zeros(num_rows, dtype=torch.long), [0] * num_rows)


def _overconfident(num_rows: int, *, seed: int = 0) -> RowStats:
    """Two calibrated teachers and an overconfident one, the first."""
    generator = torch.Generator().manual_seed(seed)
    entropy_KN = 0.2 + 3 * torch.rand(3, num_rows, generator=generator, dtype=torch.float64)
    nll_KN = entropy_KN * (0.5 + torch.rand(3, num_rows, generator=generator, dtype=torch.float64))
    entropy_KN[0] *= 0.1
    return RowStats(entropy_KN, -nll_KN, -entropy_KN)


def test_maps_give_the_mean_nll_at_an_entropy():
    stats = _overconfident(2000)
    maps = CalibratedEntropy.fit(calibration_data(stats, _rows(2000)), max_knots=8).maps
    assert list(maps) == NAMES
    for knots in maps.values():
        assert len(knots) == 8
        assert all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(knots))
    for entropy, nll in maps["prose"]:
        assert nll == pytest.approx(entropy, rel=0.2)
    for entropy, nll in maps["law"]:
        assert nll > 5 * entropy


def test_overconfident_teacher_no_longer_wins():
    stats, held_out = _overconfident(2000), _overconfident(500, seed=1)
    rows = _rows(500)
    weighting = CalibratedEntropy.fit(calibration_data(stats, _rows(2000)))
    calibrated, raw = (
        rule.log_scores(held_out, rows, NAMES).softmax(0).mean(1) for rule in (weighting, Entropy())
    )
    assert raw[0] > 0.6
    assert calibrated[0] == pytest.approx(1 / 3, abs=0.05)
    nll = [
        float(linear_pool_nll(held_out, rule, rows, NAMES).mean())
        for rule in (weighting, Entropy())
    ]
    assert nll[0] < nll[1] - 0.05


def test_few_or_equal_rows_still_give_a_map():
    stats = RowStats(*[torch.ones(3, 4, dtype=torch.float64)] * 3)
    maps = CalibratedEntropy.fit(calibration_data(stats, _rows(4))).maps
    assert all(len(knots) == 1 for knots in maps.values())


@pytest.mark.parametrize("knots", [[], [[1.0]], [[1.0, 2.0], [1.0, 3.0]], [[1.0, 2.0], [2.0, 1.0]]])
def test_invalid_maps_are_refused(knots):
    with pytest.raises(ValidationError) as caught:
        CalibratedEntropy(maps={"law": knots})
    check_message(caught.value.errors()[0]["msg"], "Value error, maps: ")
