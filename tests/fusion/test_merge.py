"""Fusion of stored draws: weights of live teachers, target and gradient in expectation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from collegium.cache.options import Samples, TopK, capabilities_of
from collegium.distributions import Answer, DenseRows, NamedRows
from collegium.errors import RecipeError
from collegium.fusion.conflict import FollowHighest, TargetCorrection, TruthFallback
from collegium.fusion.fitted import CalibratedEntropy, DomainWeights, Fixed, Route
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.gate import Gate
from collegium.fusion.requirements import check, fusion_requirements
from collegium.fusion.rules import (
    AvgCE,
    BestSingle,
    ConfidenceAware,
    Consensus,
    Entropy,
    MinCE,
    PrefixLikelihood,
    Uniform,
)
from collegium.fusion.weighting import Weighting
from collegium.losses.divergences import ForwardKL
from collegium.types import Rows, domain_number
from fusion_cases import stored_rows
from named_terms import named_terms
from refusals import refused

K, N, V = 3, 12, 17
NAMES = ("code", "law", "prose")
KEPT = (0.8, 1.25, 2.0)
TEMPERATURES = {"code": 1.25, "prose": 2.0}
WEIGHTINGS: list[Weighting] = [
    Uniform(),
    Fixed(weights={"code": 0.7, "law": 0.3, "prose": 0.0}),
    BestSingle(teacher="law"),
    Entropy(),
    Entropy(form="inverse"),
    Entropy(form="complement"),
    Entropy(granularity="sequence"),
    Entropy(granularity="batch"),
    PrefixLikelihood(),
    DomainWeights(
        weights={"a": {"code": 1.0, "law": 0.0, "prose": 0.0}},
        default={"code": 0.2, "law": 0.3, "prose": 0.5},
    ),
    Route(default="law", domains={"a": "prose"}),
    CalibratedEntropy(maps={name: [[0.0, 0.1], [3.0, 2.0 + i]] for i, name in enumerate(NAMES)}),
    ConfidenceAware(),
    MinCE(),
    AvgCE(tau=1.0),
    Gate(offsets={"code": 0.3, "law": 0.0, "prose": -0.1}, entropy=-0.7, prefix_nll=-0.4),
]


def _logits() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return 2 * torch.randn(K, N, V, generator=generator, dtype=torch.float64)


def _rows() -> Rows:
    document = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))
    domains = torch.where(document == 1, domain_number("a"), domain_number("b"))
    return Rows(torch.arange(N), labels, document, document, domains)


def _stored(logits_NV: Tensor, labels_N: Tensor, *, seed: int, draws: int = 24) -> NamedRows:
    codec = Samples(draws=draws)
    return stored_rows(logits_NV, labels_N, codec, temperatures=KEPT, seed=seed)


def _dense(fusion: Fusion, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Target (N, V) of live teachers, and the weights (K, N)."""
    answers = [Answer(name, DenseRows(x)) for name, x in zip(NAMES, logits, strict=True)]
    block = fuse(fusion, answers, rows).block(slice(0, N))
    assert block.weights_Kn is not None
    return block.logp(), block.weights_Kn


def _merged(fusion: Fusion, stored: list[NamedRows], rows: Rows) -> tuple[NamedRows, Tensor]:
    """Target and weights (K, N) of stored teachers."""
    answers = [Answer(name, named) for name, named in zip(NAMES, stored, strict=False)]
    block = fuse(fusion, answers, rows).block(slice(0, len(rows)))
    assert isinstance(block.target, NamedRows)
    assert block.weights_Kn is not None
    return block.target, block.weights_Kn


@pytest.mark.parametrize("temperatures", [{}, TEMPERATURES], ids=["raw", "tempered"])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: type(w).__name__)
def test_weights_equal_those_of_live_teachers(
    weighting: Weighting, temperatures: dict[str, float]
) -> None:
    fusion = Fusion(weighting=weighting, temperatures=temperatures)
    logits, rows = _logits(), _rows()
    stored = [_stored(logits[k], rows.labels, seed=k) for k in range(K)]
    _, weights_KN = _merged(fusion, stored, rows)
    torch.testing.assert_close(weights_KN, _dense(fusion, logits, rows)[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, *KEPT])
def test_statistics_at_a_temperature_are_exact(temperature: float) -> None:
    logits, rows = _logits()[0], _rows()
    scalars = _stored(logits, rows.labels, seed=0).scalars(slice(0, N), temperature)
    assert scalars is not None
    logp = (logits / temperature).log_softmax(1)
    torch.testing.assert_close(scalars[0], torch.special.entr(logp.exp()).sum(1))
    torch.testing.assert_close(scalars[1], logp.gather(1, rows.labels[:, None])[:, 0])
    torch.testing.assert_close(scalars[2], logp.amax(1))


