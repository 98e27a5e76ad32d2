"""Answers of every kind, complete and partial, fused together, against a float64 reference."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from collegium.cache.options import Samples, TopK, capabilities_of
from collegium.distributions import LIVE, Answer, DenseRows, Distribution, HiddenRows, NamedRows
from collegium.fusion.conflict import (
    Conflict,
    ConsistentSubset,
    FollowHighest,
    TargetCorrection,
    TruthFallback,
)
from collegium.fusion.fuse import Fusion
from collegium.fusion.gate import Gate
from collegium.fusion.options import to_recipe
from collegium.fusion.requirements import fusion_requirements, unmet
from collegium.fusion.rules import (
    ConfidenceAware,
    Consensus,
    Entropy,
    MinCE,
    PrefixLikelihood,
    Uniform,
)
from collegium.fusion.weighting import Weighting
from collegium.types import Head, Rows
from fusion_cases import NAMES, POOL_CASES, fused, make_rows, stored_rows

DOCUMENTS = [0, 0, 0, 0, 1, 1, 1, 2, 2]
N, V, D, TOP = len(DOCUMENTS), 11, 5, 4
T = 1.25
KINDS = ("hidden", "dense", "top k", "stored", "draws")
PARTIAL = [[0, 1, 3, 4, 5, 7, 8], [0, 2, 3, 4, 6, 8], [1, 2, 3, 5, 7]]
"""Rows of the partial answers; each pair leaves some rows to one teacher, and shares others."""
WEIGHTINGS: list[Weighting] = [
    Uniform(),
    PrefixLikelihood(eta=0.7, decay=0.8),
    Entropy(tau=0.6),
    Entropy(form="complement", granularity="sequence"),
    Entropy(form="inverse", granularity="sequence"),
    ConfidenceAware(),
    ConfidenceAware(granularity="sequence"),
    MinCE(),
    Consensus(tau=0.4),
    Gate(offsets={}, entropy=-0.5, prefix_nll=-0.4),
    Gate(offsets={}, max_logp=0.3, consensus=-1.2, prefix_nll=-0.6),
]
POLICIES: list[Conflict] = [
    TruthFallback(power=2.0),
    TargetCorrection(margin=0.1),
    ConsistentSubset(threshold=0.05, share=0.6),
    FollowHighest(threshold=0.1),
]


@dataclasses.dataclass
class Case:
    """One teacher's answer, its distributions as they are read, and its statistics."""

    answer: Answer
    prob_NV: Tensor
    """Zero at rows without an answer."""
    stats: list[reference.Stats | None]


def read(named: NamedRows, temperature: float, logp_NV: Tensor) -> Tensor:
    """(m, V) masses: P_T at the named tokens, and the remaining mass spread evenly."""
    ratio_NV = (logp_NV / temperature).softmax(1) / logp_NV.exp()
    prob_NV = torch.zeros_like(logp_NV)
    row_E = named.row_of_entry()
    prob_NV[row_E, named.ids] = named.logp.exp() * ratio_NV[row_E, named.ids]
    if not named.is_sampled:
        rest_N1 = (1 - prob_NV.sum(1, keepdim=True)) / (V - TOP)
        prob_NV = torch.where(prob_NV == 0, rest_N1, prob_NV)
    return prob_NV


def make_case(kind: str, number: int, rows: Rows, *, tempered: bool) -> Case:
    """Teacher `number`; a kind that starts with `some` answers some rows."""
    generator = torch.Generator().manual_seed(10 + number)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    is_partial, kind = kind.startswith("some "), kind.removeprefix("some ")
    at = torch.tensor(PARTIAL[number]) if is_partial else torch.arange(N)
    hidden, labels = hidden[at], rows.labels[at]
    logits = hidden @ weight.T
    logp, temperature = logits.log_softmax(1), T if tempered and kind != "top k" else 1.0
    distribution: Distribution = DenseRows(logits)
    prob = (logits / temperature).softmax(1)
    described = prob.log()
    if kind == "hidden":
        distribution = HiddenRows(hidden, Head(weight))
    elif kind != "dense":
        codec = Samples(draws=9) if kind == "draws" else TopK(k=TOP)
        distribution = stored_rows(logits, labels, codec, temperatures=(T,), seed=number)
        prob = read(distribution, temperature, logp)
        if kind == "top k":
            distribution, described = dataclasses.replace(distribution, stored=None), prob.log()
    prob_NV = torch.zeros(N, V, dtype=torch.float64).index_copy(0, at, prob)
    stats: list[reference.Stats | None] = [None] * N
    for t, row, label in zip(at.tolist(), described.tolist(), labels.tolist(), strict=True):
        stats[t] = reference.stats_of(row, label)
    answer = Answer(NAMES[number], distribution, rows=at if is_partial else None)
    return Case(answer, prob_NV, stats)


def make_cases(kinds: tuple[str, ...], *, tempered: bool = False) -> tuple[list[Case], Rows]:
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    rows = make_rows(labels, DOCUMENTS)
    return [make_case(k, i, rows, tempered=tempered) for i, k in enumerate(kinds)], rows


