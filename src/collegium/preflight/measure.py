"""Measurement of the teachers on the calibration split, and the choice of a fusion.

Shapes: N rows of the calibration split, K teachers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from collegium.console import OnProgress
from collegium.data.windows import PackedDataset
from collegium.distributions import Teacher
from collegium.errors import CollegiumError
from collegium.evaluate.metrics import Metrics
from collegium.evaluate.scoring import Windows, unique_scorers
from collegium.fusion.calibration import TemperatureTables, fit_temperature, grid_end
from collegium.fusion.options import describe, to_recipe
from collegium.fusion.weighting import SCALAR_BYTES
from collegium.preflight import weight_quality
from collegium.preflight.advice import findings_of, verdict_sentences
from collegium.preflight.held_out import held_out_report
from collegium.preflight.search import POOLED_GRID, Candidate, Search, choose
from collegium.preflight.sweeps import NUM_BYTES, sweep_teachers
from collegium.storage import records

STEP_COSTS = {"temperatures": 5000.0, "fusions": 15_000.0, "validation": 3000.0}
"""FLOP per logit of a teacher that take as long as each step, the product with a head included."""


def logit_bytes(memory: int, num_teachers: int, num_tokens: int) -> int:
    """Return the part of `memory` that is left for logits, at most that which speeds them up."""
    return max(0, min(NUM_BYTES, memory - SCALAR_BYTES * num_teachers * num_tokens))


def run_preflight(
    teachers: Sequence[Teacher],
    dataset: PackedDataset,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    extended: bool = False,
    held_out: PackedDataset | None = None,
    memory: int = 2 * 10**9,
    begin: Callable[[str], OnProgress] | None = None,
) -> records.PreflightReport:
    """Measure teachers and fusions on the calibration split, and choose the fusion of lowest NLL.

    Every weighting is tried as a linear pool, from one sweep that keeps scalars only. A second
    sweep tries the best rule of each class in every pool, raw and with temperatures, with and
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
        extended: also try fitted weights, the learned gate, the consensus rule and the power mean,
            and measure the route by domain, which is never chosen over a fusion.
        held_out: the validation split, of which about `max_tokens` are read.
        memory: bytes for logits and the scalars of all tokens, besides the weights.
        begin: called with the name of each step of `STEP_COSTS`. Returns the callback for the
            numbers of finished and of all batches.

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
    begin = begin or (lambda step: lambda done, total: None)
    split = Windows.spread(dataset, batch_size, max_tokens, begin("temperatures"))
    num_bytes = logit_bytes(memory, len(teachers), int(split.counts().sum()))
    # Only rules of the extended search read the consensus.
    with_consensus = extended and len(teachers) > 1
    scalars = sweep_teachers(teachers, split, with_consensus=with_consensus, num_bytes=num_bytes)
    tables = scalars.tables
    metrics = {name: scalars.metrics(name) for name in tables.teachers}
    best_single = min(metrics, key=lambda name: metrics[name].nll)
    whole = replace(split, progress=begin("fusions"))
    search = Search(
        teachers, scalars, whole, best_single=best_single, extended=extended, num_bytes=num_bytes
    )
    ranked = search.ranked()
    chosen = choose(ranked)
    findings = findings_of(search, ranked, chosen, metrics)
    measures = {name: _teacher(scored, tables, name) for name, scored in metrics.items()}
    more: dict[str, Any] = {}
    if held_out is not None:
        unseen = Windows.spread(held_out, batch_size, max_tokens, begin("validation"))
        temperatures = {name: measure.temperature for name, measure in measures.items()}
        more["held_out"] = held_out_report(teachers, chosen.fusion, unseen, temperatures)
    return records.PreflightReport(
        num_tokens=len(scalars.targets),
        teachers=measures,
        disagreement=records.Disagreement(
            teachers=tables.teachers, jsd=scalars.jsd_KK.tolist(), top1=scalars.differs_KK.tolist()
        ),
        fusions=[_fusion(candidate, chosen, search) for candidate in ranked],
        chosen=records.ChosenFusion(
            name=describe(chosen.fusion),
            nll=chosen.nll,
            fusion=to_recipe(chosen.fusion),
            grid_ends=_grid_ends(chosen, tables),
            weights=findings.mean_weights,
            leave_one_out=findings.leave_one_out,
        ),
        best_single=records.BestTeacher(teacher=findings.best_single, nll=findings.best_single_nll),
        verdict=verdict_sentences(findings),
        seconds=time.perf_counter() - started,
        **more,
    )


def _teacher(metrics: Metrics, tables: TemperatureTables, name: str) -> records.TeacherMeasure:
    temperature = fit_temperature(tables, name)
    scores, calibration = metrics.scores(), metrics.calibration()
    figures = {"nll", "perplexity", "entropy", "ece", "overconfidence", "top1"}
    return records.TeacherMeasure(
        **scores.model_dump(include=figures),
        **calibration.model_dump(include={"ece_over", "ece_under"}),
        temperature=temperature,
        grid_end=grid_end(tables.grid, temperature),
        domains={domain: score.nll for domain, score in scores.domains.items()},
    )


def _fusion(candidate: Candidate, chosen: Candidate, search: Search) -> records.CandidateFusion:
    targets, nll_N = search.scalars.targets, candidate.nll_N
    samples_N = torch.from_numpy(targets.samples_N)[search.is_shared_N]
    # The shared tokens may lack a domain.
    masks = {d: torch.from_numpy(m_N)[search.is_shared_N] for d, m_N in targets.by_domain()}
    return records.CandidateFusion(
        name=describe(candidate.fusion),
        nll=candidate.nll,
        num_tokens=len(nll_N),
        nll_all_tokens=candidate.nll_all,
        fusion=to_recipe(candidate.fusion),
        calibration=candidate.calibration,
        grid_ends=_grid_ends(candidate, search.scalars.tables),
        is_chosen=candidate is chosen,
        interval=weight_quality.difference_interval(nll_N, torch.zeros_like(nll_N), samples_N),
        interval_to_chosen=weight_quality.difference_interval(nll_N, chosen.nll_N, samples_N),
        **_weight_measures(candidate, search),
        domains={d: float(nll_N[mask_N].mean()) for d, mask_N in masks.items() if mask_N.any()},
    )


def _grid_ends(candidate: Candidate, tables: TemperatureTables) -> dict[str, records.GridEnd]:
    """Temperatures of a candidate that are an end of those tried, by name."""
    fusion = candidate.fusion
    ends: dict[str, records.GridEnd | None] = {
        name: grid_end(tables.grid, value) for name, value in fusion.temperatures.items()
    }
    ends["pooled_temperature"] = grid_end(POOLED_GRID, fusion.pooled_temperature)
    return {name: end for name, end in ends.items() if end is not None}


def _weight_measures(candidate: Candidate, search: Search) -> dict[str, Any]:
    """Measure whether weights favor the right teacher, or None if scalars do not determine them."""
    fusion = candidate.fusion
    # The consensus is stored for the raw teachers only.
    if fusion.weighting.needs_consensus and fusion.temperatures:
        return {"rank_correlation": None, "best_teacher_share": None, "regret": None}
    weights_KN = search.weights(candidate)
    stats = search.scalars.tables.stats(fusion.temperatures)
    label_logp_KN = stats.label_logp_KN[:, search.is_shared_N]
    return {
        "rank_correlation": weight_quality.rank_correlation(weights_KN, -label_logp_KN),
        "best_teacher_share": weight_quality.best_teacher_share(weights_KN, -label_logp_KN),
        "regret": weight_quality.regret(candidate.nll_N, label_logp_KN),
    }
