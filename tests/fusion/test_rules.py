"""What the rules beyond the plain ones promise: who sees a label, which table a domain finds, what the gate reads."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

import reference
from collegium.fusion.describe import describe
from collegium.fusion.pooling import Fusion
from collegium.fusion.rules import (
    AvgCE,
    ConfidenceAware,
    Consensus,
    DomainWeights,
    Gate,
    MinCE,
    gate_features,
)
from collegium.fusion.weights import RowStats, Uniform
from collegium.types import Batch, Rows, domain_number
from fusion_cases import NAMES, WEIGHTING_CASES, fuse, make_rows, make_teachers, stats_of

K, V = 3, 6


def _logits(num_rows: int, seed: int = 0, num_teachers: int = K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_teachers, num_rows, V, generator=generator, dtype=torch.float64)


def _cross_entropies(*rows: list[float]) -> RowStats:
    """Statistics of which only the label's log-probability matters."""
    logp_KN = -torch.tensor(rows, dtype=torch.float64)
    return RowStats(logp_KN, logp_KN, logp_KN)


@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
def test_only_rules_that_say_so_see_the_label_they_weigh(weighting):
    logits_KNV = _logits(6)
    rows = make_rows(torch.tensor([0, 1, 2, 3, 4, 5]), [0] * 6)
    changed = make_rows(torch.tensor([0, 1, 2, 4, 4, 5]), [0] * 6)
    one, other = (
        fuse(Fusion(weighting=weighting), make_teachers(logits_KNV), r).weights_Kn[:, 3]
        for r in (rows, changed)
    )
    # The one that selects may well select the same teacher again.
    if weighting.uses_label and not isinstance(weighting, MinCE):
        assert not torch.equal(one, other)
    if not weighting.uses_label:
        assert torch.equal(one, other)


def test_min_ce_sees_the_label_it_weighs():
    assert MinCE().uses_label
    assert Fusion(weighting=MinCE()).uses_label
    assert not Fusion(weighting=Gate(offsets={})).uses_label


def test_confidence_aware_weights_are_those_of_the_paper():
    """Five teachers, one of them perfect: .2496 against .1876; nobody can get more than 1 / (K - 1)."""
    stats = _cross_entropies([0.0], *[[6.0]] * 4)
    rows = make_rows(torch.zeros(1), [0])
    weights = ConfidenceAware().log_scores(stats, rows, list("abcde"))[0].softmax(0)[:, 0]
    share = 1 / (1 + 4 * math.exp(6))
    assert weights.tolist() == pytest.approx([(1 - share) / 4] + [(1 - (1 - share) / 4) / 4] * 4)


def test_confidence_aware_drops_the_one_that_is_certainly_wrong():
    stats = _cross_entropies([1e30, 0.0], [1.0, 1e30], [2.0, 0.0])
    rows = make_rows(torch.zeros(2), [0, 0])
    weights = ConfidenceAware().log_scores(stats, rows, NAMES)[0].softmax(0)
    assert weights[0, 0] == 0
    assert weights[1:, 0].tolist() == pytest.approx([0.5, 0.5])
    assert weights[:, 1].tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_min_ce_takes_the_best_of_each_document_and_shares_ties():
    stats = _cross_entropies([1.0, 9.0, 1.0, 1.0], [4.0, 4.0, 5.0, 5.0], [4.0, 4.0, 1.0, 1.0])
    rows = make_rows(torch.zeros(4), [0, 0, 1, 1])
    weights = MinCE().log_scores(stats, rows, NAMES)[0].softmax(0)
    assert weights.T.tolist() == [[0.0, 0.5, 0.5]] * 2 + [[0.5, 0.0, 0.5]] * 2


def test_avg_ce_of_fusellm_is_close_to_uniform_and_tau_is_not():
    """CE 2, 2.5 and 3 give .35, .33 and .32."""
    stats = _cross_entropies([2.0], [2.5], [3.0])
    rows = make_rows(torch.zeros(1), [0])
    soft, sharp = (
        AvgCE(tau=tau).log_scores(stats, rows, NAMES)[0].softmax(0)[:, 0] for tau in (None, 0.1)
    )
    assert soft.tolist() == pytest.approx([0.3489, 0.3308, 0.3203], abs=1e-4)
    assert sharp[0] > 0.99


def test_an_outlier_loses_its_vote_and_no_divergence_exceeds_log_k():
    logits_KNV = torch.zeros(K, 1, V, dtype=torch.float64)
    logits_KNV[0, 0, 1], logits_KNV[1:, 0, 2] = 200.0, 200.0
    rows = make_rows(torch.zeros(1, dtype=torch.long), [0])
    kl_K = stats_of(make_teachers(logits_KNV), rows).consensus_kl()[:, 0]
    assert kl_K.tolist() == pytest.approx([math.log(3), math.log(1.5), math.log(1.5)])
    block = fuse(Fusion(weighting=Consensus(tau=0.1)), make_teachers(logits_KNV), rows)
    assert block.weights_Kn[0, 0] < 1e-2
    alone = stats_of(make_teachers(logits_KNV[:1]), rows).consensus_kl()
    assert alone.tolist() == [[0.0]]


@pytest.mark.parametrize("block_size", [1, 4])
def test_consensus_is_taken_after_the_temperatures(block_size):
    temperatures = {"law": 2.0, "prose": 0.5}
    logits_KNV, rows = _logits(4), make_rows(torch.zeros(4, dtype=torch.long), [0] * 4)
    fusion = Fusion(weighting=Consensus(), temperatures=temperatures)
    block = fuse(fusion, make_teachers(logits_KNV), rows, block_size)
    for t in range(4):
        logps = [
            reference.log_softmax(logits_KNV[k, t].tolist(), temperatures.get(name, 1.0))
            for k, name in enumerate(NAMES)
        ]
        expected = reference.softmax([-kl / 0.3 for kl in reference.consensus_kl(logps)])
        assert block.weights_Kn[:, t].tolist() == pytest.approx(expected, abs=1e-12)