def with_offsets(weighting: Weighting, cases: list[Case]) -> Weighting:
    """A gate needs one offset for each teacher."""
    if not isinstance(weighting, Gate):
        return weighting
    offsets = {case.answer.name: 0.3 * number for number, case in enumerate(cases)}
    return dataclasses.replace(weighting, offsets=offsets)


def expected(cases: list[Case], rows: Rows, fusion: Fusion) -> list[Tensor]:
    """(N, V) probabilities, (N, K) weights and (N,) disagreement from plain loops."""
    logps = [case.prob_NV.log().tolist() for case in cases]
    stats = [case.stats for case in cases]
    names = [case.answer.name for case in cases]
    results = reference.fuse_answers(
        to_recipe(fusion), logps, stats, rows.labels.tolist(), DOCUMENTS, names
    )
    target_NV, weights_NK, conflict_N = (torch.tensor(x, dtype=torch.float64) for x in results)
    return [target_NV.exp(), weights_NK.T, conflict_N]


def assert_close(actual: Tensor | None, truth: Tensor, bound: float, fusion: Fusion) -> None:
    assert actual is not None
    error = (actual.double() - truth.double()).abs().max()
    assert error <= bound, f"{fusion}: {error}"


def assert_as_expected(fusion: Fusion, cases: list[Case], rows: Rows) -> None:
    """Compare the target, streamed and, where all answers are named, merged."""
    target_NV, weights_KN, conflict_N = expected(cases, rows, fusion)
    answers = [case.answer for case in cases]
    is_named = all(isinstance(answer.distribution, NamedRows) for answer in answers)
    for is_streamed in (True, False) if is_named else (True,):
        block = fused(fusion, answers, rows, is_streamed=is_streamed)
        # A merged target is float32.
        bound = 1e-10 if is_streamed else 1e-6
        assert_close(block.weights_Kn, weights_KN, 1e-10, fusion)
        assert_close(block.logp().exp(), target_NV, bound, fusion)
        if block.conflict is not None:
            assert_close(block.conflict.disagreement_n, conflict_N, bound, fusion)
        if isinstance(fusion.conflict, TruthFallback):
            assert block.conflict is not None
            assert_close(block.conflict.kd_factor_n, (1 - conflict_N) ** 2, bound, fusion)


ALL_KINDS = [*KINDS, *(f"some {kind}" for kind in KINDS)]
PAIRS = [
    pair
    for pair in itertools.combinations_with_replacement(ALL_KINDS, 2)
    # Pairs of full and complete answers are the subject of test_fuse.py.
    if not set(pair) <= {"hidden", "dense"}
]
TRIPLES = [("hidden", "some top k", "some draws"), ("some stored", "top k", "some dense")]


def defined_for(kinds: tuple[str, ...]) -> tuple[list[Weighting], list[dict[str, Any]]]:
    """The weightings and pools without a logarithm of draws."""
    if not any("draws" in kind for kind in kinds):
        return WEIGHTINGS, POOL_CASES
    return [w for w in WEIGHTINGS if not w.needs_consensus], POOL_CASES[:1]


@pytest.mark.parametrize("kinds", [*PAIRS, *TRIPLES], ids=" + ".join)
def test_every_mixture_equals_the_reference(kinds: tuple[str, ...]) -> None:
    for tempered in (False, True):
        cases, rows = make_cases(kinds, tempered=tempered)
        temperatures = {
            case.answer.name: T
            for case, kind in zip(cases, kinds, strict=True)
            if tempered and not kind.endswith("top k")
        }
        rules, pools = defined_for(kinds)
        for rule, pool in itertools.product(rules, pools[:1] if tempered else pools):
            weighting = with_offsets(rule, cases)
            fusion = Fusion(weighting=weighting, temperatures=temperatures, **pool)
            assert_as_expected(fusion, cases, rows)


@pytest.mark.parametrize(
    "kinds", [kinds for kinds in [*PAIRS, *TRIPLES] if "draws" not in str(kinds)], ids=" + ".join
)
def test_every_conflict_policy_equals_the_reference(kinds: tuple[str, ...]) -> None:
    cases, rows = make_cases(kinds)
    for policy, weighting, pool in itertools.product(POLICIES, WEIGHTINGS[:2], POOL_CASES):
        assert_as_expected(Fusion(weighting=weighting, conflict=policy, **pool), cases, rows)


