"""Label-aware, domain, consensus and gate rules: label use, domain tables, gate features."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

import reference
from collegium.distributions import Answer, HiddenRows
from collegium.fusion.fitted import DomainWeights
from collegium.fusion.fuse import Fusion
from collegium.fusion.gate import Gate, gate_features
from collegium.fusion.options import describe
from collegium.fusion.pools import TeacherReader
from collegium.fusion.rules import AvgCE, ConfidenceAware, Consensus, MinCE, Uniform
from collegium.fusion.weighting import RowStats
from collegium.types import Batch, Head, Rows, domain_number
from fusion_cases import NAMES, WEIGHTING_CASES, fused, make_rows, make_teachers, stats_of
from refusals import check_message, refused

K, V = 3, 6


def _logits(num_rows: int, seed: int = 0, num_teachers: int = K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_teachers, num_rows, V, generator=generator, dtype=torch.float64)


def _cross_entropies(*rows: list[float]) -> RowStats:
    """Statistics where only the label's log-probability matters."""
    logp_KN = -torch.tensor(rows, dtype=torch.float64)
    return RowStats(logp_KN, logp_KN, logp_KN)


@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
def test_only_rules_with_uses_label_depend_on_the_current_label(weighting):
    logits_KNV = _logits(6)
    rows = make_rows(torch.tensor([0, 1, 2, 3, 4, 5]), [0] * 6)
    changed = make_rows(torch.tensor([0, 1, 2, 4, 4, 5]), [0] * 6)
    before, after = (
        fused(Fusion(weighting=weighting), make_teachers(logits_KNV), r).weights_Kn[:, 3]
        for r in (rows, changed)
    )
    # `min_ce` may select the same teacher for both labels.
    if weighting.uses_label and not isinstance(weighting, MinCE):
        assert not torch.equal(before, after)
    if not weighting.uses_label:
        assert torch.equal(before, after)


def test_min_ce_uses_the_current_label():
    assert MinCE().uses_label
    assert not Gate(offsets={}).uses_label


def test_confidence_aware_weights_equal_those_of_the_paper():
    """Five teachers, one perfect: .2496 against .1876. No weight exceeds 1 / (K - 1)."""
    stats = _cross_entropies([0.0], *[[6.0]] * 4)
    rows = make_rows(torch.zeros(1), [0])
    weights = ConfidenceAware().log_scores(stats, rows, list("abcde")).softmax(0)[:, 0]
    share = 1 / (1 + 4 * math.exp(6))
    assert weights.tolist() == pytest.approx([(1 - share) / 4] + [(1 - (1 - share) / 4) / 4] * 4)


def test_confidence_aware_drops_a_teacher_that_is_certainly_wrong():
    stats = _cross_entropies([1e30, 0.0], [1.0, 1e30], [2.0, 0.0])
    rows = make_rows(torch.zeros(2), [0, 0])
    weights = ConfidenceAware().log_scores(stats, rows, NAMES).softmax(0)
    assert weights[0, 0] == 0
    assert weights[1:, 0].tolist() == pytest.approx([0.5, 0.5])
    assert weights[:, 1].tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_min_ce_selects_the_best_of_each_document_and_shares_ties():
    columns = [1.0, 9.0, 1.0, 1.0, 3.0], [4.0, 4.0, 5.0, 5.0, 2.0], [4.0, 4.0, 1.0, 1.0, 1.0]
    rows = make_rows(torch.zeros(5), [0, 0, 1, 1, 2])
    weights = MinCE().log_scores(_cross_entropies(*columns), rows, NAMES).softmax(0)
    shared = [[0.0, 0.5, 0.5]] * 2 + [[0.5, 0.0, 0.5]] * 2
    assert weights.T.tolist() == [*shared, [0.0, 0.0, 1.0]]


