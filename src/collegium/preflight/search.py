"""The fusions that a preflight compares, fitted on one half of the documents, scored on the other.

Shapes: N rows of the calibration split, K teachers, F fusions, G pooled temperatures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from collegium.distributions import Teacher
from collegium.evaluate.scoring import Windows, spread
from collegium.fusion.calibration import temperature_of_least_nll
from collegium.fusion.fitted import WEIGHTINGS
from collegium.fusion.fuse import Fusion
from collegium.fusion.pools import PoolKind
from collegium.fusion.rules import BestSingle
from collegium.fusion.weighting import Conditions, Fit, Weighting
from collegium.preflight.folds import Fits, balanced_folds
from collegium.preflight.pooling import SweptFusion, sweep_fusions
from collegium.preflight.sweeps import NUM_BYTES, Scalars

# Products and pooled temperatures need whole distributions: at V = 49,152, sixty fusions of three
# teachers take 40 ms per token on a CPU.
FULL_TOKENS = 4096
"""Approximate number of tokens on which all fusions are compared."""

SAME_NLL = 0.002
"""Nats per token within which two fusions count as equally good."""

POOLED_GRID = tuple(2.0 ** (step / 4) for step in range(-2, 4))
"""Grid of the pooled temperature, 0.7 to 1.7. It contains 1, which means none."""

STANDARD_POOLS: tuple[PoolKind, ...] = ("linear", "log_linear")
ALL_POOLS: tuple[PoolKind, ...] = (*STANDARD_POOLS, "power_mean")


@dataclass(frozen=True)
class FoldedFusion:
    """A fusion fitted on all rows, and twice more to score each fold under the fit of the other."""

    final: Fusion
    """Fitted on all calibration rows, for use."""
    first: Fusion
    """Scores the first fold."""
    second: Fusion
    """Scores the second fold."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A fusion and the NLL of its fused target."""

    fusions: FoldedFusion
    nll_N: Tensor
    """(N,) float64 nats on the shared tokens, each under the fusion fitted on the other half."""
    nll_all: float | None = None
    """Mean over all calibration tokens, or None if scalars are not enough to compute it."""

    @property
    def fusion(self) -> Fusion:
        """The fusion fitted on all calibration rows."""
        return self.fusions.final

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
        fusion = self.fusion
        num_temperatures = bool(fusion.temperatures) + (fusion.pooled_temperature != 1.0)
        return num_temperatures + fusion.weighting.is_fitted, fusion.pool != "linear"


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """Return the simplest candidate within 0.002 nats of the lowest NLL.

    Rules that are only compared, such as `route`, are chosen only if there is nothing else.
    """
    choosable = [c for c in candidates if not c.fusion.weighting.is_only_compared]
    candidates = choosable or candidates
    lowest = min(candidate.nll for candidate in candidates)
    # The lowest of many NLLs is optimistic, so small differences count as ties.
    close = [candidate for candidate in candidates if candidate.nll <= lowest + SAME_NLL]
    return min(close, key=lambda candidate: (candidate.complexity, candidate.nll))


