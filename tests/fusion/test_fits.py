"""Fitted weights are optimal."""

from __future__ import annotations

import math

import pytest
import torch

import reference
from collegium.fusion.calibration import linear_pool_nll
from collegium.fusion.fits import fit_domain_weights, fit_em_weights, fit_gate
from collegium.fusion.rules import DomainWeights, Gate
from collegium.fusion.weights import BestSingle, Fixed, RowStats, Uniform
from collegium.types import Rows
from fusion_cases import DOMAINS, NAMES, make_rows, make_teachers, stats_of
from refusals import refused

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
    fitted = fit_em_weights(stats, NAMES, num_iterations=7)
    expected = reference.em_weights(stats.label_logp_KN.tolist(), num_iterations=7)
    assert list(fitted.weights.values()) == pytest.approx(expected, abs=1e-6)
    assert list(fitted.weights) == NAMES


@pytest.mark.parametrize("noise", [(0.5, 1.0, 2.0), (1.0, 1.0, 1.0), (0.1, 6.0, 6.0)])
def test_em_weights_are_optimal(noise):
    """At the maximum no teacher gains from more weight: mean_t P_k(y) / P(y) <= 1."""
    stats, rows = _sampled(400, noise=noise)
    fitted = fit_em_weights(stats, NAMES, tolerance=1e-14)
    weight_K = torch.tensor([fitted.weights[name] for name in NAMES], dtype=torch.float64)
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
    fitted = fit_em_weights(stats, NAMES)
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
    fitted = fit_domain_weights(stats, rows, NAMES, domains=[*DOMAINS, "absent"], prior_rows=0.0)
    assert isinstance(fitted, DomainWeights)
    assert list(fitted.weights) == DOMAINS
    for domain, name in zip(DOMAINS, NAMES, strict=True):
        assert fitted.weights[domain][name] > 0.95
        is_here_N = torch.tensor([DOMAINS[int(d) % 3] == domain for d in rows.documents])
        separate = fit_em_weights(RowStats(*[stats.label_logp_KN[:, is_here_N]] * 3), NAMES)
        assert fitted.weights[domain] == pytest.approx(separate.weights, abs=1e-4)
    assert fitted.default == fit_em_weights(stats, NAMES).weights
    overall = Fixed(weights=fitted.default)
    assert _nll(stats, fitted, rows) < _nll(stats, overall, rows) - 0.5


def test_domain_of_few_rows_stays_close_to_the_default():
    stats, rows = _specialists(300)
    few = RowStats(*[stats.label_logp_KN[:, :20]] * 3)
    here = rows.part(slice(0, 20))
    free, shrunk = (
        fit_domain_weights(few, here, NAMES, domains=DOMAINS, prior_rows=prior).weights["court"][
            "law"
        ]
        for prior in (0.0, 1e4)
    )
    assert free > 0.9
    assert shrunk == pytest.approx(0.5, abs=0.05)


def test_rows_without_domains_are_refused():
    stats, rows = _specialists(30)
    bare = Rows(rows.index, rows.labels, rows.documents, rows.samples)
    with refused(ValueError, "fit_domain_weights: "):
        fit_domain_weights(stats, bare, NAMES, domains=DOMAINS)


def _penalized(stats: RowStats, rows: Rows, gate: Gate, ridge: float) -> float:
    """The objective that `fit_gate` maximizes, by plain loops."""
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
    gate = fit_gate(stats, rows, NAMES, ridge=ridge, decay=0.8)
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
    gate = fit_gate(stats, rows, NAMES)
    assert gate.prefix_nll < -0.1
    assert gate.consensus == 0.0  # a feature without spread cannot be fitted
    assert _nll(stats, gate, rows) < _nll(stats, fit_em_weights(stats, NAMES), rows) - 0.3


def test_gate_holds_on_rows_it_was_not_fitted_on():
    fitted_on, rows = _sampled(600, noise=(0.5, 1.0, 2.0))
    elsewhere, other_rows = _sampled(600, noise=(0.5, 1.0, 2.0), seed=1)
    gate = fit_gate(fitted_on, rows, NAMES)
    assert _nll(elsewhere, gate, other_rows) < _nll(elsewhere, Uniform(), other_rows) - 0.02


def test_gate_is_deterministic_and_uniform_under_a_heavy_ridge():
    stats, rows = _sampled(200, noise=(0.5, 1.0, 2.0))
    assert fit_gate(stats, rows, NAMES) == fit_gate(stats, rows, NAMES)
    heavy = fit_gate(stats, rows, NAMES, ridge=1e6)
    assert max(abs(a) for a in heavy.offsets.values()) < 1e-5
    assert abs(heavy.prefix_nll) < 1e-5


def test_fit_without_rows_is_refused():
    none_KN = torch.zeros(3, 0, dtype=torch.float64)
    stats, rows = RowStats(none_KN, none_KN, none_KN, none_KN), _specialists(10)[1]
    rows = Rows(*[column[:0] for column in (rows.index, rows.labels, rows.documents, rows.samples)])
    with refused(ValueError, "fit_em_weights: "):
        fit_em_weights(stats, NAMES)
    with refused(ValueError, "fit_gate: "):
        fit_gate(stats, rows, NAMES)
