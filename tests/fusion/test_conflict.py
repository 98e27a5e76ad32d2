"""Disagreement of the teachers, and the effect of each conflict policy."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

import reference
from collegium.distributions import Answer
from collegium.fusion.conflict import (
    CONFLICTS,
    Conflict,
    ConsistentSubset,
    FollowHighest,
    NoConflictPolicy,
    TargetCorrection,
    TruthFallback,
)
from collegium.fusion.fitted import Fixed
from collegium.fusion.fuse import Fusion, TargetBlock, fuse
from collegium.fusion.options import describe, to_recipe
from collegium.fusion.rules import BestSingle, Entropy, PrefixLikelihood, Uniform
from collegium.types import Rows
from fusion_cases import (
    NAMES,
    POOL_CASES,
    WEIGHTING_CASES,
    CountedRows,
    fused,
    make_rows,
    make_teachers,
)

K, N, V = 3, 9, 7
DOCUMENTS = [0, 0, 0, 0, 1, 1, 2, 2, 2]
POLICIES: list[Conflict] = [
    TruthFallback(),
    TruthFallback(power=0.5),
    TargetCorrection(),
    ConsistentSubset(),
    ConsistentSubset(threshold=0.05, share=0.5),
    FollowHighest(threshold=0.2),
]
MIX = Fixed(weights={"law": 0.2, "medicine": 0.5, "prose": 0.3})


@pytest.fixture(name="logits_KNV")
def _logits() -> torch.Tensor:
    return 3 * torch.randn(K, N, V, dtype=torch.float64)


@pytest.fixture
def rows() -> Rows:
    return make_rows(torch.randint(V, (N,)), DOCUMENTS)


def _logps(logits_KNV: torch.Tensor, t: int) -> list[list[float]]:
    return [reference.log_softmax(z_NV[t].tolist()) for z_NV in logits_KNV]


def _disagreement(block: TargetBlock) -> torch.Tensor:
    assert block.conflict is not None
    return block.conflict.disagreement_n


def _applied(block: TargetBlock) -> torch.Tensor:
    assert block.conflict is not None
    return block.conflict.applied_n


@pytest.mark.parametrize("pool", POOL_CASES, ids=str)
@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
def test_disagreement_is_a_fraction_of_its_maximum(weighting, pool, logits_KNV, rows):
    """c = sum_k w_k KL(P_k || P) / H(w) with P the linear pool, for every pool of the target."""
    fusion = Fusion(weighting=weighting, **pool, conflict=TruthFallback())
    block = fused(fusion, make_teachers(logits_KNV), rows)
    conflict_n = _disagreement(block)
    assert ((conflict_n >= 0) & (conflict_n <= 1)).all()
    for t in range(N):
        weights = block.weights_Kn[:, t].tolist()
        expected = reference.disagreement(_logps(logits_KNV, t), weights)
        assert conflict_n[t].item() == pytest.approx(expected, abs=1e-9)


def test_disagreement_of_clones_is_zero_and_of_disjoint_teachers_one():
    rows = make_rows(torch.zeros(2, dtype=torch.long), [0, 0])
    logits_KNV = torch.zeros(K, 2, V, dtype=torch.float64)
    for number in range(K):
        logits_KNV[number, 1, number] = 1e4
    fusion = Fusion(weighting=MIX, conflict=TruthFallback())
    conflict_n = _disagreement(fused(fusion, make_teachers(logits_KNV), rows))
    assert conflict_n.tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    # Uncertain clones do not disagree, and a single teacher has no disagreement.
    for weighting in (
        BestSingle(teacher="law"),
        Fixed(weights={"law": 1, "medicine": 0, "prose": 0}),
    ):
        fusion = Fusion(weighting=weighting, conflict=TruthFallback())
        assert _disagreement(fused(fusion, make_teachers(logits_KNV), rows)).tolist() == [0, 0]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_one_teacher_has_no_conflict(policy, logits_KNV, rows):
    fusion = Fusion(weighting=Uniform(), conflict=policy)
    block = fused(fusion, make_teachers(logits_KNV[:1]), rows)
    assert _disagreement(block).abs().max() == 0
    if not isinstance(policy, TargetCorrection):
        assert _applied(block).abs().max() == 0
        assert torch.equal(block.logp(), logits_KNV[0].log_softmax(-1))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("pool", POOL_CASES, ids=str)
def test_every_policy_gives_a_distribution_for_any_block_size(policy, pool, logits_KNV, rows):
    options = {"temperatures": {"law": 1.3}, "pooled_temperature": 0.8, "conflict": policy}
    fusion = Fusion(**options, **pool)
    split, whole = (fused(fusion, make_teachers(logits_KNV), rows, size) for size in (2, N))
    torch.testing.assert_close(split.logp(), whole.logp(), rtol=0, atol=1e-12)
    torch.testing.assert_close(_applied(split), _applied(whole), rtol=0, atol=1e-12)
    torch.testing.assert_close(split.logp().exp().sum(-1), torch.ones(N).double())
    torch.testing.assert_close(split.weights_Kn.sum(0), torch.ones(N).double())
    assert ((_applied(split) >= 0) & (_applied(split) <= 1)).all()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policy_changes_only_the_rows_marked_as_applied(policy, logits_KNV, rows):
    logits_KNV[:, :3] = logits_KNV[0, :3]
    rows.labels[:3] = logits_KNV[0, :3].argmax(-1)
    plain = fused(Fusion(weighting=MIX), make_teachers(logits_KNV), rows)
    block = fused(Fusion(weighting=MIX, conflict=policy), make_teachers(logits_KNV), rows)
    assert plain.conflict is None
    changed_n = (block.logp() - plain.logp()).abs().amax(-1) > 1e-12
    if isinstance(policy, TruthFallback):
        assert not changed_n.any()
    else:
        assert torch.equal(changed_n, _applied(block) == 1)
        assert 0 < changed_n.sum() < N


def test_truth_fallback_moves_weight_to_the_label(logits_KNV, rows):
    fusion = Fusion(weighting=MIX, conflict=TruthFallback(power=2.0))
    block = fused(fusion, make_teachers(logits_KNV), rows)
    assert block.conflict is not None
    assert block.conflict.kd_factor_n is not None
    expected_n = (1 - _disagreement(block)) ** 2
    torch.testing.assert_close(block.conflict.kd_factor_n, expected_n)
    torch.testing.assert_close(_applied(block), 1 - expected_n)
    assert not fusion.conflict.uses_label


@pytest.mark.parametrize("margin", [0.2, 0.01])
def test_corrected_label_leads_by_the_margin_and_other_tokens_keep_proportions(
    margin, logits_KNV, rows
):
    plain = fused(Fusion(weighting=MIX, pooled_temperature=1.2), make_teachers(logits_KNV), rows)
    fusion = Fusion(weighting=MIX, pooled_temperature=1.2, conflict=TargetCorrection(margin=margin))
    block = fused(fusion, make_teachers(logits_KNV), rows)
    is_wrong = 0
    for t in range(N):
        before, after = plain.logp()[t].exp(), block.logp()[t].exp()
        label = int(rows.labels[t])
        others = [v for v in range(V) if v != label]
        if int(before.argmax()) == label:
            torch.testing.assert_close(after, before)
            continue
        is_wrong += 1
        assert int(after.argmax()) == label
        assert float(after[label] - after[others].max()) == pytest.approx(margin, abs=1e-12)
        torch.testing.assert_close(
            after[others] / after[others].sum(), before[others] / before[others].sum()
        )
    assert is_wrong == int(_applied(block).sum()) > 0
    assert fusion.conflict.uses_label


def test_correction_of_a_label_with_probability_zero_is_finite(rows):
    logits_KNV = torch.zeros(K, N, V)
    logits_KNV[:, torch.arange(N), rows.labels] = -torch.inf
    block = fused(Fusion(conflict=TargetCorrection()), make_teachers(logits_KNV), rows)
    assert block.logp().isfinite().all()
    torch.testing.assert_close(block.logp().exp().sum(-1), torch.ones(N))
    assert (block.logp().argmax(-1) == rows.labels).all()


def test_consistent_subset_drops_teachers_that_rule_out_the_label(logits_KNV, rows):
    policy = ConsistentSubset(threshold=0.1, share=0.2)
    block = fused(Fusion(weighting=MIX, conflict=policy), make_teachers(logits_KNV), rows)
    prior = [MIX.weights[name] for name in NAMES]
    num_dropped = 0
    for t in range(N):
        logps = _logps(logits_KNV, t)
        label_prob = [math.exp(logp[int(rows.labels[t])]) for logp in logps]
        is_kept = [p >= 0.2 * max(label_prob) for p in label_prob]
        if reference.disagreement(logps, prior) <= 0.1:
            is_kept = [True] * K
        weights = reference.normalized([w * kept for w, kept in zip(prior, is_kept, strict=True)])
        assert block.weights_Kn[:, t].tolist() == pytest.approx(weights, abs=1e-12)
        expected = reference.pool(logps, weights, "linear")
        assert block.logp()[t].tolist() == pytest.approx(expected, abs=1e-9)
        num_dropped += not all(is_kept)
    assert num_dropped == int(_applied(block).sum()) > 0


def test_consistent_subset_ignores_teachers_without_weight(logits_KNV, rows):
    """A teacher without weight that knows the label must not exclude the others."""
    logits_KNV[0] = 0.0
    logits_KNV[0, torch.arange(N), rows.labels] = 50.0
    weighting = Fixed(weights={"law": 0.0, "medicine": 0.5, "prose": 0.5})
    policy = ConsistentSubset(threshold=0.0, share=0.1)
    block = fused(Fusion(weighting=weighting, conflict=policy), make_teachers(logits_KNV), rows)
    assert block.weights_Kn[0].max() == 0
    torch.testing.assert_close(block.weights_Kn.sum(0), torch.ones(N).double())


def test_follow_highest_uses_one_teacher_where_they_disagree(logits_KNV, rows):
    plain = fused(Fusion(weighting=MIX, conflict=TruthFallback()), make_teachers(logits_KNV), rows)
    threshold = float(_disagreement(plain).median())
    fusion = Fusion(weighting=MIX, conflict=FollowHighest(threshold=threshold))
    block = fused(fusion, make_teachers(logits_KNV), rows)
    is_above_n = _disagreement(plain) > threshold
    assert torch.equal(_applied(block) == 1, is_above_n)
    assert 0 < is_above_n.sum() < N
    medicine_nV = logits_KNV[1].log_softmax(-1)
    torch.testing.assert_close(block.logp()[is_above_n], medicine_nV[is_above_n])
    torch.testing.assert_close(block.logp()[~is_above_n], plain.logp()[~is_above_n])


def test_follow_highest_keeps_teachers_of_equal_weight(logits_KNV, rows):
    fusion = Fusion(weighting=Uniform(), conflict=FollowHighest(threshold=0.0))
    block = fused(fusion, make_teachers(logits_KNV), rows)
    assert _applied(block).sum() == 0
    torch.testing.assert_close(block.weights_Kn, torch.full((K, N), 1 / 3).double())


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("weighting", [MIX, PrefixLikelihood(), Entropy()], ids=str)
def test_order_of_teachers_does_not_matter(policy, weighting, logits_KNV, rows):
    fusion = Fusion(weighting=weighting, conflict=policy)
    order = [2, 0, 1]
    plain = fused(fusion, make_teachers(logits_KNV), rows)
    permuted = fused(fusion, make_teachers(logits_KNV[order], [NAMES[k] for k in order]), rows)
    torch.testing.assert_close(plain.logp(), permuted.logp(), rtol=0, atol=1e-10)
    torch.testing.assert_close(_applied(plain), _applied(permuted), rtol=0, atol=1e-10)


def test_heads_are_applied_again_only_in_blocks_where_weights_change(logits_KNV, rows):
    policy = FollowHighest(threshold=0.5)
    logits_KNV[:, :4] = logits_KNV[0, :4]
    for number in range(K):
        logits_KNV[number, 6, number] += 100.0
    counted = [CountedRows(logits_NV) for logits_NV in logits_KNV]
    teachers = [Answer(name, scores) for name, scores in zip(NAMES, counted, strict=True)]
    target = fuse(Fusion(weighting=MIX, conflict=policy), teachers, rows)
    for block in (slice(0, 4), slice(4, 9)):
        target.block(block)
    assert all(scores.blocks == [(0, 4), (4, 9), (4, 9)] for scores in counted)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("pool", POOL_CASES, ids=str)
def test_extreme_logits_stay_finite_in_float32(policy, pool, rows):
    logits_KNV = 3e4 * torch.randn(K, N, V)
    logits_KNV[0, :, 2], logits_KNV[:, :, 5] = -torch.inf, -torch.inf
    block = fused(
        Fusion(weighting=Entropy(), conflict=policy, **pool), make_teachers(logits_KNV), rows
    )
    assert block.logp().isfinite().all()
    assert _disagreement(block).isfinite().all()
    torch.testing.assert_close(block.logp().exp().sum(-1), torch.ones(N))


def test_no_policy_is_the_default_and_costs_nothing(logits_KNV, rows):
    assert Fusion().conflict == NoConflictPolicy()
    counted = CountedRows(logits_KNV[0])
    block = fused(Fusion(), [Answer("law", counted)], rows, N)
    assert block.conflict is None
    assert counted.blocks == [(0, N)]


def test_descriptions_and_snippets():
    fusion = Fusion(weighting=Uniform(), conflict=FollowHighest(threshold=0.25))
    assert describe(fusion) == "uniform, linear, follow_highest(threshold=0.25)"
    assert to_recipe(fusion)["conflict"] == {"name": "follow_highest", "threshold": 0.25}
    assert "conflict" not in to_recipe(Fusion())
    assert {type(policy) for policy in POLICIES} | {NoConflictPolicy} == set(CONFLICTS.values())


@pytest.mark.parametrize(
    ("option_class", "options"),
    [
        (TruthFallback, {"power": 0.0}),
        (TargetCorrection, {"margin": 1.0}),
        (ConsistentSubset, {"share": 0.0}),
        (ConsistentSubset, {"threshold": 1.5}),
        (FollowHighest, {"threshold": -0.1}),
        (NoConflictPolicy, {"power": 1.0}),
    ],
)
def test_invalid_options_are_refused(option_class, options):
    with pytest.raises(ValidationError) as caught:
        option_class(**options)
    assert caught.value.errors()[0]["loc"] == tuple(options)
