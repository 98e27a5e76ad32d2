"""Preflight on hand-written bigram teachers: its measurements, its choice and its verdict."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from collegium.config.recipe import decode_fusion
from collegium.data.windows import PackedDataset
from collegium.errors import CollegiumError
from collegium.evaluate.scoring import FUSED, Windows, score_models
from collegium.fusion.fitted import DomainWeights, Fixed, Route
from collegium.fusion.fuse import Fusion
from collegium.fusion.gate import Gate
from collegium.fusion.options import describe
from collegium.fusion.rules import BestSingle, Consensus, PrefixLikelihood, Uniform
from collegium.fusion.weighting import Weighting
from collegium.preflight import search as search_module
from collegium.preflight import sweeps
from collegium.preflight.advice import Findings, findings_of, verdict_sentences
from collegium.preflight.measure import run_preflight
from collegium.preflight.search import Candidate, FoldedFusion, Search, choose
from collegium.preflight.sweeps import pairwise_jsd, sweep_teachers
from evaluation_cases import BigramTeacher, bigram_logits, id_dataset, walks
from refusals import refused

VOCAB = 24


@lru_cache(maxsize=1)
def two_domains() -> PackedDataset:
    """Two domains: in `ones` the next token is mostly v + 1, in `fives` mostly v + 5."""
    documents, domains = [], []
    for domain, step, seed in (("ones", 1, 0), ("fives", 5, 1)):
        walked = walks(vocab_size=VOCAB, step=step, noise=0.3, number=16, length=25, seed=seed)
        documents += walked
        domains += [domain] * len(walked)
    return id_dataset(documents, domains, max_length=25)


def specialist(name: str, step: int, sharpness: float = 4.0) -> BigramTeacher:
    return BigramTeacher(name, bigram_logits(vocab_size=VOCAB, step=step, sharpness=sharpness))


# The extended search takes seconds, so its tests share one run.
@lru_cache(maxsize=1)
def two_specialists() -> dict[str, Any]:
    teachers = [specialist("one", 1), specialist("five", 5)]
    return run_preflight(teachers, two_domains(), batch_size=8, extended=True).to_json()


def chosen_fusion(report: dict) -> Fusion:
    return decode_fusion(report["chosen"]["fusion"])


def entry(report: dict, name: str) -> dict:
    (match,) = [row for row in report["fusions"] if row["name"] == name]
    return match


def test_specialists_get_domain_weights() -> None:
    report = two_specialists()
    weighting = chosen_fusion(report).weighting
    assert isinstance(weighting, DomainWeights)
    assert weighting.weights["ones"]["one"] > 0.9
    assert weighting.weights["fives"]["five"] > 0.9
    assert (
        report["chosen"]["nll"] < entry(report, describe(Fusion(weighting=Uniform())))["nll"] - 0.1
    )
    assert report["chosen"]["nll"] < report["best_single"]["nll"] - 0.1
    names = [row["name"] for row in report["fusions"]]
    assert len(names) == len(set(names))
    assert [row["nll"] for row in report["fusions"]] == sorted(
        row["nll"] for row in report["fusions"]
    )


def test_a_route_is_measured_but_not_chosen() -> None:
    report = two_specialists()
    first = report["fusions"][0]
    assert first["fusion"]["weighting"] == {
        "name": "route",
        "default": report["best_single"]["teacher"],
        "domains": {"fives": "five", "ones": "one"},
    }
    # First by NLL, yet giving up fusion is left to the recipe.
    assert first["nll"] < report["chosen"]["nll"] - 0.002
    assert report["chosen"]["fusion"]["weighting"]["name"] == "domain_weights"
    pools = [row["fusion"]["pool"] for row in report["fusions"] if "route" in row["name"]]
    assert set(pools) == {"linear"}


def test_every_extended_rule_is_tried_and_measured() -> None:
    report = two_specialists()
    raw = {
        row["fusion"]["weighting"]["name"]: row
        for row in report["fusions"]
        if row["calibration"] == "raw" and row["fusion"]["pool"] == "linear"
    }
    assert set(raw) == {
        "uniform", "best_single", "entropy", "calibrated_entropy", "prefix_likelihood",
        "fixed", "domain_weights", "route", "consensus", "gate",
    }  # fmt: skip
    assert raw["domain_weights"]["rank_correlation"] > 0.5
    # Equal weights have no order. Both teachers are equally certain.
    assert raw["uniform"]["rank_correlation"] is None
    assert raw["entropy"]["rank_correlation"] is None
    shares = {name: row["best_teacher_share"] for name, row in raw.items()}
    assert 0.5 <= shares["uniform"] < shares["domain_weights"] - 0.1
    # Weights that adapt to the row can beat the best constant ones.
    assert (
        raw["domain_weights"]["regret"]["constant"]
        < -0.1
        < 0
        < raw["entropy"]["regret"]["constant"]
    )
    assert all(row["regret"]["per_token"] >= 0 for row in raw.values())
    chosen = entry(report, report["chosen"]["name"])
    assert chosen["interval_to_chosen"] == [0.0, 0.0]
    low, high = raw["uniform"]["interval_to_chosen"]
    assert 0 < low < raw["uniform"]["nll"] - chosen["nll"] < high
    assert set(report["chosen"]["leave_one_out"]) == {"one", "five"}
    assert min(report["chosen"]["leave_one_out"].values()) > 0.1


def test_without_domains_prefix_likelihood_finds_the_specialist() -> None:
    data = two_domains()
    documents = [data[i]["input_ids"].tolist() for i in range(len(data))]
    bare = id_dataset(documents, ["default"] * len(documents), max_length=25)
    report = run_preflight(
        [specialist("one", 1), specialist("five", 5)], bare, batch_size=8
    ).to_json()
    assert isinstance(chosen_fusion(report).weighting, (PrefixLikelihood, Gate))
    names = {row["fusion"]["weighting"]["name"] for row in report["fusions"]}
    assert "domain_weights" not in names


def test_fitted_rules_are_scored_on_unseen_documents() -> None:
    """Each of two documents favors another teacher, so weights fitted on either one must lose."""
    documents = [
        walks(vocab_size=VOCAB, step=step, noise=0.3, number=1, length=120, seed=step)[0]
        for step in (1, 5)
    ]
    data = id_dataset(documents, ["all", "all"], max_length=120)
    teachers = [specialist("one", 1), specialist("five", 5)]
    report = run_preflight(teachers, data, batch_size=2, extended=True).to_json()
    (fitted,) = [
        row
        for row in report["fusions"]
        if row["fusion"]["weighting"]["name"] == "fixed"
        and row["calibration"] == "raw"
        and row["fusion"]["pool"] == "linear"
    ]
    # The fit for use sees both documents, the fits that are scored see one each.
    assert 0.3 < fitted["fusion"]["weighting"]["weights"]["one"] < 0.7
    assert fitted["nll"] > entry(report, describe(Fusion(weighting=Uniform())))["nll"] + 0.3
    assert fitted["num_tokens"] == 238
    low, high = fitted["interval"]
    assert low <= fitted["nll"] <= high


def test_every_calibration_is_tried() -> None:
    # Sharpness 9 claims 99.7 % where the text follows the step in about 71 % of the cases.
    teachers = [specialist("one", 1, 9.0), specialist("five", 5, 9.0)]
    report = run_preflight(teachers, two_domains(), batch_size=8, extended=True).to_json()
    tried = {(row["fusion"]["pool"], row["calibration"]) for row in report["fusions"]}
    calibrations = {"raw", "temperatures", "pooled", "temperatures+pooled"}
    assert tried == {
        (pool, c) for pool in ("linear", "log_linear", "power_mean") for c in calibrations
    }
    individual = {name: figures["temperature"] for name, figures in report["teachers"].items()}
    assert all(value > 1.2 for value in individual.values())
    products = [row["fusion"] for row in report["fusions"] if row["fusion"]["pool"] == "log_linear"]
    fitted = [fusion["temperatures"] for fusion in products if fusion["temperatures"]]
    assert len(fitted) >= 7
    assert all(set(fit) == set(individual) and min(fit.values()) > 1.2 for fit in fitted)


@lru_cache(maxsize=1)
def search_of_two() -> tuple[list[BigramTeacher], Search, list[Candidate]]:
    teachers = [specialist("one", 1, 9.0), specialist("five", 5)]
    split = Windows.spread(two_domains(), 8)
    scalars = sweep_teachers(teachers, split)
    search = Search(teachers, scalars, split, best_single="five", extended=True)
    return teachers, search, search.ranked()


def test_every_nll_is_that_of_its_fused_target() -> None:
    """Scalars, sweeps and the evaluation agree for every rule, pool and calibration, by fold."""
    teachers, search, ranked = search_of_two()
    assert len({(c.fusion.pool, c.calibration) for c in ranked}) == 12
    by_rule = {(type(c.fusion.weighting), c.fusion.pool, c.calibration): c for c in ranked}
    # A gate and the consensus read distributions at temperatures that no table has.
    assert {(rule, "power_mean", "temperatures") for rule in (Gate, Consensus)} <= set(by_rule)
    for tried in by_rule.values():
        parts = [
            torch.from_numpy(
                score_models([], teachers, fusion, Windows.spread(two_domains(), 5))[FUSED].nll_N
            )
            for fusion in (tried.fusions.first, tried.fusions.second)
        ]
        nll_N = torch.where(search.is_second_N, parts[1], parts[0]).double()
        torch.testing.assert_close(tried.nll_N.double(), nll_N, rtol=1e-5, atol=1e-5)


def test_each_fold_is_scored_under_the_fit_of_the_other() -> None:
    """The weights that score a fold are fitted on the other fold, the final ones on both."""
    _, search, ranked = search_of_two()
    fitted = [c for c in ranked if c.fusions.first != c.fusions.second]
    assert {type(c.fusion.weighting) for c in fitted} >= {Fixed, Gate, DomainWeights}
    second = search.is_second_N
    assert second.any()
    assert not second.all()
    fixed = [c for c in fitted if isinstance(c.fusion.weighting, Fixed)]
    raw = next(c for c in fixed if c.calibration == "raw" and c.fusion.pool == "linear").fusions
    assert raw.second.weighting == search.fits(~second).weighting(Fixed.fit, {})
    assert raw.first.weighting == search.fits(second).weighting(Fixed.fit, {})
    assert raw.final.weighting == search.fits(second | ~second).weighting(Fixed.fit, {})


def test_teachers_are_measured_like_models() -> None:
    teachers = [specialist("one", 1), specialist("five", 5)]
    scored = score_models(teachers, [], None, Windows.spread(two_domains(), 8))
    report = two_specialists()
    assert list(report["teachers"]) == ["one", "five"]
    for name, figures in report["teachers"].items():
        expected = scored[name].scores().to_json()
        for key in ("nll", "perplexity", "entropy", "ece", "overconfidence", "top1"):
            assert figures[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
    assert (
        report["teachers"]["one"]["domains"]["ones"] < report["teachers"]["one"]["domains"]["fives"]
    )
    assert report["num_tokens"] == 32 * 24


def test_disagreement_matrices() -> None:
    disagreement = two_specialists()["disagreement"]
    p = torch.softmax(bigram_logits(vocab_size=VOCAB, step=1, sharpness=4.0)[0].double(), 0)
    q = torch.softmax(bigram_logits(vocab_size=VOCAB, step=5, sharpness=4.0)[0].double(), 0)
    jsd = sum(
        0.5 * float(x) * math.log(2 * float(x) / float(x + y))
        for a, b in ((p, q), (q, p))
        for x, y in zip(a, b, strict=True)
    )
    assert disagreement["teachers"] == ["one", "five"]
    assert disagreement["jsd"][0][1] == disagreement["jsd"][1][0] == pytest.approx(jsd, rel=1e-4)
    assert disagreement["jsd"][0][0] == 0.0
    assert disagreement["top1"] == [[0.0, 1.0], [1.0, 0.0]]


def test_divergence_is_bounded_and_symmetric() -> None:
    # Disjoint distributions have the maximal divergence, ln 2.
    apart = torch.tensor([[[0.0, -1e4]], [[-1e4, 0.0]]])
    jsd_KKn = pairwise_jsd(apart)
    assert jsd_KKn[:, :, 0].flatten().tolist() == pytest.approx([0, math.log(2), math.log(2), 0])


def test_an_overconfident_teacher_is_named() -> None:
    teachers = [specialist("one", 1), specialist("loud", 5, sharpness=14.0)]
    report = run_preflight(teachers, two_domains(), batch_size=8, extended=True).to_json()
    assert report["teachers"]["loud"]["overconfidence"] > 1.0
    assert report["teachers"]["loud"]["temperature"] > 1.5
    assert "overconfident: " in report["verdict"][1]
    assert "`loud` (NLL - H = " in report["verdict"][1]


def findings(teachers: list[BigramTeacher], data: PackedDataset, weighting: Weighting) -> Findings:
    """The figures behind the verdict, had preflight chosen this linear pool."""
    split = Windows.spread(data, 50)
    scalars = sweep_teachers(teachers, split)
    metrics = {teacher.name: scalars.metrics(teacher.name) for teacher in teachers}
    search = Search(teachers, scalars, split, best_single=teachers[0].name)
    fusion = Fusion(weighting=weighting)
    nll_N = scalars.tables.linear_nll(weighting, {})
    candidate = Candidate(FoldedFusion(fusion, fusion, fusion), nll_N)
    return findings_of(search, [candidate], candidate, metrics)


def test_a_useless_teacher_is_named_and_one_twin_stays() -> None:
    noise = BigramTeacher("noise", torch.zeros(VOCAB, VOCAB))
    twins = [specialist("one", 1, 3.0), specialist("twin", 1, 3.0)]
    teachers = [*twins, specialist("five", 5, 3.0), noise]
    measured = findings(teachers, two_domains(), PrefixLikelihood(eta=0.5, decay=0.9))
    # Without both twins their domain would be lost.
    (twin,) = set(measured.idle_teachers) - {"noise"}
    assert twin in ("one", "twin")
    assert sum(measured.mean_weights.values()) == pytest.approx(1.0)
    verdict = verdict_sentences(measured)[1]
    assert "`noise` (weight " in verdict
    assert f"`{twin}` (weight " in verdict
    assert verdict.partition(";")[0].endswith(" add nothing")


def test_the_specialist_of_a_rare_domain_is_not_idle() -> None:
    """One document in a hundred gives it less than 2 % of the weight, yet needs it."""
    documents, domains = [], []
    for domain, step, number in (("ones", 1, 99), ("fives", 5, 1)):
        documents += walks(
            vocab_size=VOCAB, step=step, noise=0.1, number=number, length=65, seed=step
        )
        domains += [domain] * number
    data = id_dataset(documents, domains, max_length=65)
    teachers = [specialist("one", 1), specialist("five", 5)]
    measured = findings(teachers, data, PrefixLikelihood(eta=2.0, decay=1.0))
    assert measured.mean_weights["five"] < 0.02
    assert measured.leave_one_out["five"] > 0.01
    assert measured.idle_teachers == {}
    assert verdict_sentences(measured)[1].startswith("Every teacher adds something")


def test_a_single_teacher() -> None:
    report = run_preflight(
        [specialist("one", 1)], two_domains(), batch_size=8, extended=True
    ).to_json()
    assert {row["fusion"]["weighting"]["name"] for row in report["fusions"]} == {"best_single"}
    verdict = report["verdict"]
    assert verdict[2] == "There is only one teacher, `one`, so there is nothing to fuse."


def test_the_report_is_deterministic_and_strict_json() -> None:
    teachers = [specialist("one", 1), specialist("five", 5)]
    again = run_preflight(teachers, two_domains(), batch_size=8, extended=True).to_json()
    first = two_specialists()
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    text = json.dumps(first, allow_nan=False)
    assert json.loads(text) == first


def test_infinite_nll_is_null() -> None:
    # Predicts the current token with certainty, so it is wrong and has an infinite NLL.
    sure = torch.full((VOCAB, VOCAB), -math.inf)
    sure.fill_diagonal_(0.0)
    teachers = [specialist("one", 1), BigramTeacher("sure", sure)]
    report = run_preflight(teachers, two_domains(), batch_size=8, extended=True).to_json()
    json.dumps(report, allow_nan=False)
    assert report["best_single"]["teacher"] == "one"


@pytest.mark.parametrize(("sharpness", "end"), [(2000.0, "highest"), (0.02, "lowest")])
def test_temperatures_at_an_end_of_their_grid_are_marked(sharpness: float, end: str) -> None:
    teachers = [specialist("one", 1, sharpness), specialist("five", 5, sharpness)]
    report = run_preflight(teachers, two_domains(), batch_size=8).to_json()
    ends = [row.get("grid_ends", {}) for row in report["fusions"]]
    assert {value for names in ends for value in names.values()} == {end}
    assert {name for names in ends for name in names} == {"one", "five", "pooled_temperature"}
    assert report["chosen"]["grid_ends"]


def test_temperatures_inside_the_grid_are_not_marked() -> None:
    report = two_specialists()
    # The entropy of each teacher is constant here, so the map of that rule follows rounding.
    linear = [
        row
        for row in report["fusions"]
        if row["fusion"]["pool"] == "linear"
        and row["fusion"]["weighting"]["name"] != "calibrated_entropy"
    ]
    assert any(row["fusion"]["temperatures"] for row in linear)
    assert not any(row.get("grid_ends") for row in linear)
    # A name has no fitted numbers: those are in `fusion`.
    assert max(len(row["name"]) for row in report["fusions"]) < 120


def test_whole_distributions_read_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "FULL_TOKENS", 240)
    teachers = [specialist("one", 1), specialist("five", 5)]
    report = run_preflight(teachers, two_domains(), batch_size=8, max_tokens=480).to_json()
    assert report["num_tokens"] == 480
    assert {row["num_tokens"] for row in report["fusions"]} == {240}
    raw = entry(report, describe(Fusion(weighting=Uniform())))
    assert raw["nll_all_tokens"] is not None
    assert raw["nll_all_tokens"] != raw["nll"]
    assert set(raw["domains"]) == {"ones", "fives"}


def test_scalars_and_sweeps_read_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single teacher is the same target in both pools, one from scalars, one from a sweep."""
    monkeypatch.setattr(search_module, "FULL_TOKENS", 240)
    monkeypatch.setattr(BestSingle, "is_single", False)
    teachers = [specialist("one", 1), specialist("five", 5)]
    report = run_preflight(teachers, two_domains(), batch_size=8).to_json()
    by_pool = {
        row["fusion"]["pool"]: row
        for row in report["fusions"]
        if row["fusion"]["weighting"]["name"] == "best_single" and row["calibration"] == "raw"
    }
    assert by_pool["linear"]["nll"] == pytest.approx(by_pool["log_linear"]["nll"], rel=1e-6)
    assert by_pool["linear"]["domains"] == pytest.approx(by_pool["log_linear"]["domains"])
    assert by_pool["linear"]["nll_all_tokens"] != pytest.approx(by_pool["linear"]["nll"], rel=1e-6)


