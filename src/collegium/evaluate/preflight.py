"""Before any training: how good, how calibrated and how different the teachers are, and which fusion to use.

Shapes: N rows of the calibration split, K teachers, F fusions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.data.pack import PackedDataset
from collegium.errors import CollegiumError
from collegium.evaluate.advice import Findings, verdict_sentences
from collegium.evaluate.metrics import Metrics, Targets, finite
from collegium.evaluate.scoring import (
    Progress,
    Scorer,
    distinct_scorers,
    spread_windows,
    window_counts,
)
from collegium.evaluate.sweeps import Calibration, Scalars, sweep_fusions, sweep_teachers
from collegium.fusion.calibration import (
    fit_joint_temperatures,
    fit_pooled_temperature,
    fit_temperature,
)
from collegium.fusion.pooling import Fusion, describe, to_recipe
from collegium.fusion.weights import BestSingle, Entropy, PrefixLikelihood, Uniform, Weighting

FULL_TOKENS = 8192
"""Tokens on which all fusions are compared: log-linear pools and pooled temperatures need whole distributions."""

FIT_TOKENS = 4096
"""Tokens on which a pooled temperature is fitted."""

NUM_SWEPT = 3
"""How many weightings, the best by scalars, are tried with a log-linear pool."""

SAME_NLL = 0.002
"""Nats per token within which two fusions count as equally good."""

POOLED_GRID = tuple(2.0 ** (step / 4) for step in range(-3, 5))
"""Grid of the pooled temperature, 0.6 to 2."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A fusion and what its fused target scores."""

    fusion: Fusion
    nll_N: Tensor
    """(N,) float64 nats on the tokens shared by all candidates."""
    nll_all: float | None = None
    """Mean over all calibration tokens, where scalars alone give it."""

    @property
    def nll(self) -> float:
        """Mean nats per token on the shared tokens."""
        return float(self.nll_N.mean())

    @property
    def calibration(self) -> str:
        """`raw`, `temperatures`, `pooled` or `temperatures+pooled`."""
        parts = ["temperatures"] if self.fusion.temperatures else []
        parts += ["pooled"] if self.fusion.pooled_temperature != 1.0 else []
        return "+".join(parts) or "raw"

    @property
    def complexity(self) -> tuple[int, bool]:
        """Number of fitted parts, and whether the pool is log-linear."""
        num_fitted = 0 if self.calibration == "raw" else 1 + self.calibration.count("+")
        return num_fitted, self.fusion.pool == "log_linear"


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


def default_weightings(best_single: str) -> list[Weighting]:
    """The rules that a pre-flight compares when it is given no candidates."""
    weightings: list[Weighting] = [
        Uniform(),
        BestSingle(teacher=best_single),
        Entropy(form="softmax", granularity="token"),
        Entropy(form="inverse", granularity="token"),
        Entropy(form="complement", granularity="token"),
        Entropy(form="softmax", granularity="sequence"),
    ]
    for eta, decay in ((0.1, 0.95), (0.2, 0.95), (0.3, 0.9), (0.5, 0.9)):
        weightings.append(PrefixLikelihood(eta=eta, decay=decay))
    return weightings