@pytest.mark.parametrize("temperature", KEPT)
def test_reweighted_draws_are_unbiased(temperature: float) -> None:
    """Chi-square of the mean of 6,000 re-weighted targets against P_T."""
    repeats, draws = 6000, 24
    logits_V = _logits()[0, 0]
    stored = _stored(logits_V.repeat(repeats, 1), torch.zeros(repeats, dtype=torch.int64), seed=9)
    mass_E = stored.tempered(temperature).logp.exp()
    mean_V = torch.zeros(V, dtype=torch.float64).index_add_(0, stored.ids, mass_E) / repeats
    p_V, target_V = logits_V.softmax(0), (logits_V / temperature).softmax(0)
    variance_V = (target_V.square() / p_V - target_V.square()) / (repeats * draws)
    # V degrees of freedom, since the targets need not sum to 1: mean 17, and 45 is beyond 99.9 %.
    z_V = (mean_V - target_V) / variance_V.sqrt()
    assert z_V.abs().max() < 4.5
    assert z_V.square().sum() < 45


@pytest.mark.parametrize("temperatures", [{}, TEMPERATURES], ids=["raw", "tempered"])
@pytest.mark.parametrize(
    "weighting", [Uniform(), Entropy(), PrefixLikelihood()], ids=lambda w: type(w).__name__
)
def test_gradient_equals_that_of_the_dense_target_in_expectation(
    weighting: Weighting, temperatures: dict[str, float]
) -> None:
    """Mean over 1,500 independent caches, within five standard errors everywhere."""
    repeats = 1500
    fusion = Fusion(weighting=weighting, temperatures=temperatures)
    logits, rows = _logits(), _rows()
    dense_NV = _dense(fusion, logits, rows)[0]
    student_NV = torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    student_NV.requires_grad_()
    loss = ForwardKL()(dense_NV, student_NV.log_softmax(1)).sum()
    expected_NV = torch.autograd.grad(loss, student_NV)[0]
    document = rows.documents + 3 * torch.arange(repeats)[:, None]
    label = rows.labels.repeat(repeats)
    many = Rows(torch.arange(len(label)), label, document.flatten(), document.flatten())
    kept = [_stored(logits[k].repeat(repeats, 1), label, seed=k) for k in range(K)]
    stored = _merged(fusion, kept, many)[0]
    rebuilt = _stored(dense_NV.repeat(repeats, 1), label, seed=7, draws=72)
    wide = student_NV.detach().repeat(repeats, 1).requires_grad_()
    for target in (stored, rebuilt):
        kl = named_terms(wide.log_softmax(1), label, target)[1].sum()
        gradient = torch.autograd.grad(kl, wide)[0].view(repeats, N, V)
        error_NV = (gradient.mean(0) - expected_NV) / (gradient.std(0) / repeats**0.5)
        assert error_NV.abs().max() < 5
        assert error_NV.square().mean() < 1.5


def test_fusion_that_draws_cannot_give_is_refused() -> None:
    source = capabilities_of("per_teacher", Samples(draws=24), KEPT)
    for change, where in [
        ({"pool": "log_linear"}, "fusion.pool: got log_linear"),
        ({"pool": "power_mean"}, "fusion.pool: got power_mean"),
        ({"pooled_temperature": 0.9}, "fusion.pooled_temperature: got 0.9"),
        ({"conflict": TruthFallback()}, "fusion.conflict: got TruthFallback"),
        ({"conflict": TargetCorrection()}, "fusion.conflict: got TargetCorrection"),
        ({"conflict": FollowHighest()}, "fusion.conflict: got FollowHighest"),
        ({"weighting": Consensus()}, "fusion.weighting: got Consensus"),
        ({"weighting": Gate(offsets={}, consensus=1.0)}, "fusion.weighting: got Gate"),
        ({"temperatures": {"code": 1.3}}, "fusion.temperatures.code: got 1.3"),
    ]:
        fusion = dataclasses.replace(Fusion(), **change)
        with refused(RecipeError, where):
            check(fusion_requirements(fusion), [source])
    for supported in (
        Fusion(temperatures={"code": 1.25 * (1 + 1e-9), "law": 1.0}),
        Fusion(weighting=Entropy(granularity="batch")),
    ):
        check(fusion_requirements(supported), [source])
    top_k = capabilities_of("per_teacher", TopK(), KEPT)
    check(fusion_requirements(Fusion(pool="log_linear", conflict=TruthFallback())), [top_k])


def test_unlikely_draw_excluded_by_a_temperature_gives_a_finite_loss() -> None:
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, 0] = 80.0
    kept = _stored(logits, torch.zeros(1, dtype=torch.int64), seed=0)
    kept = dataclasses.replace(
        kept,
        starts=torch.tensor([0, 2]),
        ids=torch.tensor([0, 3]),
        logp=torch.tensor([0.5, 0.5]).log(),
        token_logp=torch.tensor([0.0, -1000.0]),
    )
    row = Rows(*[torch.zeros(1, dtype=torch.int64)] * 4)
    fusion = Fusion(weighting=Uniform(), temperatures={"code": 0.8})
    target, _ = _merged(fusion, [kept], row)
    kl = named_terms(torch.zeros(1, V).log_softmax(1), row.labels, target)[1]
    assert torch.isfinite(kl).all()
    assert target.ids.tolist() == [0]