def test_no_teacher() -> None:
    with refused(CollegiumError, "preflight"):
        run_preflight([], two_domains(), batch_size=8)


def candidate(nll: float, **options: Any) -> Candidate:
    fusion = Fusion(**{"weighting": Uniform(), **options})
    return Candidate(FoldedFusion(fusion, fusion, fusion), torch.tensor([nll]).double())


def test_simpler_wins_a_tie() -> None:
    raw = candidate(2.0015)
    pooled = candidate(2.0, pooled_temperature=1.1)
    product = candidate(2.0005, pool="log_linear")
    assert choose([pooled, product, raw]) is raw
    assert choose([pooled, product]) is product
    assert choose([pooled, candidate(2.01)]) is pooled


def test_a_fitted_rule_counts_as_more_complex_and_a_route_is_the_last_choice() -> None:
    plain, fitted = candidate(2.0015), candidate(2.0, weighting=Fixed(weights={"a": 1.0}))
    route = candidate(1.0, weighting=Route(default="a"))
    assert choose([route, fitted, plain]) is plain
    assert choose([route, fitted]) is fitted
    assert choose([route]) is route


FINDINGS = Findings(
    fusion_name="uniform, linear",
    num_tokens=12345,
    nll=2.0,
    uniform_nll=2.0,
    best_single="a",
    best_single_nll=2.25,
    best_several_nll=2.0,
    mean_weights={"a": 0.6, "b": 0.39, "c": 0.01},
    leave_one_out={},
    idle_teachers={},
    overconfidence={"a": 0.0, "b": 0.1, "c": 0.2},
)