@pytest.mark.parametrize("pair", [("some hidden", "some top k"), ("some stored", "some draws")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_changes_only_documents_in_which_it_answers(
    pair: tuple[str, str], kind: str
) -> None:
    cases, rows = make_cases((*pair, kind))
    *answers, third = (case.answer for case in cases)
    for own, first_changed in (([], N), ([7, 8], 7)):
        at = torch.tensor(own, dtype=torch.int64)
        partial_answer = Answer(third.name, third.distribution.take(at), rows=at)
        for weighting in defined_for((*pair, kind))[0]:
            fusion = Fusion(weighting=with_offsets(weighting, cases[:2]))
            before = fused(fusion, answers, rows, is_streamed=True)
            fusion = Fusion(weighting=with_offsets(weighting, cases))
            after = fused(fusion, [*answers, partial_answer], rows)
            same = slice(0, first_changed)
            assert_close(after.logp().exp()[same], before.logp().exp()[same], 1e-6, fusion)
            assert after.weights_Kn is not None
            assert after.weights_Kn[2, same].abs().max() == 0
            # MinCE gives the document to one teacher.
            assert not own or isinstance(weighting, MinCE) or after.weights_Kn[2, 7:].min() > 0


@pytest.mark.parametrize("kinds", TRIPLES, ids=" + ".join)
def test_order_of_answers_does_not_matter(kinds: tuple[str, ...]) -> None:
    cases, rows = make_cases(kinds)
    order = [2, 0, 1]
    for weighting in defined_for(kinds)[0]:
        fusion = Fusion(weighting=with_offsets(weighting, cases))
        plain = fused(fusion, [case.answer for case in cases], rows)
        permuted = fused(fusion, [cases[k].answer for k in order], rows)
        assert plain.weights_Kn is not None
        assert_close(permuted.weights_Kn, plain.weights_Kn[order], 1e-10, fusion)
        assert_close(permuted.logp().exp(), plain.logp().exp(), 1e-6, fusion)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_answers_are_one_answer(kind: str) -> None:
    (case,), rows = make_cases((kind,))
    clones = [dataclasses.replace(case.answer, name=name) for name in NAMES]
    for weighting, pool in itertools.product(*defined_for((kind,))):
        if not isinstance(weighting, Gate):  # its offsets differ
            fusion = Fusion(weighting=weighting, **pool)
            assert_close(fused(fusion, clones, rows).logp().exp(), case.prob_NV, 1e-6, fusion)


@pytest.mark.parametrize("kinds", [*itertools.combinations(KINDS, 2)], ids=" + ".join)
def test_partial_answers_for_all_rows_equal_complete_ones(kinds: tuple[str, ...]) -> None:
    cases, rows = make_cases(kinds)
    complete = [case.answer for case in cases]
    everywhere = [dataclasses.replace(answer, rows=torch.arange(N)) for answer in complete]
    for weighting in defined_for(kinds)[0]:
        fusion = Fusion(weighting=with_offsets(weighting, cases))
        expected_block, block = (fused(fusion, answers, rows) for answers in (complete, everywhere))
        assert expected_block.weights_Kn is not None
        assert_close(block.weights_Kn, expected_block.weights_Kn, 1e-12, fusion)
        assert_close(block.logp().exp(), expected_block.logp().exp(), 1e-12, fusion)


SOURCES = {
    "dense": LIVE,
    "top k": capabilities_of("per_teacher", TopK(k=TOP), ()),
    "stored": capabilities_of("per_teacher", TopK(k=TOP), (T,)),
    "draws": capabilities_of("per_teacher", Samples(draws=9), (T,)),
}
BASE = WEIGHTINGS[1]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("fusion.pooled_temperature", {"pooled_temperature": 3.0}),
    ("fusion.temperatures.law", {"temperatures": {"law": T}}),
    ("fusion.temperatures.law", {"temperatures": {"law": 4.0}}),
    ("fusion.pool", {"pool": "log_linear"}),
    ("fusion.pool", {"pool": "power_mean"}),
    *(("fusion.conflict", {"conflict": policy}) for policy in POLICIES),
    *(("fusion.weighting", {"weighting": rule}) for rule in WEIGHTINGS if rule != BASE),
]


@pytest.mark.parametrize(
    "kinds",
    [(kind,) for kind in SOURCES] + list(itertools.combinations_with_replacement(SOURCES, 2)),
    ids=" + ".join,
)
def test_every_option_changes_the_target_or_is_refused(kinds: tuple[str, ...]) -> None:
    cases, rows = make_cases(kinds)
    answers = [case.answer for case in cases]
    plain = fused(Fusion(weighting=BASE), answers, rows).logp().exp()
    # Weights, pools and conflicts of a single teacher have no effect whatever it is.
    for path, options in OPTIONS if len(kinds) > 1 else OPTIONS[:3]:
        fusion = Fusion(**({"weighting": BASE} | options))
        fusion = dataclasses.replace(fusion, weighting=with_offsets(fusion.weighting, cases))
        sources = [SOURCES[kind] for kind in kinds]
        problems = [line for s in sources for line in unmet(fusion_requirements(fusion), s)]
        assert all(line.startswith(f"{path}: got ") for line in problems), problems
        if problems:
            continue
        block = fused(fusion, answers, rows)
        factor_n = None if block.conflict is None else block.conflict.kd_factor_n
        is_changed = (block.logp().exp() - plain).abs().max() > 1e-3
        assert is_changed or (factor_n is not None and factor_n.min() < 0.99), fusion