def test_avg_ce_of_fusellm_is_close_to_uniform_and_tau_sharpens_it():
    """CE 2, 2.5 and 3 give .35, .33 and .32."""
    stats = _cross_entropies([2.0], [2.5], [3.0])
    rows = make_rows(torch.zeros(1), [0])
    soft, sharp = (
        AvgCE(tau=tau).log_scores(stats, rows, NAMES).softmax(0)[:, 0] for tau in (None, 0.1)
    )
    assert soft.tolist() == pytest.approx([0.3489, 0.3308, 0.3203], abs=1e-4)
    assert sharp[0] > 0.99


def test_outlier_loses_weight_and_no_divergence_exceeds_log_k():
    logits_KNV = torch.zeros(K, 1, V, dtype=torch.float64)
    logits_KNV[0, 0, 1], logits_KNV[1:, 0, 2] = 200.0, 200.0
    rows = make_rows(torch.zeros(1, dtype=torch.long), [0])
    kl_K = stats_of(make_teachers(logits_KNV), rows).consensus_kl()[:, 0]
    assert kl_K.tolist() == pytest.approx([math.log(3), math.log(1.5), math.log(1.5)])
    block = fused(Fusion(weighting=Consensus(tau=0.1)), make_teachers(logits_KNV), rows)
    assert block.weights_Kn[0, 0] < 1e-2
    single_KN = stats_of(make_teachers(logits_KNV[:1]), rows).consensus_kl()
    assert single_KN.tolist() == [[0.0]]