def test_verdict_for_several_teachers() -> None:
    assert verdict_sentences(FINDINGS) == [
        "Use uniform, linear: its fused target has an NLL of 2.000 nats per token "
        "on 12,345 tokens, level with uniform weights and 0.250 below the best single teacher.",
        "Every teacher adds something.",
        "Fusing several teachers beats the best single one, `a`: "
        "NLL 2.000 against 2.250, perplexity 7.4 against 9.5.",
    ]


def test_verdict_against_several_teachers() -> None:
    findings = replace(
        FINDINGS,
        fusion_name="best_single(teacher=a), linear",
        nll=2.25,
        uniform_nll=2.5,
        best_several_nll=2.25,
        idle_teachers={"c": 0.0, "b": -0.0315},
        overconfidence={"a": 0.0, "b": 1.204, "c": 0.2},
    )
    assert verdict_sentences(findings) == [
        "Use best_single(teacher=a), linear: its fused target has an NLL of 2.250 nats per token "
        "on 12,345 tokens, 0.250 below uniform weights and level with the best single teacher.",
        "`c` (weight 1.0%, NLL +0.000 without it) and "
        "`b` (weight 39.0%, NLL -0.032 without it) add nothing; "
        "overconfident: `b` (NLL - H = +1.20 nats).",
        "Fusing several teachers does not beat the best single one, `a`: "
        "NLL 2.250 against 2.250, perplexity 9.5 against 9.5.",
    ]