class Search:
    """Fits and compares fusions on a calibration split, as described at `run_preflight`.

    Each fusion is fitted three times: on all documents for use, and on each half to score the
    other. Every token is thus scored under parameters that have not seen it, and a rule with more
    parameters has no advantage.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        scalars: Scalars,
        split: Windows,
        *,
        best_single: str,
        extended: bool = False,
        num_bytes: int = NUM_BYTES,
    ) -> None:
        self.teachers = teachers
        self.scalars = scalars
        self._num_bytes = num_bytes
        self.conditions = Conditions(
            best_single=best_single,
            domains=scalars.targets.domains,
            has_consensus=scalars.tables.consensus_kl_KN is not None,
            is_extended=extended,
        )
        self._is_stored = teachers[0].capabilities.temperatures is not None
        self._full, self.is_shared_N = _subset(split, None if self._is_stored else FULL_TOKENS)
        samples_N = torch.from_numpy(scalars.targets.samples_N)
        domains_N = torch.from_numpy(scalars.targets.domains_N)
        fold_N = balanced_folds(samples_N, scalars.tables.rows.documents, domains_N)
        self.is_second_N = fold_N == 1
        """(N,) whether each row belongs to the second fold."""
        # Each fold is scored under the fit of the other. Without a second fold, all rows are scored
        # under their own fit.
        everything = self.fits(torch.ones_like(self.is_second_N))
        folds = [self.is_second_N, ~self.is_second_N] if self.is_second_N.any() else []
        self._fits = [everything, *(map(self.fits, folds) if folds else [everything] * 2)]

    def fits(self, is_fit_N: Tensor) -> Fits:
        """Return the fits on a subset of the rows."""
        return Fits(self.scalars.tables, is_fit_N, self.conditions.domains)

    def ranked(self) -> list[Candidate]:
        """Return all candidates, lowest NLL first."""
        linear: list[Candidate] = []
        best: list[tuple[Fit, bool]] = []
        # With one teacher all rules are equal.
        table = WEIGHTINGS.values() if len(self.teachers) > 1 else [BestSingle]
        for weighting in table:
            rules = weighting.candidates(self.conditions)
            scored = [self._linear_candidates(fit) for fit in rules]
            lowest = [min(candidate.nll for candidate in candidates) for candidates in scored]
            linear += itertools.chain(*scored)
            if rules:
                best.append((rules[lowest.index(min(lowest))], weighting.is_single))
        candidates = linear
        # A pooled temperature of one teacher is its own.
        if not self._is_stored and len(self.teachers) > 1:
            candidates = linear + self._full_candidates(best, linear)
        return sorted(candidates, key=lambda candidate: (candidate.nll, candidate.complexity))

    def linear_nll(self, weighting: Weighting) -> float:
        """Mean NLL of the linear pool of the raw teachers on the shared tokens."""
        return float(self.scalars.tables.linear_nll(weighting, {})[self.is_shared_N].mean())

    def weights(self, candidate: Candidate) -> Tensor:
        """Return (K, N) float64 weights at the shared rows, of the fusion that scores each row."""
        return self._by_fold(self.scalars.tables.weights, candidate.fusions)[:, self.is_shared_N]

    def _known_weights(self, fusions: FoldedFusion) -> Tensor | None:
        """(K, N) float64 weights at the shared rows. None if scalars do not determine them."""
        tables = self.scalars.tables
        if not all(
            tables.determine(f.weighting, f.temperatures) for f in (fusions.first, fusions.second)
        ):
            return None
        return self._by_fold(tables.weights, fusions)[:, self.is_shared_N]

    def _full_candidates(
        self, rules: Sequence[tuple[Fit, bool]], linear: Sequence[Candidate]
    ) -> list[Candidate]:
        """Score every pool of these rules, without those among `linear`, from distributions."""
        pools = ALL_POOLS if self.conditions.is_extended else STANDARD_POOLS
        tried = [
            self._fit(fit, pool, calibrated=calibrated)
            for fit, is_single in rules
            for pool in (pools[:1] if is_single else pools)
            for calibrated in (False, True)
        ]
        # Temperatures that all stayed at 1 give the same fusion twice.
        settings = list({repr(fusions.final): fusions for fusions in reversed(tried)}.values())
        swept = [SweptFusion(one.first, one.second, self._known_weights(one)) for one in settings]
        is_second_N = self.is_second_N[self.is_shared_N]
        # One pass over the teachers for all fusions, folds and pooled temperatures.
        nll_FGN = sweep_fusions(
            self.teachers, self._full, swept, is_second_N, POOLED_GRID, num_bytes=self._num_bytes
        )
        candidates = []
        for fusions, nll_GN in zip(settings, nll_FGN, strict=True):
            candidates.append(Candidate(fusions, nll_GN[POOLED_GRID.index(1.0)]))
            candidates += _with_pooled_temperature(fusions, nll_GN, is_second_N)
        # Scalars score a linear pool on all tokens, so their candidate wins over that of the sweep.
        scored = {repr(candidate.fusion) for candidate in linear}
        return [new for new in candidates if repr(new.fusion) not in scored]

    def _linear_candidates(self, fit: Fit) -> list[Candidate]:
        """Score the linear pool of the raw teachers, and of the calibrated ones if that differs."""
        settings = [self._fit(fit, "linear", calibrated=False)]
        # The consensus at other temperatures needs whole distributions.
        if not settings[0].final.weighting.needs_consensus:
            calibrated = self._fit(fit, "linear", calibrated=True)
            settings += [calibrated] if calibrated.final.temperatures else []
        candidates = []
        for fusions in settings:
            nll_N = self._by_fold(self.scalars.tables.linear_nll, fusions)
            candidates.append(Candidate(fusions, nll_N[self.is_shared_N], float(nll_N.mean())))
        return candidates

    def _fit(self, fit: Fit, pool: PoolKind, *, calibrated: bool) -> FoldedFusion:
        return FoldedFusion(*(f.fusion(fit, pool, calibrated=calibrated) for f in self._fits))

    def _by_fold(
        self, function: Callable[[Weighting, Mapping[str, float]], Tensor], fusions: FoldedFusion
    ) -> Tensor:
        """Apply a function with values per row to the fusion that scores each row."""
        first, second = fusions.first, fusions.second
        value_N = function(first.weighting, first.temperatures)
        if second != first:
            other_N = function(second.weighting, second.temperatures)
            value_N = torch.where(self.is_second_N, other_N, value_N)
        return value_N


def _with_pooled_temperature(
    fusions: FoldedFusion, nll_GN: Tensor, is_second_N: Tensor
) -> list[Candidate]:
    """Score a setting at the pooled temperature of the other fold. Empty if all are 1."""
    whole = int(nll_GN.mean(1).argmin())
    first = second = whole
    # Each fold is scored at the temperature of the other one.
    if is_second_N.any() and not is_second_N.all():
        first = int(nll_GN[:, is_second_N].mean(1).argmin())
        second = int(nll_GN[:, ~is_second_N].mean(1).argmin())
    if POOLED_GRID[first] == POOLED_GRID[second] == POOLED_GRID[whole] == 1.0:
        return []
    # Only the final temperature is interpolated. The folds are scored on the grid of the sweep.
    final = temperature_of_least_nll(POOLED_GRID, nll_GN.mean(1))
    pooled = FoldedFusion(
        replace(fusions.final, pooled_temperature=final),
        replace(fusions.first, pooled_temperature=POOLED_GRID[first]),
        replace(fusions.second, pooled_temperature=POOLED_GRID[second]),
    )
    return [Candidate(pooled, torch.where(is_second_N, nll_GN[second], nll_GN[first]))]


def _subset(split: Windows, max_tokens: int | None) -> tuple[Windows, Tensor]:
    """Select evenly spread windows with about `max_tokens` targets, and a row mask (N,)."""
    counts = split.counts()
    kept = spread(counts, max_tokens)
    is_kept = np.isin(np.arange(len(counts)), kept)
    subset = replace(split, indices=[split.indices[at] for at in kept])
    return subset, torch.from_numpy(is_kept.repeat(counts))
