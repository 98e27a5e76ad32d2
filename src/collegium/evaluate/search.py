"""The fusions that a pre-flight compares, each fitted on one half of the documents and judged on the other.

Shapes: N rows of the calibration split, K teachers, F fusions, G pooled temperatures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from collegium.evaluate.folds import Fits, Rule, balanced_folds
from collegium.evaluate.scoring import Scorer, window_counts
from collegium.evaluate.sweeps import Calibration, Scalars, sweep_fusions
from collegium.fusion.calibration import temperature_of_least_nll
from collegium.fusion.pooling import Fusion
from collegium.fusion.routing import Route
from collegium.fusion.rules import CalibratedEntropy, Consensus, DomainWeights, Gate
from collegium.fusion.stored import require_linear
from collegium.fusion.stream import PoolKind
from collegium.fusion.weights import (
    BestSingle,
    Entropy,
    Fixed,
    PrefixLikelihood,
    Uniform,
    Weighting,
)

FULL_TOKENS = 4096
"""Tokens on which all fusions are compared: products and pooled temperatures need whole distributions."""

SAME_NLL = 0.002
"""Nats per token within which two fusions count as equally good."""

POOLED_GRID = tuple(2.0 ** (step / 4) for step in range(-2, 4))
"""Grid of the pooled temperature, 0.7 to 1.7; 1, no pooled temperature, is one of them."""

STANDARD_POOLS: tuple[PoolKind, ...] = ("linear", "log_linear")
ALL_POOLS: tuple[PoolKind, ...] = (*STANDARD_POOLS, "power_mean")


FITTED = (Fixed, DomainWeights, CalibratedEntropy, Route, Gate)
"""Weightings with fitted parts."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A fusion and what its fused target scores."""

    fusion: Fusion
    """Fitted on all calibration rows."""
    nll_N: Tensor
    """(N,) float64 nats on the tokens shared by all candidates, each judged by the fusion that was fitted on the other half."""
    nll_all: float | None = None
    """Mean over all calibration tokens, where scalars alone give it."""
    by_fold: tuple[Fusion, Fusion] | None = None
    """What judged the documents of either fold; None where nothing was fitted, so that it is `fusion` itself."""

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
        """Number of fitted parts, and whether the pool is other than linear."""
        num_fitted = 0 if self.calibration == "raw" else 1 + self.calibration.count("+")
        num_fitted += isinstance(self.fusion.weighting, FITTED)
        return num_fitted, self.fusion.pool != "linear"


def default_rules(best_single: str) -> list[Rule]:
    """The rules that a pre-flight compares when it is given no candidates: none of them is fitted."""
    rules = [
        Rule.plain(Uniform(), "uniform"),
        Rule.plain(BestSingle(teacher=best_single), "best_single"),
        Rule.plain(Entropy(form="softmax", granularity="token"), "entropy"),
        Rule.plain(Entropy(form="inverse", granularity="token"), "entropy"),
        Rule.plain(Entropy(form="complement", granularity="token"), "entropy"),
        Rule.plain(Entropy(form="softmax", granularity="sequence"), "entropy"),
    ]
    for eta, decay in ((0.1, 0.95), (0.2, 0.95), (0.3, 0.9), (0.5, 0.9)):
        rule = PrefixLikelihood(eta=eta, decay=decay)
        rules.append(Rule.plain(rule, "prefix_likelihood"))
    return rules


def fitted_rules(domains: Sequence[str], *, has_consensus: bool) -> list[Rule]:
    """Rules that are fitted on calibration text, and the one that reads the consensus."""
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
    """The candidate of lowest NLL, or the simplest of those within 0.002 nats of it; a route only where there is nothing else.

    What a route would give is measured beside the others; to give up fusing is for the recipe to say.
    """
    fusing = [one for one in candidates if not isinstance(one.fusion.weighting, Route)]
    candidates = fusing or candidates
    lowest = min(one.nll for one in candidates)
    close = [one for one in candidates if one.nll <= lowest + SAME_NLL]
    return min(close, key=lambda one: (one.complexity, one.nll))