def test_scalars_alone_are_not_enough_for_the_consensus():
    stats, rows = _cross_entropies([1.0], [2.0]), make_rows(torch.zeros(1), [0])
    with pytest.raises(ValueError, match="consensus_kl: got none"):
        Consensus().log_scores(stats, rows, NAMES[:2])
    assert RowStats.cat([stats, stats]).consensus_kl_KN is None


def test_a_domain_finds_its_table_and_any_other_the_default():
    weighting = DomainWeights(
        weights={"court": {"law": 1.0, "medicine": 0.0, "prose": 0.0}},
        default={"law": 0.2, "medicine": 0.3, "prose": 0.5},
    )
    stats = _cross_entropies([1.0] * 3, [1.0] * 3, [1.0] * 3)
    domains = torch.tensor([domain_number("court"), domain_number("clinic"), 0])
    number = torch.arange(3)
    with_domains, without = (Rows(number, number, number, number, d) for d in (domains, None))
    weights = weighting.log_scores(stats, with_domains, NAMES)[0].softmax(0)
    assert weights.T[0].tolist() == [1.0, 0.0, 0.0]
    for row in weights.T[1:]:
        assert row.tolist() == pytest.approx([0.2, 0.3, 0.5])
    weights = weighting.log_scores(stats, without, NAMES)[0].softmax(0)
    assert weights[:, 0].tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert not weighting.excludes("medicine")


def test_domains_reach_the_rows_and_every_data_set_agrees_on_their_numbers():
    assert domain_number("court") == domain_number("court") != domain_number("clinic")
    assert 0 < domain_number("") < 2**63
    ids = torch.tensor([[3, 4, 5, 6]])
    domains = torch.tensor([[7, 7, 8, 8]])
    position = torch.tensor([[0, 1, 0, 1]])
    rows = Batch(ids, position, ids, position, domains).rows()
    assert rows.domains is not None
    assert rows.domains.tolist() == [7, 8]
    assert Batch(ids, position, ids, position).rows().domains is None


def test_gate_features_are_centered_and_causal():
    logits_KNV = _logits(5)
    rows = make_rows(torch.tensor([0, 1, 2, 3, 4]), [0, 0, 0, 1, 1])
    feature_KNF = gate_features(stats_of(make_teachers(logits_KNV), rows), rows, decay=0.5)
    assert feature_KNF.shape == (K, 5, 4)
    assert feature_KNF.sum(0).abs().max() < 1e-12
    assert feature_KNF[:, [0, 3], 3].abs().max() == 0
    nll_KN = -logits_KNV.log_softmax(-1)[:, torch.arange(5), rows.labels]
    decayed_K = 0.25 * nll_KN[:, 0] + 0.5 * nll_KN[:, 1]
    torch.testing.assert_close(feature_KNF[:, 2, 3], decayed_K - decayed_K.mean())


def test_a_gate_of_zeros_is_uniform_and_offsets_are_odds():
    logits_KNV, rows = _logits(4), make_rows(torch.zeros(4, dtype=torch.long), [0] * 4)
    teachers = make_teachers(logits_KNV)
    zeros = Gate(offsets=dict.fromkeys(NAMES, 5.0))
    one, other = (fuse(Fusion(weighting=w), teachers, rows) for w in (zeros, Uniform()))
    torch.testing.assert_close(one.logp_nV, other.logp_nV)
    odds = Gate(offsets={"law": math.log(3.0), "medicine": 0.0, "prose": 0.0})
    weights = fuse(Fusion(weighting=odds), teachers, rows).weights_Kn
    torch.testing.assert_close(weights[0] / weights[1], torch.full((4,), 3.0).double())


@pytest.mark.parametrize(
    ("option_class", "options", "message"),
    [
        (DomainWeights, {"weights": {}, "default": {"a": 0.5}}, "sum to 0.50"),
        (DomainWeights, {"weights": {"x": {"a": 2.0}}, "default": {"a": 1.0}}, "sum to 2.00"),
        (DomainWeights, {"weights": {"x": {"a": -1.0}}, "default": {"a": 1.0}}, "equal to 0"),
        (DomainWeights, {"weights": {}}, "default"),
        (Consensus, {"tau": 0.0}, "greater than 0"),
        (Gate, {}, "offsets"),
        (Gate, {"offsets": {"a": math.nan}}, "finite"),
        (Gate, {"offsets": {"a": 0.0}, "decay": 1.5}, "less than or equal to 1"),
        (ConfidenceAware, {"granularity": "batch"}, "sequence"),
        (AvgCE, {"tau": -1.0}, "greater than 0"),
        (MinCE, {"tau": 1.0}, "tau"),
    ],
)
def test_options_refuse(option_class, options, message):
    with pytest.raises(ValidationError, match=message):
        option_class(**options)


def test_descriptions():
    tables = {"court": {"law": 0.75, "prose": 0.25}}
    weighting = DomainWeights(weights=tables, default={"law": 0.5, "prose": 0.5})
    assert describe(Fusion(weighting=weighting, pool="power_mean", exponent=0.3)) == (
        "domain_weights(court/law=0.75, court/prose=0.25, law=0.5, prose=0.5), power_mean(r=0.3)"
    )
    assert describe(Fusion(weighting=AvgCE())) == "avg_ce, linear"
