"""The fusions that a preflight compares, fitted on one half of the documents, scored on the other.

Shapes: N rows of the calibration split, K teachers, F fusions, G pooled temperatures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from collegium.distributions import Teacher
from collegium.evaluate.folds import Fits, Rule, balanced_folds
from collegium.evaluate.scoring import window_counts
from collegium.evaluate.sweeps import CalibrationSplit, Scalars, sweep_fusions
from collegium.fusion.calibration import temperature_of_least_nll
from collegium.fusion.fuse import Fusion
from collegium.fusion.pools import PoolKind
from collegium.fusion.requirements import check, fusion_requirements
from collegium.fusion.routing import Route
from collegium.fusion.rules import CalibratedEntropy, Consensus, DomainWeights, Gate
from collegium.fusion.weights import (
    BestSingle,
    Entropy,
    Fixed,
    PrefixLikelihood,
    Uniform,
    Weighting,
)

# Products and pooled temperatures need whole distributions: on a CPU, 8192 tokens took a quarter of
# an hour, 4096 take minutes.
FULL_TOKENS = 4096
"""Approximate number of tokens on which all fusions are compared."""

SAME_NLL = 0.002
"""Nats per token within which two fusions count as equally good."""

POOLED_GRID = tuple(2.0 ** (step / 4) for step in range(-2, 4))
"""Grid of the pooled temperature, 0.7 to 1.7. It contains 1, which means none."""

STANDARD_POOLS: tuple[PoolKind, ...] = ("linear", "log_linear")
ALL_POOLS: tuple[PoolKind, ...] = (*STANDARD_POOLS, "power_mean")

FITTED = (Fixed, DomainWeights, CalibratedEntropy, Route, Gate)
"""Weightings with fitted parameters."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A fusion and the NLL of its fused target."""

    fusion: Fusion
    """Fusion fitted on all calibration rows."""
    nll_N: Tensor
    """(N,) float64 nats on the shared tokens, each under the fusion fitted on the other half."""
    nll_all: float | None = None
    """Mean over all calibration tokens, or None if scalars are not enough to compute it."""
    by_fold: tuple[Fusion, Fusion] | None = None
    """Fusions that score the first and the second fold, or None if both equal `fusion`."""

    @property
    def nll(self) -> float:
        """Mean NLL in nats per token on the shared tokens."""
        return float(self.nll_N.mean())

    @property
    def calibration(self) -> str:
        """`raw`, `temperatures`, `pooled` or `temperatures+pooled`."""
        parts = ["temperatures"] if self.fusion.temperatures else []
        parts += ["pooled"] if self.fusion.pooled_temperature != 1.0 else []
        return "+".join(parts) or "raw"

    @property
    def complexity(self) -> tuple[int, bool]:
        """Number of fitted parts, and whether the pool is not linear."""
        num_fitted = 0 if self.calibration == "raw" else 1 + self.calibration.count("+")
        num_fitted += isinstance(self.fusion.weighting, FITTED)
        return num_fitted, self.fusion.pool != "linear"


def default_rules(best_single: str) -> list[Rule]:
    """Return the rules compared by default, none of which has fitted parameters."""
    rules = [
        Rule.plain(Uniform(), "uniform"),
        Rule.plain(BestSingle(teacher=best_single), "best_single"),
        Rule.plain(Entropy(form="softmax", granularity="token"), "entropy"),
        Rule.plain(Entropy(form="inverse", granularity="token"), "entropy"),
        Rule.plain(Entropy(form="complement", granularity="token"), "entropy"),
        Rule.plain(Entropy(form="softmax", granularity="sequence"), "entropy"),
    ]
    # Decay 0.5 is too short: 5.52 nats, against 5.09 to 5.10 with these (docs/results/fusion.md).
    for eta, decay in ((0.1, 0.95), (0.2, 0.95), (0.3, 0.9), (0.5, 0.9)):
        weighting = PrefixLikelihood(eta=eta, decay=decay)
        rules.append(Rule.plain(weighting, "prefix_likelihood"))
    return rules


