"""Preflight: quality, calibration and disagreement of the teachers, and the choice of a fusion.

Shapes: N rows of the calibration split, K teachers, F fusions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collegium.data.pack import PackedDataset
from collegium.distributions import Teacher
from collegium.errors import CollegiumError
from collegium.evaluate.advice import Findings, verdict_sentences
from collegium.evaluate.held_out import held_out_report
from collegium.evaluate.metrics import Metrics, ScoredTokens, finite
from collegium.evaluate.scoring import OnProgress, spread_windows, unique_scorers
from collegium.evaluate.search import SAME_NLL, Candidate, Search, choose
from collegium.evaluate.sweeps import CalibrationSplit, Scalars, sweep_teachers
from collegium.evaluate.weight_quality import (
    best_teacher_share,
    difference_interval,
    rank_correlation,
    regret,
)
from collegium.fusion.calibration import fit_temperature, over_under_confidence
from collegium.fusion.describe import describe, to_recipe
from collegium.fusion.fuse import Fusion
from collegium.fusion.routing import Route
from collegium.fusion.weights import BestSingle, Uniform


@dataclass(frozen=True, eq=False)
class PreflightResult:
    """The chosen fusion and the measurements behind the choice."""

    fusion: Fusion
    """The chosen fusion."""
    report: Mapping[str, Any]
    """Content of preflight.json."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of preflight.json: strict JSON, undefined numbers are None."""
        return dict(self.report)


def run_preflight(
    teachers: Sequence[Teacher],
    dataset: PackedDataset,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    candidates: Sequence[Fusion] | None = None,
    extended: bool = False,
    held_out: PackedDataset | None = None,
    progress: OnProgress | None = None,
) -> PreflightResult:
    """Measure teachers and fusions on the calibration split, and choose the fusion of lowest NLL.

    Every weighting is tried as a linear pool, from one sweep that keeps scalars only. A second
    sweep tries the best rule of each family in every pool, raw and with temperatures, with and
    without a pooled temperature. All fusions are ranked on the same tokens (about 4096 at most),
    each token under weights and temperatures fitted on the other half of the text. Among fusions
    within 0.002 nats of the best, the simplest wins: fewer fitted parts, then the linear pool.
    The chosen fusion is then fitted on all documents.

    Its NLL is slightly optimistic on the tokens that ranked it. `held_out`, on which nothing is
    fitted or chosen, gives an unbiased value, and the calibration of all models by domain.

    Teachers may also come from a per-teacher cache of the split. Only fusions that such a cache
    supports are then compared, on all tokens: linear pools at the stored temperatures, without
    rules that need whole distributions.

    Args:
        teachers: the frozen models, or all of them read from a cache.
        dataset: the calibration split.
        batch_size: windows per forward pass.
        max_tokens: approximate number of target tokens to read, in windows spread over the split.
            None reads all.
        candidates: fusions to compare unchanged, besides uniform weights and the best single
            teacher. None compares the default rules.
        extended: also try fitted weights, the learned gate, the consensus rule and the power mean,
            and measure the route by domain, which is never chosen over a fusion.
        held_out: the validation split, of which about `max_tokens` are read.
        progress: called with (batches done, all batches) of each sweep.

    Raises:
        CollegiumError: there is no teacher, or two teachers share a name.
        DataError: the split has no target tokens.
    """
    started = time.perf_counter()
    if not teachers:
        raise CollegiumError(
            "preflight: got no teacher; must be at least one; add one to `teachers`"
        )
    unique_scorers(teachers, ())
    windows = spread_windows(dataset, max_tokens)
    split = CalibrationSplit(dataset, windows, batch_size, progress)
    scalars = sweep_teachers(teachers, split)
    metrics = {name: scalars.metrics(name) for name in scalars.teachers}
    best_single = min(metrics, key=lambda name: metrics[name].nll)
    search = Search(
        teachers,
        scalars,
        split,
        best_single=best_single,
        candidates=candidates,
        extended=extended,
    )
    ranked = search.ranked()
    chosen = choose(ranked)
    findings = _findings(search, ranked, chosen, metrics)
    report = {
        "num_tokens": len(scalars.targets),
        "seconds": None,
        "teachers": {name: _teacher_report(scalars, metrics[name]) for name in metrics},
        "disagreement": {
            "teachers": scalars.teachers,
            "jsd": scalars.jsd_KK.tolist(),
            "top1": scalars.differs_KK.tolist(),
        },
        "fusions": [_fusion_report(candidate, chosen, search) for candidate in ranked],
        "chosen": {
            "name": describe(chosen.fusion),
            "nll": finite(chosen.nll),
            "fusion": to_recipe(chosen.fusion),
            "weights": findings.mean_weights,
            "leave_one_out": _leave_one_out(scalars, chosen),
        },
        "best_single": {"teacher": best_single, "nll": finite(findings.best_single_nll)},
        "verdict": verdict_sentences(findings),
    }
    if held_out is not None:
        report["held_out"] = held_out_report(
            teachers,
            chosen.fusion,
            held_out,
            temperatures={name: row["temperature"] for name, row in report["teachers"].items()},
            batch_size=batch_size,
            max_tokens=max_tokens,
            progress=progress,
        )
    report["seconds"] = time.perf_counter() - started
    return PreflightResult(chosen.fusion, report)


