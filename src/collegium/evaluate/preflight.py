"""Before any training: how good, how calibrated and how different the teachers are, and which fusion to use.

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
from collegium.errors import CollegiumError
from collegium.evaluate.advice import Findings, verdict_sentences
from collegium.evaluate.held_out import held_out_report
from collegium.evaluate.metrics import Metrics, Targets, finite
from collegium.evaluate.scoring import Progress, Scorer, spread_windows, unique_scorers
from collegium.evaluate.search import SAME_NLL, Candidate, Search, choose
from collegium.evaluate.sweeps import Calibration, Scalars, sweep_teachers
from collegium.evaluate.weight_quality import (
    best_teacher_share,
    difference_interval,
    rank_correlation,
    regret,
)
from collegium.fusion.calibration import fit_temperature, over_under_confidence
from collegium.fusion.describe import describe, to_recipe
from collegium.fusion.pooling import Fusion
from collegium.fusion.routing import Route
from collegium.fusion.weights import BestSingle, Uniform


@dataclass(frozen=True, eq=False)
class Preflight:
    """The measurements, and the fusion they speak for."""

    fusion: Fusion
    """The chosen fusion."""
    report: Mapping[str, Any]
    """What preflight.json holds."""

    def to_dict(self) -> dict[str, Any]:
        """The content of preflight.json: strict JSON, numbers that do not exist are None."""
        return dict(self.report)


def run_preflight(
    teachers: Sequence[Scorer],
    dataset: PackedDataset,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    candidates: Sequence[Fusion] | None = None,
    extended: bool = False,
    stored_at: Sequence[float] | None = None,
    held_out: PackedDataset | None = None,
    progress: Progress | None = None,
) -> Preflight:
    """Measure the teachers and their fusions on the calibration split, and choose the fusion of lowest NLL.

    Every weighting is tried as a linear pool, from one sweep of scalars; the best of each family in every pool, raw and with temperatures,
    with and without a pooled temperature, in one more reading. All fusions are ranked on the same tokens (at most about 4096), each token
    by weights and temperatures that were fitted on the other half of the text. Of those within 0.002 nats of the best, the simplest is chosen: fewer
    fitted parts, then the linear pool; it is fitted on all documents.

    The chosen fusion is the best of many on the tokens that rank them, so its NLL is a little optimistic there. `held_out`, which nothing
    is fitted or chosen on, says what it is worth, and how well everyone is calibrated, by domain.

    Teachers may also be read out of a per-teacher cache of the split. Only fusions that such a cache can give are then compared: linear pools, at
    the temperatures that it keeps, and no rule that needs whole distributions; all of them on all tokens.

    Args:
        teachers: the frozen models, or all of them out of a cache.
        dataset: the calibration split.
        batch_size: windows per forward pass.
        max_tokens: about how many target tokens to read, in windows spread over the split; None for all.
        candidates: fusions to compare as they are, beside uniform weights and the best single teacher; None tries the usual ones.
        extended: also try fitted weights, the learned gate, the consensus rule and the power mean, and measure the route by domain, which is
            never chosen over a fusion.
        stored_at: the temperatures beside 1 that the cache keeps; None for live teachers.
        held_out: the validation split, of which as many tokens are read.
        progress: called with (batches done, all batches) of each sweep.

    Raises:
        CollegiumError: there is no teacher, or two share a name.
        DataError: the split holds no target token.
    """
    started = time.perf_counter()
    if not teachers:
        raise CollegiumError(
            "preflight: got no teacher; must be at least one; add one to `teachers`"
        )
    unique_scorers(teachers, ())
    windows = spread_windows(dataset, max_tokens)
    split = Calibration(dataset, windows, batch_size, progress)
    scalars = sweep_teachers(teachers, split, stored_at=stored_at)
    metrics = {name: scalars.metrics(name) for name in scalars.teachers}
    best_single = min(metrics, key=lambda name: metrics[name].nll)
    search = Search(
        teachers,
        scalars,
        split,
        best_single=best_single,
        candidates=candidates,
        extended=extended,
        stored_at=stored_at,
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
        "fusions": [_fusion_report(one, chosen, search) for one in ranked],
        "chosen": {
            "name": describe(chosen.fusion),
            "nll": finite(chosen.nll),
            "fusion": to_recipe(chosen.fusion),
            "weights": findings.shares,
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
    return Preflight(chosen.fusion, report)


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


def _fusion_report(one: Candidate, chosen: Candidate, search: Search) -> dict[str, Any]:
    samples_N = torch.from_numpy(search.scalars.targets.samples_N)[search.is_shared_N]
    interval = difference_interval(one.nll_N, torch.zeros_like(one.nll_N), samples_N)
    to_chosen = difference_interval(one.nll_N, chosen.nll_N, samples_N)
    return {
        "name": describe(one.fusion),
        "nll": finite(one.nll),
        "num_tokens": len(one.nll_N),
        "nll_all_tokens": finite(one.nll_all),
        "fusion": to_recipe(one.fusion),
        "calibration": one.calibration,
        "is_chosen": one is chosen,
        "interval": _edges(interval),
        "interval_to_chosen": _edges(to_chosen),
        **_weight_measures(one, search),
        "domains": _domain_nll(one.nll_N, search.scalars.targets, search.is_shared_N),
    }


def _edges(interval: tuple[float, float] | None) -> list[float | None] | None:
    return None if interval is None else [finite(edge) for edge in interval]


def _weight_measures(one: Candidate, search: Search) -> dict[str, Any]:
    """Whether the weights favor the right teacher, and what they cost; None where scalars alone do not give the weights."""
    scalars, fusion = search.scalars, one.fusion
    if fusion.weighting.needs_consensus and fusion.temperatures:
        return {"rank_correlation": None, "best_teacher_share": None, "regret": None}
    stats = scalars.stats(fusion.temperatures, scalars.teachers)
    weights_KN = search.weights(one)
    label_logp_KN = stats.label_logp_KN[:, search.is_shared_N]
    costs = regret(one.nll_N, label_logp_KN)
    return {
        "rank_correlation": rank_correlation(weights_KN, -label_logp_KN),
        "best_teacher_share": best_teacher_share(weights_KN, -label_logp_KN),
        "regret": {name: finite(value) for name, value in costs.items()},
    }


def _domain_nll(nll_N: Tensor, targets: Targets, is_shared_N: Tensor) -> dict[str, float | None]:
    domains_N = torch.from_numpy(targets.domains_N)[is_shared_N]
    found = {}
    for number, domain in enumerate(targets.domains):
        of_domain_N = domains_N == number
        if of_domain_N.any():
            found[domain] = finite(float(nll_N[of_domain_N].mean()))
    return found


def _findings(
    search: Search,
    ranked: Sequence[Candidate],
    chosen: Candidate,
    metrics: Mapping[str, Metrics],
) -> Findings:
    scalars, fusion = search.scalars, chosen.fusion
    shares = scalars.shares(fusion.weighting, _readable(fusion))
    uniform = search.linear(Uniform(), {})
    single = search.linear(BestSingle(teacher=search.best_single), {})
    alone = (BestSingle, Route)
    several = [one for one in ranked if not isinstance(one.fusion.weighting, alone)]
    return Findings(
        fusion_name=describe(fusion),
        num_tokens=len(chosen.nll_N),
        nll=chosen.nll,
        uniform_nll=uniform.nll,
        best_single=search.best_single,
        best_single_nll=single.nll,
        best_several_nll=several[0].nll if several and len(shares) > 1 else None,
        shares=shares,
        rises=_idle_teachers(scalars, chosen),
        overconfidence={name: one.overconfidence for name, one in metrics.items()},
    )


def _idle_teachers(scalars: Scalars, chosen: Candidate) -> dict[str, float]:
    """Teachers that can be left out together, and by how much the NLL rises when each goes: each by less than 0.002 nats.

    They go one after the other, the least useful first, so that of two equal teachers one stays. The rise is that of the linear pool
    with the chosen weighting and temperatures, also when the chosen pool is log-linear.
    """
    weighting = chosen.fusion.weighting
    left = [name for name in scalars.teachers if not weighting.excludes(name)]
    idle = {name: 0.0 for name in scalars.teachers if name not in left}
    while len(left) > 1:
        rises = _rises(scalars, chosen, left)
        least = min(rises, key=lambda name: rises[name])
        # Not judged by its weight: the specialist of a rare domain has little, and is missed when it goes.
        if rises[least] >= SAME_NLL:
            break
        idle[least] = rises[least]
        left.remove(least)
    return idle


def _leave_one_out(scalars: Scalars, chosen: Candidate) -> dict[str, float | None]:
    """How far the NLL of the linear pool with the chosen weighting and temperatures rises without each teacher, one at a time."""
    weighting = chosen.fusion.weighting
    members = [name for name in scalars.teachers if not weighting.excludes(name)]
    rises = _rises(scalars, chosen, members) if len(members) > 1 else {}
    return {name: finite(rises.get(name, 0.0)) for name in scalars.teachers if name in rises}


def _readable(fusion: Fusion) -> Mapping[str, float]:
    """The temperatures at which scalars know the weights: a consensus is measured of the raw teachers alone."""
    return {} if fusion.weighting.needs_consensus else fusion.temperatures


def _rises(scalars: Scalars, chosen: Candidate, members: Sequence[str]) -> dict[str, float]:
    """Rise of the NLL when each member goes; infinite where nobody with weight is left at some row."""
    weighting, temperatures = chosen.fusion.weighting, _readable(chosen.fusion)
    now = float(scalars.linear_nll(weighting, temperatures, members).mean())
    rises = {}
    for name in members:
        others = [other for other in members if other != name]
        rise = float(scalars.linear_nll(weighting, temperatures, others).mean()) - now
        rises[name] = math.inf if math.isnan(rise) else rise
    return rises