def run_preflight(
    teachers: Sequence[Scorer],
    dataset: PackedDataset,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    candidates: Sequence[Fusion] | None = None,
    progress: Progress | None = None,
) -> Preflight:
    """Measure the teachers and their fusions on the calibration split, and choose the fusion of lowest NLL.

    Linear pools come from one sweep of scalars; log-linear pools are tried for the best three weightings, and a pooled
    temperature for the best of each kind of pool, with and without temperatures of its teachers. All fusions are ranked on
    the same (at most about 8192) tokens. Of those within 0.002 nats of the best, the simplest is chosen: fewer fitted
    temperatures, then linear before log-linear.

    Temperatures are fitted on tokens that the ranking reads, too, and the chosen fusion is the best of many on them, so the
    NLL of a fitted or chosen fusion is optimistic here: in the order of (fitted temperatures) / (tokens) nats for the fit,
    were tokens independent, and by what the choice adds. The tie of 0.002 nats is there for that. What the fusion is worth
    is said by the evaluation, which reads the validation split alone.

    Args:
        teachers: the frozen models.
        dataset: the calibration split.
        batch_size: windows per forward pass.
        max_tokens: about how many target tokens to read, in windows spread over the split; None for all.
        candidates: fusions to compare as they are, beside uniform weights and the best single teacher; None tries the usual ones.
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
    distinct_scorers(teachers, ())
    windows = spread_windows(dataset, max_tokens)
    split = Calibration(dataset, windows, batch_size, progress)
    scalars = sweep_teachers(teachers, split)
    metrics = {name: scalars.metrics(name) for name in scalars.teachers}
    best_single = min(metrics, key=lambda name: metrics[name].nll)
    search = _Search(teachers, scalars, split, best_single)
    ranked = search.compare(candidates)
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
        "fusions": [_fusion_report(one, search) for one in ranked],
        "chosen": {
            "name": describe(chosen.fusion),
            "nll": finite(chosen.nll),
            "fusion": to_recipe(chosen.fusion),
            "weights": findings.shares,
        },
        "best_single": {"teacher": best_single, "nll": finite(findings.best_single_nll)},
        "verdict": verdict_sentences(findings),
    }
    report["seconds"] = time.perf_counter() - started
    return Preflight(chosen.fusion, report)


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of lowest NLL, or the simplest of those within 0.002 nats of it."""
    lowest = min(one.nll for one in candidates)
    close = [one for one in candidates if one.nll <= lowest + SAME_NLL]
    return min(close, key=lambda one: (one.complexity, one.nll))


class _Search:
    """The fusions that are compared, and what they are compared on."""

    def __init__(
        self, teachers: Sequence[Scorer], scalars: Scalars, split: Calibration, best_single: str
    ) -> None:
        self.teachers = teachers
        self.scalars = scalars
        self.best_single = best_single
        self.full, self.is_shared_N = _part(split, FULL_TOKENS)
        self._fit, _ = _part(self.full, FIT_TOKENS)

    def compare(self, candidates: Sequence[Fusion] | None) -> list[Candidate]:
        """All candidates from the lowest NLL to the highest."""
        if candidates is None:
            found = self._usual()
        else:
            baselines = [Uniform(), BestSingle(teacher=self.best_single)]
            found = [self.linear(weighting, {}) for weighting in baselines]
            known = [one.fusion for one in found]
            found += self._swept([fusion for fusion in candidates if fusion not in known])
        return sorted(found, key=lambda one: (one.nll, one.complexity))

    def linear(self, weighting: Weighting, temperatures: Mapping[str, float]) -> Candidate:
        """A linear pool, from scalars alone."""
        fusion = Fusion(weighting=weighting, temperatures=dict(temperatures))
        nll_N = self.scalars.linear_nll(weighting, temperatures)
        return Candidate(fusion, nll_N[self.is_shared_N], float(nll_N.mean()))

    def _usual(self) -> list[Candidate]:
        if len(self.teachers) == 1:
            weightings: list[Weighting] = [BestSingle(teacher=self.best_single)]
        else:
            weightings = default_weightings(self.best_single)
        scored = []
        for weighting in weightings:
            tables = self.scalars.tables
            temperatures = _fitted(fit_joint_temperatures(tables, weighting))
            pair = [self.linear(weighting, {})]
            if temperatures:
                pair.append(self.linear(weighting, temperatures))
            scored.append(pair)
        linear = [one for pair in scored for one in pair]
        mixing = [pair for pair in scored if not isinstance(pair[0].fusion.weighting, BestSingle)]
        mixing.sort(key=lambda pair: min(one.nll for one in pair))
        best = mixing[:NUM_SWEPT]
        log_linear = self._swept(self._log_linear([pair[0].fusion for pair in best]))
        swept = log_linear + self._swept(self._pooled([*log_linear, *(c for p in best for c in p)]))
        return linear + swept

    def _log_linear(self, fusions: Sequence[Fusion]) -> list[Fusion]:
        """The log-linear pools of the same weightings, raw and with temperatures."""
        # In a product every teacher answers for every token, so each is calibrated on its own.
        tables = self.scalars.tables
        alone = {name: fit_temperature(tables, name) for name in self.scalars.teachers}
        raw = [dataclasses.replace(fusion, pool="log_linear") for fusion in fusions]
        return raw + [dataclasses.replace(fusion, temperatures=alone) for fusion in raw]

    def _pooled(self, candidates: Sequence[Candidate]) -> list[Fusion]:
        """A fitted pooled temperature for the best candidate of each pool, with and without temperatures."""
        best: dict[tuple[str, str], Candidate] = {}
        for one in sorted(candidates, key=lambda one: one.nll):
            best.setdefault((one.fusion.pool, one.calibration), one)
        if not best:
            return []
        with torch.no_grad():
            batches = list(self._fit.answers(self.teachers))
        pooled = []
        for base in best.values():
            temperature = fit_pooled_temperature(base.fusion, batches, grid=POOLED_GRID)
            if temperature != 1.0:
                pooled.append(dataclasses.replace(base.fusion, pooled_temperature=temperature))
        return pooled

    def _swept(self, fusions: Sequence[Fusion]) -> list[Candidate]:
        if not fusions:
            return []
        nll_FN = sweep_fusions(self.teachers, self.full, fusions)
        return [Candidate(fusion, nll_N) for fusion, nll_N in zip(fusions, nll_FN, strict=True)]