def _teacher_report(scalars: Scalars, metrics: Metrics) -> dict[str, Any]:
    over, under = over_under_confidence(metrics.confidence_N, metrics.is_correct_N)
    return {
        "nll": finite(metrics.nll),
        "perplexity": finite(metrics.perplexity),
        "entropy": finite(metrics.entropy),
        "ece": finite(metrics.ece),
        "ece_over": finite(over),
        "ece_under": finite(under),
        "overconfidence": finite(metrics.overconfidence),
        "temperature": finite(fit_temperature(scalars.tables, metrics.name)),
        "top1": finite(metrics.top1),
        "domains": {domain: row["nll"] for domain, row in metrics.by_domain().items()},
    }


def _fusion_report(candidate: Candidate, chosen: Candidate, search: Search) -> dict[str, Any]:
    samples_N = torch.from_numpy(search.scalars.targets.samples_N)[search.is_shared_N]
    interval = difference_interval(candidate.nll_N, torch.zeros_like(candidate.nll_N), samples_N)
    to_chosen = difference_interval(candidate.nll_N, chosen.nll_N, samples_N)
    return {
        "name": describe(candidate.fusion),
        "nll": finite(candidate.nll),
        "num_tokens": len(candidate.nll_N),
        "nll_all_tokens": finite(candidate.nll_all),
        "fusion": to_recipe(candidate.fusion),
        "calibration": candidate.calibration,
        "is_chosen": candidate is chosen,
        "interval": _edges(interval),
        "interval_to_chosen": _edges(to_chosen),
        **_weight_measures(candidate, search),
        "domains": _domain_nll(candidate.nll_N, search.scalars.targets, search.is_shared_N),
    }


def _edges(interval: tuple[float, float] | None) -> list[float | None] | None:
    return None if interval is None else [finite(edge) for edge in interval]


def _weight_measures(candidate: Candidate, search: Search) -> dict[str, Any]:
    """Measure whether weights favor the right teacher, or None if scalars do not determine them."""
    scalars, fusion = search.scalars, candidate.fusion
    # The consensus is stored for the raw teachers only.
    if fusion.weighting.needs_consensus and fusion.temperatures:
        return {"rank_correlation": None, "best_teacher_share": None, "regret": None}
    stats = scalars.stats(fusion.temperatures, scalars.teachers)
    weights_KN = search.weights(candidate)
    label_logp_KN = stats.label_logp_KN[:, search.is_shared_N]
    regrets = regret(candidate.nll_N, label_logp_KN)
    return {
        "rank_correlation": rank_correlation(weights_KN, -label_logp_KN),
        "best_teacher_share": best_teacher_share(weights_KN, -label_logp_KN),
        "regret": {name: finite(value) for name, value in regrets.items()},
    }


