"""Axioms of the weighting rules, and validation of their options."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from collegium.fusion.fitted import WEIGHTINGS, Fixed, Route
from collegium.fusion.fuse import Fusion
from collegium.fusion.pools import RowReader
from collegium.fusion.rules import BestSingle, Entropy, MinCE, PrefixLikelihood, Uniform
from collegium.fusion.weighting import Carry, RowStats
from collegium.types import Rows
from fusion_cases import (
    NAMES,
    WEIGHTING_CASES,
    fused,
    make_rows,
    make_teachers,
    stats_of,
    temperature_tables,
)
from refusals import check_message

V, K = 6, 3
POOLS = st.sampled_from(["linear", "log_linear", "power_mean"])
RULES = st.sampled_from(WEIGHTING_CASES)
SEEDS = st.integers(0, 10**6)
DOCUMENTS = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(
    lambda lengths: [d for d, length in enumerate(lengths) for _ in range(length)]
)
quick = settings(max_examples=40, deadline=None)


def _zoo(seed: int, documents: list[int]) -> tuple[torch.Tensor, Rows]:
    generator = torch.Generator().manual_seed(seed)
    shape = (K, len(documents), V)
    logits_KNV = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (len(documents),), generator=generator)
    return logits_KNV, make_rows(labels, documents)


def _stats(seed: int, num_rows: int, num_teachers: int = K) -> RowStats:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_teachers, num_rows)
    entropy, logp, top = (
        3 * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return RowStats(entropy, -logp, -top)


@quick
@given(seed=SEEDS, documents=DOCUMENTS, weighting=RULES, pool=POOLS)
def test_weights_are_a_distribution(seed, documents, weighting, pool):
    logits_KNV, rows = _zoo(seed, documents)
    block = fused(Fusion(weighting=weighting, pool=pool), make_teachers(logits_KNV), rows)
    ones = torch.ones(len(rows), dtype=torch.float64)
    torch.testing.assert_close(block.weights_Kn.sum(0), ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(block.logp().exp().sum(1), ones, rtol=0, atol=1e-12)
    named_out = [weighting.excludes(name) for name in NAMES]
    if not isinstance(weighting, (MinCE, Route)):  # those choose
        assert ((block.weights_Kn > 0).all(1) == ~torch.tensor(named_out)).all()
    assert (block.disagreement_n() >= 0).all()


@quick
@given(
    seed=SEEDS, documents=DOCUMENTS, weighting=RULES, pool=POOLS, order=st.permutations(range(K))
)
def test_order_of_teachers_does_not_matter(seed, documents, weighting, pool, order):
    logits_KNV, rows = _zoo(seed, documents)
    fusion = Fusion(weighting=weighting, pool=pool)
    plain = fused(fusion, make_teachers(logits_KNV), rows)
    permuted = fused(fusion, make_teachers(logits_KNV[order], [NAMES[k] for k in order]), rows)
    torch.testing.assert_close(plain.logp(), permuted.logp(), rtol=0, atol=1e-10)
    torch.testing.assert_close(plain.weights_Kn[order], permuted.weights_Kn, rtol=0, atol=1e-12)


@quick
@given(seed=SEEDS, documents=DOCUMENTS, weighting=RULES, pool=POOLS)
def test_clones_equal_a_single_teacher(seed, documents, weighting, pool):
    logits_KNV, rows = _zoo(seed, documents)
    clones_KNV = logits_KNV[:1].expand(K, -1, -1)
    block = fused(Fusion(weighting=weighting, pool=pool), make_teachers(clones_KNV), rows)
    expected_nV = logits_KNV[0].log_softmax(-1)
    torch.testing.assert_close(block.logp(), expected_nV, rtol=0, atol=1e-12)
    assert block.disagreement_n().max() < 1e-12


@quick
@given(seed=SEEDS, documents=DOCUMENTS, weighting=RULES, pool=POOLS)
def test_small_changes_have_small_effects(seed, documents, weighting, pool):
    logits_KNV, rows = _zoo(seed, documents)
    generator = torch.Generator().manual_seed(seed + 1)
    shift_KNV = 1e-7 * torch.randn(logits_KNV.shape, generator=generator, dtype=torch.float64)
    fusion = Fusion(weighting=weighting, pool=pool)
    before, after = (
        fused(fusion, make_teachers(z), rows) for z in (logits_KNV, logits_KNV + shift_KNV)
    )
    assert (before.logp() - after.logp()).abs().max() < 1e-4
    assert (before.weights_Kn - after.weights_Kn).abs().max() < 1e-4


@quick
@given(
    seed=SEEDS,
    form=st.sampled_from(["softmax", "inverse", "complement"]),
    granularity=st.sampled_from(["token", "sequence", "batch"]),
    drop=st.floats(0.01, 0.9),
)
def test_lower_entropy_means_more_weight(seed, form, granularity, drop):
    stats = _stats(seed, num_rows=5)
    rows = make_rows(torch.zeros(5, dtype=torch.long), [0, 0, 1, 1, 1])
    weighting = Entropy(form=form, granularity=granularity)
    surer_KN = stats.entropy_KN.clone()
    surer_KN[1] *= drop
    before, after = (
        weighting.log_scores(RowStats(h, h, h), rows, NAMES).softmax(0)
        for h in (stats.entropy_KN, surer_KN)
    )
    assert (after[1] > before[1]).all()
    assert (after[0] < before[0]).all()


@quick
@given(seed=SEEDS, documents=DOCUMENTS, weighting=RULES, cut=st.integers(1, 20))
def test_streaming_rules_can_be_cut_anywhere(seed, documents, weighting, cut):
    if not weighting.streams:
        return
    stats = _stats(seed, len(documents))
    rows = make_rows(torch.zeros(len(documents), dtype=torch.long), documents)
    whole = weighting.log_scores(stats, rows, NAMES)
    for k, name in enumerate(NAMES):
        parts, carry = [], None
        for start in range(0, len(documents), cut):
            end = start + cut
            columns = (stats.entropy_KN, stats.label_logp_KN, stats.max_logp_KN)
            part = RowStats(*[column[k : k + 1, start:end] for column in columns])
            here = make_rows(rows.labels[start:end], documents[start:end])
            score, carry = weighting.stream(part, here, [name], carry)
            parts.append(score[0])
        torch.testing.assert_close(torch.cat(parts), whole[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 64, 700])
def test_long_documents_equal_the_plain_recurrence(length):
    """S_t = decay * (S_{t-1} + log P(y_{t-1})), for lengths that are powers of two or not."""
    weighting = PrefixLikelihood(eta=0.5, decay=0.9)
    stats = _stats(1, length)
    rows = make_rows(torch.zeros(length, dtype=torch.long), [0] * length)
    score_KN = weighting.log_scores(stats, rows, NAMES)
    evidence = torch.zeros(K, dtype=torch.float64)
    for t in range(length):
        torch.testing.assert_close(score_KN[:, t], 0.5 * evidence, rtol=0, atol=1e-12)
        evidence = 0.9 * (evidence + stats.label_logp_KN[:, t])


@pytest.mark.parametrize("block_size", [2, 3, 9])
def test_prefix_likelihood_resets_at_each_document(block_size):
    logits_KNV, rows = _zoo(3, [4, 4, 4, 1, 1, 1, 9, 9, 9])
    block = fused(Fusion(), make_teachers(logits_KNV), rows, block_size)
    third = torch.full((K,), 1 / 3, dtype=torch.float64)
    for start in (0, 3, 6):
        torch.testing.assert_close(block.weights_Kn[:, start], third, rtol=0, atol=1e-12)
        assert (block.weights_Kn[:, start + 1] - third).abs().max() > 1e-3


def test_prefix_likelihood_does_not_use_the_current_label():
    logits_KNV, rows = _zoo(5, [0] * 6)
    changed = make_rows(rows.labels.clone(), [0] * 6)
    changed.labels[3] = (changed.labels[3] + 1) % V
    before, after = (fused(Fusion(), make_teachers(logits_KNV), r) for r in (rows, changed))
    assert torch.equal(before.weights_Kn[:, :4], after.weights_Kn[:, :4])
    assert not torch.equal(before.weights_Kn[:, 4], after.weights_Kn[:, 4])


@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
def test_order_of_documents_does_not_matter(weighting, pool):
    lengths = [3, 1, 4]
    logits_KNV, rows = _zoo(7, [d for d, length in enumerate(lengths) for _ in range(length)])
    pieces = torch.arange(8).split(lengths)
    expected = fused(Fusion(weighting=weighting, pool=pool), make_teachers(logits_KNV), rows)
    for order in itertools.permutations(range(3)):
        index = torch.cat([pieces[d] for d in order])
        moved = make_rows(rows.labels[index], rows.documents[index].tolist())
        fusion = Fusion(weighting=weighting, pool=pool)
        block = fused(fusion, make_teachers(logits_KNV[:, index]), moved, 3)
        torch.testing.assert_close(block.logp(), expected.logp()[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
def test_nan_in_one_document_does_not_reach_others(weighting, pool):
    if isinstance(weighting, Entropy) and weighting.granularity == "batch":
        pytest.skip("an average over the batch contains every row by definition")
    logits_KNV, rows = _zoo(9, [0, 0, 0, 1, 1, 2, 2, 2])
    fusion = Fusion(weighting=weighting, pool=pool)
    expected = fused(fusion, make_teachers(logits_KNV), rows)
    # A teacher that the rule does not exclude, so that its document does become NaN.
    number = NAMES.index("medicine") if not weighting.excludes("medicine") else 0
    logits_KNV[number, 3] = torch.nan
    for block_size in (2, 8):
        block = fused(fusion, make_teachers(logits_KNV), rows, block_size)
        elsewhere = torch.tensor([0, 1, 2, 5, 6, 7])
        assert block.logp()[3].isnan().any()
        torch.testing.assert_close(
            block.logp()[elsewhere], expected.logp()[elsewhere], rtol=0, atol=1e-12
        )


def test_teacher_recovers_after_it_excluded_a_label():
    label_logp_KN = torch.full((2, 200), -1.0, dtype=torch.float64)
    label_logp_KN[0, 0] = -torch.inf
    stats = RowStats(label_logp_KN, label_logp_KN, label_logp_KN)
    rows = make_rows(torch.zeros(200, dtype=torch.long), [0] * 200)
    weights_KN = PrefixLikelihood().log_scores(stats, rows, NAMES[:2]).softmax(0)
    assert weights_KN.isfinite().all()
    assert weights_KN[0, 1] < 1e-12
    assert weights_KN[0, -1] > 0.4


def test_certain_teachers_have_finite_scores():
    entropy_KN = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    rows = make_rows(torch.zeros(2, dtype=torch.long), [0, 0])
    stats = RowStats(entropy_KN, entropy_KN, entropy_KN)
    for form in ("softmax", "inverse", "complement"):
        weights = Entropy(form=form).log_scores(stats, rows, NAMES[:2]).softmax(0)
        torch.testing.assert_close(weights[:, 0], torch.tensor([0.5, 0.5]).double())
        assert weights[0, 1] > 0.8


def test_inverse_weights_near_zero_entropy_keep_their_ratio():
    entropy_KN = torch.tensor([[1e-5], [1e-3]], dtype=torch.float64)
    rows = make_rows(torch.zeros(1, dtype=torch.long), [0])
    stats = RowStats(entropy_KN, entropy_KN, entropy_KN)
    weights = Entropy(form="inverse").log_scores(stats, rows, NAMES[:2]).softmax(0)
    assert weights[:, 0].tolist() == pytest.approx([100 / 101, 1 / 101])


@pytest.mark.parametrize("form", ["softmax", "inverse", "complement"])
def test_single_teacher_has_a_finite_score(form):
    """Its complement of the total entropy is zero, and the logarithm would be infinite."""
    rows = make_rows(torch.zeros(4, dtype=torch.long), [0] * 4)
    score_KN = Entropy(form=form).log_scores(_stats(0, 4, 1), rows, NAMES[:1])
    assert score_KN.isfinite().all()


def test_eta_zero_is_uniform():
    stats = _stats(0, 4)
    rows = make_rows(torch.zeros(4, dtype=torch.long), [0] * 4)
    score_KN, carry = PrefixLikelihood(eta=0.0).stream(stats, rows, NAMES, None)
    assert (score_KN == 0).all()
    assert isinstance(carry, Carry)


@pytest.mark.parametrize(
    ("option_class", "options", "path", "kind"),
    [
        (Fixed, {"weights": {"a": 1.5, "b": -0.5}}, "weights.b", "greater_than_equal"),
        (Fixed, {}, "weights", "missing"),
        (BestSingle, {}, "teacher", "missing"),
        (Entropy, {"form": "sofmax"}, "form", "literal_error"),
        (Entropy, {"granularity": "document"}, "granularity", "literal_error"),
        (Entropy, {"tau": 0.0}, "tau", "greater_than"),
        (PrefixLikelihood, {"eta": -1.0}, "eta", "greater_than_equal"),
        (PrefixLikelihood, {"eta": float("inf")}, "eta", "finite_number"),
        (PrefixLikelihood, {"decay": 0.0}, "decay", "greater_than"),
        (PrefixLikelihood, {"decay": 1.1}, "decay", "less_than_equal"),
        (Uniform, {"eta": 1.0}, "eta", "unexpected_keyword_argument"),
    ],
)
def test_invalid_options_are_refused(option_class, options, path, kind):
    with pytest.raises(ValidationError) as caught:
        option_class(**options)
    error = caught.value.errors()[0]
    assert (".".join(map(str, error["loc"])), error["type"]) == (path, kind)


@pytest.mark.parametrize(
    ("option_class", "options", "where"),
    [
        (Fixed, {"weights": {"a": 0.5, "b": 0.5, "c": 0.3}}, "teacher weights sum to 1.30"),
        (Fixed, {"weights": {}}, "teacher weights sum to 0.00"),
        (Entropy, {"form": "inverse", "tau": 2.0}, "tau: got 2"),
    ],
)
def test_inconsistent_options_are_refused(option_class, options, where):
    with pytest.raises(ValidationError) as caught:
        option_class(**options)
    check_message(caught.value.errors()[0]["msg"], f"Value error, {where}")


def test_weights_may_sum_to_one_up_to_rounding():
    weighting = Fixed(weights={"law": 0.3333, "medicine": 0.3333, "prose": 0.3333})
    score_KN = weighting.log_scores(_stats(0, 2), make_rows(torch.zeros(2), [0, 0]), NAMES)
    torch.testing.assert_close(score_KN.softmax(0), torch.full((K, 2), 1 / 3).double())


def test_every_rule_is_in_the_table_under_its_name():
    assert {type(weighting) for weighting in WEIGHTING_CASES} == set(WEIGHTINGS.values())
    assert list(WEIGHTINGS) == [
        "uniform", "best_single", "entropy", "prefix_likelihood", "fixed", "calibrated_entropy",
        "gate", "consensus", "domain_weights", "route", "ca_mkd", "min_ce", "avg_ce",
    ]  # fmt: skip


@pytest.mark.parametrize("gap", [2.0, 8.0, 14.0, 16.0, 17.0, 25.0])
@pytest.mark.parametrize("form", ["softmax", "inverse", "complement"])
def test_weights_of_nearly_certain_teachers_do_not_depend_on_the_dtype(form, gap):
    logits_KNV = torch.zeros(2, 1, 1000, dtype=torch.float64)
    logits_KNV[0, 0, 0], logits_KNV[1, 0, 1] = gap + 7.0, gap + 7.5
    rows = make_rows(torch.zeros(1, dtype=torch.long), [0])
    weighting = Entropy(form=form)
    exact = fused(Fusion(weighting=weighting), make_teachers(logits_KNV), rows).weights_Kn
    for name, stats in {
        "pooled": stats_of(make_teachers(logits_KNV.float()), rows),
        "calibrated": temperature_tables(make_teachers(logits_KNV.float()), rows).stats({}),
    }.items():
        weights = weighting.log_scores(stats, rows, NAMES[:2]).softmax(0)
        torch.testing.assert_close(weights, exact.double(), rtol=1e-4, atol=0, msg=name)


@pytest.mark.parametrize("gap", [0.5, 9.0, 14.0, 25.0])
def test_statistics_of_nearly_certain_rows_are_those_of_float64(gap: float) -> None:
    """Entropy -sum P log P: at a gap of 25 the top token has log P = 0 in float32."""
    generator = torch.Generator().manual_seed(3)
    logits_nV = torch.randn(5, 40, generator=generator)
    logits_nV[:, 7] = logits_nV.amax(1) + gap
    labels_n = torch.arange(5)
    stats, logp_nV = RowReader().read(logits_nV.clone(), labels_n, temperature=0.8)
    exact_nV = (logits_nV.double() / 0.8).log_softmax(1)
    rest_nV = exact_nV.clone()
    rest_nV[:, 7] = 0.0
    others_nV = exact_nV.exp().index_fill(1, torch.tensor([7]), 0.0)
    rest_n = others_nV.sum(1)
    expected_n = -(others_nV * rest_nV).sum(1) - (1 - rest_n) * torch.log1p(-rest_n)
    assert stats.entropy_KN.tolist() == pytest.approx(expected_n.tolist(), rel=2e-5)
    assert logp_nV.double().sub(exact_nV).abs().max() < 2e-5
    assert stats.label_logp_KN.tolist() == pytest.approx(
        exact_nV[range(5), range(5)].tolist(), rel=1e-5
    )