def test_default_rules_have_no_fitted_parameters():
    teachers = [specialist("one", 1), specialist("five", 5)]
    standard = run_preflight(teachers, two_domains(), batch_size=8).to_json()
    extended = run_preflight(teachers, two_domains(), batch_size=8, extended=True).to_json()
    names = [row["fusion"]["weighting"]["name"] for row in standard["fusions"]]
    assert set(names) == {"uniform", "best_single", "entropy", "prefix_likelihood"}
    more = {row["fusion"]["weighting"]["name"] for row in extended["fusions"]} - set(names)
    assert more == {"calibrated_entropy", "fixed", "domain_weights", "route", "consensus", "gate"}
    assert "power_mean" not in {row["fusion"]["pool"] for row in standard["fusions"]}


def test_only_the_extended_search_measures_the_consensus(monkeypatch):
    calls = []
    real = sweeps.TeacherReader.stats

    def stats(self, block, *, consensus=False):
        calls.append(consensus)
        return real(self, block, consensus=consensus)

    monkeypatch.setattr(sweeps.TeacherReader, "stats", stats)
    teachers = [specialist("one", 1), specialist("five", 5)]
    run_preflight(teachers, two_domains(), batch_size=8)
    assert not any(calls)
    run_preflight(teachers, two_domains(), batch_size=8, extended=True)
    assert any(calls)