def _domain_nll(
    nll_N: Tensor, targets: ScoredTokens, is_shared_N: Tensor
) -> dict[str, float | None]:
    domains_N = torch.from_numpy(targets.domains_N)[is_shared_N]
    by_domain = {}
    for index, domain in enumerate(targets.domains):
        in_domain_N = domains_N == index
        if in_domain_N.any():
            by_domain[domain] = finite(float(nll_N[in_domain_N].mean()))
    return by_domain


def _findings(
    search: Search,
    ranked: Sequence[Candidate],
    chosen: Candidate,
    metrics: Mapping[str, Metrics],
) -> Findings:
    scalars, fusion = search.scalars, chosen.fusion
    mean_weights = scalars.mean_weights(fusion.weighting, _weight_temperatures(fusion))
    uniform = search.linear(Uniform(), {})
    single = search.linear(BestSingle(teacher=search.best_single), {})
    # These give every row to one teacher, so they do not mix.
    unmixed = (BestSingle, Route)
    several = [other for other in ranked if not isinstance(other.fusion.weighting, unmixed)]
    return Findings(
        fusion_name=describe(fusion),
        num_tokens=len(chosen.nll_N),
        nll=chosen.nll,
        uniform_nll=uniform.nll,
        best_single=search.best_single,
        best_single_nll=single.nll,
        best_several_nll=several[0].nll if several and len(mean_weights) > 1 else None,
        mean_weights=mean_weights,
        idle_teachers=_idle_teachers(scalars, chosen),
        overconfidence={name: scored.overconfidence for name, scored in metrics.items()},
    )


def _idle_teachers(scalars: Scalars, chosen: Candidate) -> dict[str, float]:
    """Return the teachers that can be dropped together -> NLL increase of each, < 0.002 nats.

    The NLL is that of the linear pool with the chosen weighting and temperatures, even when the
    chosen pool is log-linear.
    """
    # Dropped one after the other, least useful first, so that one of two equal teachers stays.
    weighting = chosen.fusion.weighting
    kept = [name for name in scalars.teachers if not weighting.excludes(name)]
    idle = {name: 0.0 for name in scalars.teachers if name not in kept}
    while len(kept) > 1:
        increases = _nll_increases(scalars, chosen, kept)
        least = min(increases, key=lambda name: increases[name])
        # Not decided by weight: the specialist of a rare domain has little weight but is needed.
        if increases[least] >= SAME_NLL:
            break
        idle[least] = increases[least]
        kept.remove(least)
    return idle


def _leave_one_out(scalars: Scalars, chosen: Candidate) -> dict[str, float | None]:
    """Return the increase of the linear pool's NLL when each teacher is dropped, one by one."""
    weighting = chosen.fusion.weighting
    members = [name for name in scalars.teachers if not weighting.excludes(name)]
    increases = _nll_increases(scalars, chosen, members) if len(members) > 1 else {}
    return {
        name: finite(increases.get(name, 0.0)) for name in scalars.teachers if name in increases
    }


def _weight_temperatures(fusion: Fusion) -> Mapping[str, float]:
    # A consensus is measured for the raw teachers only.
    return {} if fusion.weighting.needs_consensus else fusion.temperatures


def _nll_increases(scalars: Scalars, chosen: Candidate, members: Sequence[str]) -> dict[str, float]:
    """Return the NLL increase without each member, infinite if some row keeps no weight."""
    weighting, temperatures = chosen.fusion.weighting, _weight_temperatures(chosen.fusion)
    base_nll = float(scalars.linear_nll(weighting, temperatures, members).mean())
    increases = {}
    for name in members:
        others = [other for other in members if other != name]
        increase = float(scalars.linear_nll(weighting, temperatures, others).mean()) - base_nll
        # Where no member has weight at some row, its NLL is -inf - -inf = NaN.
        increases[name] = math.inf if math.isnan(increase) else increase
    return increases