def test_a_single_head_has_no_divergence_from_itself():
    """Its pool and its values, read twice, must not share a buffer."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(V, 4, generator=generator, dtype=torch.float64)
    # Negative logits: a cross-entropy with them in place of log P would not be clamped to 0.
    bias_V = torch.full((V,), -50.0, dtype=torch.float64)
    answer = Answer("law", HiddenRows(3 * weight_VD[:5], Head(weight_VD, bias_V)))
    reader = TeacherReader([answer], make_rows(torch.zeros(5, dtype=torch.long), [0] * 5), {})
    kl_KN = reader.stats(slice(0, 5), consensus=True).consensus_kl()
    assert float(kl_KN.max()) < 1e-12


def test_equal_teachers_have_no_negative_divergence_from_their_mean():
    logits_KNV = _logits(64)[:1].float().repeat(K, 1, 1) * 3
    rows = make_rows(torch.zeros(64, dtype=torch.long), [0] * 64)
    kl_KN = stats_of(make_teachers(logits_KNV), rows).consensus_kl()
    assert kl_KN.min() == 0
    assert kl_KN.max() < 1e-5


@pytest.mark.parametrize("block_size", [1, 4])
def test_consensus_is_measured_after_the_temperatures(block_size):
    temperatures = {"law": 2.0, "prose": 0.5}
    logits_KNV, rows = _logits(4), make_rows(torch.zeros(4, dtype=torch.long), [0] * 4)
    fusion = Fusion(weighting=Consensus(), temperatures=temperatures)
    block = fused(fusion, make_teachers(logits_KNV), rows, block_size)
    for t in range(4):
        logps = [
            reference.log_softmax(logits_KNV[k, t].tolist(), temperatures.get(name, 1.0))
            for k, name in enumerate(NAMES)
        ]
        expected = reference.softmax([-kl / 0.3 for kl in reference.consensus_kl(logps)])
        assert block.weights_Kn[:, t].tolist() == pytest.approx(expected, abs=1e-12)


def test_consensus_needs_more_than_scalars():
    stats, rows = _cross_entropies([1.0], [2.0]), make_rows(torch.zeros(1), [0])
    with refused(ValueError, "RowStats.consensus_kl: "):
        Consensus().log_scores(stats, rows, NAMES[:2])
    assert RowStats.cat([stats, stats]).consensus_kl_KN is None


def test_domain_uses_its_table_and_other_domains_the_default():
    weighting = DomainWeights(
        weights={"court": {"law": 1.0, "medicine": 0.0, "prose": 0.0}},
        default={"law": 0.2, "medicine": 0.3, "prose": 0.5},
    )
    stats = _cross_entropies([1.0] * 3, [1.0] * 3, [1.0] * 3)
    domains = torch.tensor([domain_number("court"), domain_number("clinic"), 0])
    number = torch.arange(3)
    with_domains, without = (Rows(number, number, number, number, d) for d in (domains, None))
    weights = weighting.log_scores(stats, with_domains, NAMES).softmax(0)
    assert weights.T[0].tolist() == [1.0, 0.0, 0.0]
    for row in weights.T[1:]:
        assert row.tolist() == pytest.approx([0.2, 0.3, 0.5])
    weights = weighting.log_scores(stats, without, NAMES).softmax(0)
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
    stats = stats_of(make_teachers(logits_KNV), rows)
    feature_KNF = gate_features(stats, rows, decay=0.5, with_consensus=True)
    assert feature_KNF.shape == (K, 5, 4)
    assert feature_KNF.sum(0).abs().max() < 1e-12
    assert feature_KNF[:, [0, 3], 3].abs().max() == 0
    nll_KN = -logits_KNV.log_softmax(-1)[:, torch.arange(5), rows.labels]
    decayed_K = 0.25 * nll_KN[:, 0] + 0.5 * nll_KN[:, 1]
    torch.testing.assert_close(feature_KNF[:, 2, 3], decayed_K - decayed_K.mean())


def test_gate_of_zeros_is_uniform_and_offsets_are_log_odds():
    logits_KNV, rows = _logits(4), make_rows(torch.zeros(4, dtype=torch.long), [0] * 4)
    teachers = make_teachers(logits_KNV)
    zeros = Gate(offsets=dict.fromkeys(NAMES, 5.0))
    gate, uniform = (fused(Fusion(weighting=w), teachers, rows) for w in (zeros, Uniform()))
    torch.testing.assert_close(gate.logp(), uniform.logp())
    odds = Gate(offsets={"law": math.log(3.0), "medicine": 0.0, "prose": 0.0})
    weights = fused(Fusion(weighting=odds), teachers, rows).weights_Kn
    torch.testing.assert_close(weights[0] / weights[1], torch.full((4,), 3.0).double())


@pytest.mark.parametrize(
    ("option_class", "options", "path", "kind"),
    [
        (
            DomainWeights,
            {"weights": {"x": {"a": -1.0}}, "default": {"a": 1.0}},
            "weights.x.a",
            "greater_than_equal",
        ),
        (DomainWeights, {"weights": {}}, "default", "missing"),
        (Consensus, {"tau": 0.0}, "tau", "greater_than"),
        (Gate, {}, "offsets", "missing"),
        (Gate, {"offsets": {"a": math.nan}}, "offsets.a", "finite_number"),
        (Gate, {"offsets": {"a": 0.0}, "decay": 1.5}, "decay", "less_than_equal"),
        (ConfidenceAware, {"granularity": "batch"}, "granularity", "literal_error"),
        (AvgCE, {"tau": -1.0}, "tau", "greater_than"),
        (MinCE, {"tau": 1.0}, "tau", "unexpected_keyword_argument"),
    ],
)
def test_invalid_options_are_refused(option_class, options, path, kind):
    with pytest.raises(ValidationError) as caught:
        option_class(**options)
    error = caught.value.errors()[0]
    assert (".".join(map(str, error["loc"])), error["type"]) == (path, kind)


@pytest.mark.parametrize(
    "options",
    [{"weights": {}, "default": {"a": 0.5}}, {"weights": {"x": {"a": 2.0}}, "default": {"a": 1.0}}],
)
def test_weights_of_a_domain_must_sum_to_one(options):
    with pytest.raises(ValidationError) as caught:
        DomainWeights(**options)
    check_message(caught.value.errors()[0]["msg"], "Value error, teacher weights")


def test_descriptions():
    tables = {"court": {"law": 0.75, "prose": 0.25}}
    weighting = DomainWeights(weights=tables, default={"law": 0.5, "prose": 0.5})
    fusion = Fusion(weighting=weighting, pool="power_mean", exponent=0.3)
    assert describe(fusion) == "domain_weights, power_mean(r=0.3)"
    assert describe(Fusion(weighting=AvgCE())) == "avg_ce, linear"
