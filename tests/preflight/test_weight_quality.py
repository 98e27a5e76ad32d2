"""Measures of weightings against plain loops and closed-form values."""

from __future__ import annotations

import math

import pytest
import torch

from collegium.preflight.folds import balanced_folds
from collegium.preflight.weight_quality import (
    best_teacher_share,
    difference_interval,
    rank_correlation,
    regret,
)

K, N = 4, 50


def _ranks(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def _spearman(a: list[float], b: list[float]) -> float | None:
    mean = (len(a) - 1) / 2
    x, y = ([rank - mean for rank in _ranks(values)] for values in (a, b))
    spread = math.sqrt(math.fsum(v * v for v in x) * math.fsum(v * v for v in y))
    return math.fsum(p * q for p, q in zip(x, y, strict=True)) / spread if spread else None


def test_rank_correlation_equals_a_plain_loop():
    weights_KN, nll_KN = torch.rand(K, N), torch.rand(K, N)
    # Ties in every third row, and one row without any order.
    weights_KN[:2, ::3] = 0.25
    weights_KN[:, 7] = 0.25
    columns = zip(weights_KN.T.tolist(), (-nll_KN).T.tolist(), strict=True)
    correlations = [value for value in (_spearman(a, b) for a, b in columns) if value is not None]
    assert len(correlations) == N - 1
    expected = math.fsum(correlations) / len(correlations)
    assert rank_correlation(weights_KN, nll_KN) == pytest.approx(expected, abs=1e-9)


def test_rank_correlation_of_right_reversed_and_equal_weights():
    nll_KN = torch.rand(K, N)
    assert rank_correlation(-nll_KN, nll_KN) == pytest.approx(1.0)
    assert rank_correlation(nll_KN, nll_KN) == pytest.approx(-1.0)
    assert rank_correlation(torch.full((K, N), 0.25), nll_KN) is None


def test_highest_weight_and_best_teacher():
    nll_KN = torch.tensor([[1.0, 2.0, 3.0, 1.0], [2.0, 1.0, 1.0, 2.0]])
    weights_KN = torch.tensor([[0.9, 0.9, 0.1, 0.5], [0.1, 0.1, 0.9, 0.5]])
    assert best_teacher_share(weights_KN, nll_KN) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert best_teacher_share(torch.full((K, N), 0.25), torch.rand(K, N)) == pytest.approx(0.25)


def test_regret_is_zero_for_the_best_weights_in_hindsight():
    logp_KN = torch.log(torch.tensor([[0.8, 0.1, 0.7, 0.2], [0.1, 0.6, 0.2, 0.7]]).double())
    best = min(
        -math.fsum(math.log(w / 1000 * a + (1 - w / 1000) * b) for a, b in logp_KN.exp().T.tolist())
        for w in range(1001)
    )
    oracle_N = -logp_KN.amax(0)
    assert regret(torch.tensor([best / 4]), logp_KN)["constant"] == pytest.approx(0.0, abs=1e-5)
    assert regret(oracle_N, logp_KN)["per_token"] == pytest.approx(0.0, abs=1e-12)
    # The best teacher at each row beats every constant mixture.
    assert regret(oracle_N, logp_KN)["constant"] < 0
    assert regret(oracle_N + 0.5, logp_KN)["per_token"] == pytest.approx(0.5)


def test_interval_covers_the_difference_and_cancels_shared_difficulty():
    generator = torch.Generator().manual_seed(0)
    samples_N = torch.arange(400) // 8
    hard_N = 5 * torch.rand(50, generator=generator).repeat_interleave(8)
    noise_N = 0.1 * torch.randn(400, generator=generator)
    interval = difference_interval(hard_N + 0.05 + noise_N, hard_N, samples_N)
    assert interval is not None
    assert interval[0] < 0.05 + float(noise_N.mean()) < interval[1]
    assert interval[1] - interval[0] < 0.03
    assert difference_interval(hard_N, hard_N, samples_N) == (0.0, 0.0)
    assert difference_interval(hard_N, hard_N, samples_N) is not None
    assert difference_interval(hard_N[:8], hard_N[:8], samples_N[:8]) is None
    # Rows of one document are correlated: drawing documents must give a wider interval than rows.
    wobble_N = torch.randn(50, generator=generator).repeat_interleave(8)
    by_document = difference_interval(wobble_N, torch.zeros(400), samples_N)
    by_row = difference_interval(wobble_N, torch.zeros(400), torch.arange(400))
    assert by_document is not None
    assert by_row is not None
    assert by_document[1] - by_document[0] > 2 * (by_row[1] - by_row[0])


def test_folds_split_documents_evenly_by_domain():
    generator = torch.Generator().manual_seed(3)
    lengths_D = torch.randint(1, 60, (40,), generator=generator)
    domain_D = (torch.arange(40) % 4 == 0).long()
    samples_N = torch.arange(40).repeat_interleave(lengths_D)
    domains_N = domain_D.repeat_interleave(lengths_D)
    fold_N = balanced_folds(samples_N, torch.arange(len(samples_N)), domains_N)
    for sample in range(40):
        assert len(fold_N[samples_N == sample].unique()) == 1
    for domain in (0, 1):
        of_domain_N = domains_N == domain
        sizes = [int((of_domain_N & (fold_N == fold)).sum()) for fold in (0, 1)]
        assert abs(sizes[0] - sizes[1]) < 0.1 * sum(sizes)
        assert min(sizes) > 0


def test_folds_split_few_long_documents_by_piece():
    """Otherwise the only document of a domain would be scored under a fit without that domain."""
    samples_N = torch.arange(2).repeat_interleave(60)
    pieces_N = torch.arange(12).repeat_interleave(10)
    fold_N = balanced_folds(samples_N, pieces_N, samples_N)
    for piece in range(12):
        assert len(fold_N[pieces_N == piece].unique()) == 1
    for domain in (0, 1):
        assert int(fold_N[samples_N == domain].sum()) == 30


def test_a_single_piece_leaves_the_second_fold_empty():
    zeros_N = torch.zeros(5, dtype=torch.long)
    assert not balanced_folds(zeros_N, zeros_N, zeros_N).any()