def _part(split: Calibration, max_tokens: int) -> tuple[Calibration, Tensor]:
    """Evenly spread windows of a split with about `max_tokens` targets, and which of its rows (N,) they hold."""
    counts = window_counts(split.dataset, split.windows)
    size = len(counts)
    wanted = max(1, min(size, round(size * max_tokens / max(1, sum(counts)))))
    kept = [int(at) for at in np.linspace(0, size, wanted, endpoint=False)]
    is_kept = torch.zeros(size, dtype=torch.bool)
    is_kept[kept] = True
    windows = [split.windows[at] for at in kept]
    part = dataclasses.replace(split, windows=windows)
    return part, is_kept.repeat_interleave(torch.tensor(counts))


def _fitted(temperatures: Mapping[str, float]) -> dict[str, float]:
    """Without those that stayed at 1."""
    return {name: value for name, value in temperatures.items() if value != 1.0}


def _teacher_report(scalars: Scalars, metrics: Metrics) -> dict[str, Any]:
    return {
        "nll": finite(metrics.nll),
        "perplexity": finite(metrics.perplexity),
        "entropy": finite(metrics.entropy),
        "ece": finite(metrics.ece),
        "overconfidence": finite(metrics.overconfidence),
        "temperature": finite(fit_temperature(scalars.tables, metrics.name)),
        "top1": finite(metrics.top1),
        "domains": {domain: row["nll"] for domain, row in metrics.by_domain().items()},
    }


def _fusion_report(one: Candidate, search: _Search) -> dict[str, Any]:
    return {
        "name": describe(one.fusion),
        "nll": finite(one.nll),
        "num_tokens": len(one.nll_N),
        "nll_all_tokens": finite(one.nll_all),
        "fusion": to_recipe(one.fusion),
        "calibration": one.calibration,
        "domains": _domain_nll(one.nll_N, search.scalars.targets, search.is_shared_N),
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
    search: _Search,
    ranked: Sequence[Candidate],
    chosen: Candidate,
    metrics: Mapping[str, Metrics],
) -> Findings:
    scalars, fusion = search.scalars, chosen.fusion
    shares = scalars.shares(fusion.weighting, fusion.temperatures)
    uniform = search.linear(Uniform(), {})
    single = search.linear(BestSingle(teacher=search.best_single), {})
    several = [one for one in ranked if not isinstance(one.fusion.weighting, BestSingle)]
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
    weighting, temperatures = chosen.fusion.weighting, chosen.fusion.temperatures
    left = [name for name in scalars.teachers if not weighting.excludes(name)]
    idle = {name: 0.0 for name in scalars.teachers if name not in left}
    while len(left) > 1:
        now = float(scalars.linear_nll(weighting, temperatures, left).mean())
        rises = {}
        for name in left:
            others = [other for other in left if other != name]
            rises[name] = float(scalars.linear_nll(weighting, temperatures, others).mean()) - now
        least = min(rises, key=lambda name: rises[name])
        # Not judged by its weight: the specialist of a rare domain has little, and is missed when it goes.
        if rises[least] >= SAME_NLL:
            break
        idle[least] = rises[least]
        left.remove(least)
    return idle