def fitted_rules(domains: Sequence[str], *, has_consensus: bool) -> list[Rule]:
    """Return the rules fitted on calibration text, and the consensus rule if it is available."""
    rules = [
        Rule(Fits.constant_weights, "fixed"),
        Rule(Fits.calibrated_entropy, "calibrated_entropy"),
        Rule(Fits.gate, "gate"),
    ]
    if has_consensus:
        rules.append(Rule.plain(Consensus(), "consensus"))
    if len(domains) > 1:
        rules.append(Rule(Fits.domain_weights, "domain_weights"))
        rules.append(Rule(Fits.route, "route", is_single=True))
    return rules


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """Return the simplest candidate within 0.002 nats of the lowest NLL.

    A route is chosen only if there is nothing else: it is measured for comparison, and giving up
    fusion is left to the recipe.
    """
    fusing = [c for c in candidates if not isinstance(c.fusion.weighting, Route)]
    candidates = fusing or candidates
    lowest = min(candidate.nll for candidate in candidates)
    # The lowest of many NLLs is optimistic, so small differences count as ties.
    close = [candidate for candidate in candidates if candidate.nll <= lowest + SAME_NLL]
    return min(close, key=lambda candidate: (candidate.complexity, candidate.nll))


class Search:
    """Fits and compares fusions on a calibration split.

    Every weighting is tried as a linear pool, raw and with temperatures, from scalars only. One
    sweep over whole distributions then tries the best of each family of weightings in every pool,
    with and without temperatures, with and without a pooled temperature.

    Each fusion is fitted three times: on all documents for use, and on each half to score the
    other. Every token is thus scored under parameters that have not seen it, and a rule with more
    parameters has no advantage. User-supplied candidates are compared unchanged. Teachers out of a
    per-teacher cache are compared as linear pools, from scalars and on all tokens.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        scalars: Scalars,
        split: CalibrationSplit,
        *,
        best_single: str,
        candidates: Sequence[Fusion] | None,
        extended: bool = False,
    ) -> None:
        self.teachers = teachers
        self._stored_at = stored_at = teachers[0].capabilities.temperatures
        self.scalars = scalars
        self.best_single = best_single
        self._is_extended = extended
        self._candidates = candidates
        self._full, self.is_shared_N = _subset(
            split, None if stored_at is not None else FULL_TOKENS
        )
        samples_N = torch.from_numpy(scalars.targets.samples_N)
        domains_N = torch.from_numpy(scalars.targets.domains_N)
        fold_N = balanced_folds(samples_N, scalars.rows.documents, domains_N)
        self.is_second_N = fold_N == 1
        """(N,) whether each row belongs to the second fold."""
        all_rows_N = torch.ones_like(self.is_second_N)
        self._all = Fits(scalars, all_rows_N)
        # Each fold is scored under the fit of the other. Without a second fold, all rows are scored
        # under their own fit.
        self._by_fold = (self._all, self._all)
        if self.is_second_N.any():
            self._by_fold = (Fits(scalars, self.is_second_N), Fits(scalars, ~self.is_second_N))

    def ranked(self) -> list[Candidate]:
        """Return all candidates, lowest NLL first."""
        if self._candidates is None:
            candidates = self._default_candidates()
        else:
            baselines = [Uniform(), BestSingle(teacher=self.best_single)]
            candidates = [self.linear(weighting, {}) for weighting in baselines]
            done = [candidate.fusion for candidate in candidates]
            candidates += self._unchanged([f for f in self._candidates if f not in done])
        return sorted(candidates, key=lambda candidate: (candidate.nll, candidate.complexity))

    def linear(self, weighting: Weighting, temperatures: Mapping[str, float]) -> Candidate:
        """Score a linear pool with fixed parameters from scalars."""
        fusion = Fusion(weighting=weighting, temperatures=dict(temperatures))
        return self._from_scalars((fusion, fusion, fusion))

    def weights(self, candidate: Candidate) -> Tensor:
        """Return (K, N) float64 weights at the shared rows, of the fusion that scores each row."""
        first, second = candidate.by_fold or (candidate.fusion, candidate.fusion)
        weights_KN = self.scalars.weights(first.weighting, first.temperatures)
        if candidate.by_fold is not None:
            other_KN = self.scalars.weights(second.weighting, second.temperatures)
            weights_KN = torch.where(self.is_second_N, other_KN, weights_KN)
        return weights_KN[:, self.is_shared_N]

    def _unchanged(self, fusions: Sequence[Fusion]) -> list[Candidate]:
        if self._stored_at is None:
            return self._sweep(
                [(fusion, fusion, fusion) for fusion in fusions], temperatures=(1.0,)
            )
        for fusion in fusions:
            check(fusion_requirements(fusion), [t.capabilities for t in self.teachers])
        return [self.linear(fusion.weighting, fusion.temperatures) for fusion in fusions]

    def _default_candidates(self) -> list[Candidate]:
        if len(self.teachers) == 1:
            rules = [Rule.plain(BestSingle(teacher=self.best_single), "best_single")]
        else:
            rules = default_rules(self.best_single)
            if self._is_extended:
                has_consensus = self.scalars.consensus_kl_KN is not None
                rules += fitted_rules(self.scalars.targets.domains, has_consensus=has_consensus)
        linear: list[Candidate] = []
        best: dict[str, tuple[float, Rule]] = {}
        for rule in rules:
            candidates = self._linear_candidates(rule)
            linear += candidates
            nll = min(candidate.nll for candidate in candidates)
            if rule.family not in best or nll < best[rule.family][0]:
                best[rule.family] = (nll, rule)
        if self._stored_at is not None:
            return linear
        pools = ALL_POOLS if self._is_extended else STANDARD_POOLS
        # Only the best rule of each family, since every fusion here needs whole distributions.
        tried = [
            self._fit(rule, pool, calibrated=calibrated)
            for _, rule in best.values()
            for pool in (pools[:1] if rule.is_single else pools)
            for calibrated in (False, True)
        ]
        # Temperatures that all stayed at 1 give the same fusion twice.
        settings = list({repr(fusions[0]): fusions for fusions in reversed(tried)}.values())
        swept = self._sweep(settings, temperatures=POOLED_GRID)
        # Scalars score a linear pool on all tokens, so their candidate wins over that of the sweep.
        scored = {repr(candidate.fusion) for candidate in linear}
        return linear + [new for new in swept if repr(new.fusion) not in scored]

    def _linear_candidates(self, rule: Rule) -> list[Candidate]:
        """Score the linear pool of the raw teachers, and of the calibrated ones if that differs."""
        settings = [self._fit(rule, "linear", calibrated=False)]
        # The consensus at other temperatures needs whole distributions.
        if not settings[0][0].weighting.needs_consensus:
            settings.append(self._fit(rule, "linear", calibrated=True))
        return [
            self._from_scalars(fusions)
            for number, fusions in enumerate(settings)
            if number == 0 or fusions[0].temperatures
        ]

    def _fit(
        self, rule: Rule, pool: PoolKind, *, calibrated: bool
    ) -> tuple[Fusion, Fusion, Fusion]:
        """Fit a rule on all rows, and for scoring the first and the second fold."""
        fits = (self._all, *self._by_fold)
        first, second, third = (rule.fusion(fit, pool, calibrated=calibrated) for fit in fits)
        return first, second, third

    def _from_scalars(self, fusions: tuple[Fusion, Fusion, Fusion]) -> Candidate:
        fusion, *by_fold = fusions
        nll_N = self.scalars.linear_nll(by_fold[0].weighting, by_fold[0].temperatures)
        if by_fold[1] != by_fold[0]:
            other_N = self.scalars.linear_nll(by_fold[1].weighting, by_fold[1].temperatures)
            nll_N = torch.where(self.is_second_N, other_N, nll_N)
        return Candidate(
            fusion, nll_N[self.is_shared_N], float(nll_N.mean()), _fold_fusions(fusions)
        )

    def _sweep(
        self,
        settings: Sequence[tuple[Fusion, Fusion, Fusion]],
        *,
        temperatures: Sequence[float],
    ) -> list[Candidate]:
        """Score each setting without a pooled temperature, and with one if that differs."""
        if not settings:
            return []
        pairs = [(first, second) for _, first, second in settings]
        is_second_N = self.is_second_N[self.is_shared_N]
        # One pass over the teachers for all fusions, folds and pooled temperatures.
        nll_FGN = sweep_fusions(self.teachers, self._full, pairs, is_second_N, temperatures)
        raw = temperatures.index(1.0)
        candidates = []
        for fusions, nll_GN in zip(settings, nll_FGN, strict=True):
            candidates.append(Candidate(fusions[0], nll_GN[raw], by_fold=_fold_fusions(fusions)))
            if len(temperatures) > 1:
                candidates += self._with_pooled_temperature(fusions, nll_GN, is_second_N)
        return candidates

    def _with_pooled_temperature(
        self, fusions: tuple[Fusion, Fusion, Fusion], nll_GN: Tensor, is_second_N: Tensor
    ) -> list[Candidate]:
        """Score a setting at the pooled temperature of the other fold. Empty if all are 1."""
        raw = POOLED_GRID.index(1.0)
        is_first_N = ~is_second_N
        # at[i] scores fold i and is fitted on the other fold.
        parts = (is_second_N, is_first_N) if is_second_N.any() and is_first_N.any() else ()
        at = [int(nll_GN[:, part_N].mean(1).argmin()) for part_N in parts]
        at = at or [int(nll_GN.mean(1).argmin())] * 2
        # Only the final temperature is interpolated. The folds are scored on the grid of the sweep.
        temperature = temperature_of_least_nll(POOLED_GRID, nll_GN.mean(1))
        if at == [raw, raw] and POOLED_GRID[int(nll_GN.mean(1).argmin())] == 1.0:
            return []
        nll_N = torch.where(is_second_N, nll_GN[at[1]], nll_GN[at[0]])
        values = (temperature, POOLED_GRID[at[0]], POOLED_GRID[at[1]])
        fusion, first, second = (
            dataclasses.replace(fold_fusion, pooled_temperature=value)
            for fold_fusion, value in zip(fusions, values, strict=True)
        )
        return [Candidate(fusion, nll_N, by_fold=_fold_fusions((fusion, first, second)))]


def _fold_fusions(fusions: tuple[Fusion, Fusion, Fusion]) -> tuple[Fusion, Fusion] | None:
    return None if fusions[0] == fusions[1] == fusions[2] else fusions[1:]


def _subset(split: CalibrationSplit, max_tokens: int | None) -> tuple[CalibrationSplit, Tensor]:
    """Select evenly spread windows with about `max_tokens` targets, and a row mask (N,)."""
    counts = window_counts(split.dataset, split.windows)
    size = len(counts)
    max_tokens = sum(counts) if max_tokens is None else max_tokens
    num_windows = max(1, min(size, round(size * max_tokens / max(1, sum(counts)))))
    kept = [int(at) for at in np.linspace(0, size, num_windows, endpoint=False)]
    is_kept = torch.zeros(size, dtype=torch.bool)
    is_kept[kept] = True
    windows = [split.windows[at] for at in kept]
    subset = dataclasses.replace(split, windows=windows)
    return subset, is_kept.repeat_interleave(torch.tensor(counts))