class Search:
    """The fusions that are compared, what they are fitted on, and what they are compared on.

    Every weighting is tried as a linear pool, raw and with temperatures, from scalars alone. The best of each family of weightings is tried
    in every pool, with and without temperatures, with and without a pooled temperature, in one reading of whole distributions.

    What is fitted is fitted three times: on all documents, to be used, and on either half, to judge the other. So every token is judged by
    weights and temperatures that have not seen it, and a rule with more to fit has no advantage. Given
    candidates are compared as they are. With `stored_at`, the temperatures that a per-teacher cache keeps, only linear pools are compared:
    scalars give them all, on all tokens.
    """

    def __init__(
        self,
        teachers: Sequence[Scorer],
        scalars: Scalars,
        split: Calibration,
        *,
        best_single: str,
        candidates: Sequence[Fusion] | None,
        extended: bool = False,
        stored_at: Sequence[float] | None = None,
    ) -> None:
        self.teachers = teachers
        self._stored_at = stored_at
        self.scalars = scalars
        self.best_single = best_single
        self._is_extended = extended
        self._candidates = candidates
        self._full, self.is_shared_N = _part(split, None if stored_at is not None else FULL_TOKENS)
        samples_N = torch.from_numpy(scalars.targets.samples_N)
        domains_N = torch.from_numpy(scalars.targets.domains_N)
        fold_N = balanced_folds(samples_N, scalars.rows.documents, domains_N)
        self.is_second_N = fold_N == 1
        """(N,) whether a row belongs to the second fold."""
        everything_N = torch.ones_like(self.is_second_N)
        self._all = Fits(scalars, everything_N)
        # A row is judged by what was fitted on the other fold.
        self._by_fold = (self._all, self._all)
        if self.is_second_N.any():
            self._by_fold = (Fits(scalars, self.is_second_N), Fits(scalars, ~self.is_second_N))

    def ranked(self) -> list[Candidate]:
        """All candidates from the lowest NLL to the highest."""
        if self._candidates is None:
            found = self._usual()
        else:
            baselines = [Uniform(), BestSingle(teacher=self.best_single)]
            found = [self.linear(weighting, {}) for weighting in baselines]
            known = [one.fusion for one in found]
            found += self._given([fusion for fusion in self._candidates if fusion not in known])
        return sorted(found, key=lambda one: (one.nll, one.complexity))

    def linear(self, weighting: Weighting, temperatures: Mapping[str, float]) -> Candidate:
        """A linear pool as it is, from scalars alone."""
        fusion = Fusion(weighting=weighting, temperatures=dict(temperatures))
        return self._from_scalars((fusion, fusion, fusion))

    def weights(self, one: Candidate) -> Tensor:
        """(K, N) float64 weights at the rows that all fusions share, each from the fusion that judges it."""
        first, second = one.by_fold or (one.fusion, one.fusion)
        weights_KN = self.scalars.weights(first.weighting, first.temperatures)
        if one.by_fold is not None:
            other_KN = self.scalars.weights(second.weighting, second.temperatures)
            weights_KN = torch.where(self.is_second_N, other_KN, weights_KN)
        return weights_KN[:, self.is_shared_N]

    def _given(self, fusions: Sequence[Fusion]) -> list[Candidate]:
        if self._stored_at is None:
            return self._swept([(one, one, one) for one in fusions], temperatures=(1.0,))
        for fusion in fusions:
            require_linear(fusion, self._stored_at)
        return [self.linear(fusion.weighting, fusion.temperatures) for fusion in fusions]

    def _usual(self) -> list[Candidate]:
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
            found = self._linear_of(rule)
            linear += found
            nll = min(one.nll for one in found)
            if rule.family not in best or nll < best[rule.family][0]:
                best[rule.family] = (nll, rule)
        if self._stored_at is not None:
            return linear
        pools = ALL_POOLS if self._is_extended else STANDARD_POOLS
        tried = [
            self._fitted(rule, pool, calibrated=calibrated)
            for _, rule in best.values()
            for pool in (pools[:1] if rule.is_single else pools)
            for calibrated in (False, True)
        ]
        # Temperatures that all stayed at 1 make no second fusion.
        kept = list({repr(fusions[0]): fusions for fusions in reversed(tried)}.values())
        swept = self._swept(kept, temperatures=POOLED_GRID)
        # Scalars know a linear pool on all tokens: where they have judged a fusion, it is not listed twice.
        scored = {repr(one.fusion) for one in linear}
        return linear + [one for one in swept if repr(one.fusion) not in scored]

    def _linear_of(self, rule: Rule) -> list[Candidate]:
        """The linear pool of the raw teachers, and that of calibrated ones where scalars give it and it differs."""
        settings = [self._fitted(rule, "linear", calibrated=False)]
        if not settings[0][0].weighting.needs_consensus:
            settings.append(self._fitted(rule, "linear", calibrated=True))
        return [
            self._from_scalars(fusions)
            for number, fusions in enumerate(settings)
            if number == 0 or fusions[0].temperatures
        ]

    def _fitted(
        self, rule: Rule, pool: PoolKind, *, calibrated: bool
    ) -> tuple[Fusion, Fusion, Fusion]:
        """The fusion of a rule fitted on all rows, and those that judge the first and the second fold."""
        fits = (self._all, *self._by_fold)
        first, second, third = (rule.fusion(one, pool, calibrated=calibrated) for one in fits)
        return first, second, third

    def _from_scalars(self, fusions: tuple[Fusion, Fusion, Fusion]) -> Candidate:
        fusion, *by_fold = fusions
        nll_N = self.scalars.linear_nll(by_fold[0].weighting, by_fold[0].temperatures)
        if by_fold[1] != by_fold[0]:
            other_N = self.scalars.linear_nll(by_fold[1].weighting, by_fold[1].temperatures)
            nll_N = torch.where(self.is_second_N, other_N, nll_N)
        return Candidate(fusion, nll_N[self.is_shared_N], float(nll_N.mean()), _different(fusions))

    def _swept(
        self,
        settings: Sequence[tuple[Fusion, Fusion, Fusion]],
        *,
        temperatures: Sequence[float],
    ) -> list[Candidate]:
        """Each setting without a pooled temperature, and with one where that differs."""
        if not settings:
            return []
        pairs = [(first, second) for _, first, second in settings]
        is_second_N = self.is_second_N[self.is_shared_N]
        nll_FGN = sweep_fusions(self.teachers, self._full, pairs, is_second_N, temperatures)
        raw = temperatures.index(1.0)
        found = []
        for fusions, nll_GN in zip(settings, nll_FGN, strict=True):
            found.append(Candidate(fusions[0], nll_GN[raw], by_fold=_different(fusions)))
            if len(temperatures) > 1:
                found += self._pooled(fusions, nll_GN, is_second_N)
        return found

    def _pooled(
        self, fusions: tuple[Fusion, Fusion, Fusion], nll_GN: Tensor, is_second_N: Tensor
    ) -> list[Candidate]:
        """The same with the pooled temperature that suits the other fold; nothing where no fold wants one."""
        raw = POOLED_GRID.index(1.0)
        is_first_N = ~is_second_N
        parts = (is_second_N, is_first_N) if is_second_N.any() and is_first_N.any() else ()
        at = [int(nll_GN[:, part_N].mean(1).argmin()) for part_N in parts]
        at = at or [int(nll_GN.mean(1).argmin())] * 2
        temperature = temperature_of_least_nll(POOLED_GRID, nll_GN.mean(1))
        if at == [raw, raw] and POOLED_GRID[int(nll_GN.mean(1).argmin())] == 1.0:
            return []
        nll_N = torch.where(is_second_N, nll_GN[at[1]], nll_GN[at[0]])
        values = (temperature, POOLED_GRID[at[0]], POOLED_GRID[at[1]])
        fusion, first, second = (
            dataclasses.replace(one, pooled_temperature=value)
            for one, value in zip(fusions, values, strict=True)
        )
        return [Candidate(fusion, nll_N, by_fold=_different((fusion, first, second)))]


def _different(fusions: tuple[Fusion, Fusion, Fusion]) -> tuple[Fusion, Fusion] | None:
    return None if fusions[0] == fusions[1] == fusions[2] else fusions[1:]


def _part(split: Calibration, max_tokens: int | None) -> tuple[Calibration, Tensor]:
    """Evenly spread windows of a split with about `max_tokens` targets (None: all), and which of its rows (N,) they hold."""
    counts = window_counts(split.dataset, split.windows)
    size = len(counts)
    max_tokens = sum(counts) if max_tokens is None else max_tokens
    wanted = max(1, min(size, round(size * max_tokens / max(1, sum(counts)))))
    kept = [int(at) for at in np.linspace(0, size, wanted, endpoint=False)]
    is_kept = torch.zeros(size, dtype=torch.bool)
    is_kept[kept] = True
    windows = [split.windows[at] for at in kept]
    part = dataclasses.replace(split, windows=windows)
    return part, is_kept.repeat_interleave(torch.tensor(counts))
