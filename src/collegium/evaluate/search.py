"""The fusions that a pre-flight compares, what they are fitted on, and what they are judged on.

Shapes: N rows of the calibration split, K teachers, F fusions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from collegium.evaluate.measures import is_fitted_on
from collegium.evaluate.scoring import Scorer, window_counts
from collegium.evaluate.sweeps import Calibration, Scalars, sweep_fusions
from collegium.fusion.calibration import (
    fit_joint_temperatures,
    fit_pooled_temperature,
    fit_temperature,
)
from collegium.fusion.fits import fit_domain_weights, fit_em_weights, fit_gate, fit_route
from collegium.fusion.pooling import Fusion
from collegium.fusion.routing import Route
from collegium.fusion.rules import Consensus, DomainWeights, Gate
from collegium.fusion.stored import require_linear
from collegium.fusion.weights import (
    BestSingle,
    Entropy,
    Fixed,
    PrefixLikelihood,
    RowStats,
    Uniform,
    Weighting,
)
from collegium.types import RowLogits, Rows, TeacherRows

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
        """Number of fitted parts, and whether the pool is other than linear."""
        num_fitted = 0 if self.calibration == "raw" else 1 + self.calibration.count("+")
        num_fitted += isinstance(self.fusion.weighting, (Fixed, DomainWeights, Route, Gate))
        return num_fitted, self.fusion.pool != "linear"


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

    The standard fusions have a few temperatures to fit and are fitted and compared on the same documents. `extended` adds the rules that
    are fitted on calibration documents (EM weights, also per domain, the route and the gate), the consensus rule and the power mean; then all are fitted on
    every other document of each domain and compared on the others, so that a rule with more to fit has no advantage. Given
    candidates are compared as they are, on all documents. With `stored_at`, the temperatures that a per-teacher cache keeps, only linear pools
    are compared: scalars give them all, on all tokens.
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
        self._is_extended = extended
        self._stored_at = stored_at
        self.scalars = scalars
        self.best_single = best_single
        self._candidates = candidates
        self._full, is_full_N = _part(split, None if stored_at is not None else FULL_TOKENS)
        self._pool_fit, _ = _part(self._full, FIT_TOKENS)
        samples_N = torch.from_numpy(scalars.targets.samples_N)
        domains_N = torch.from_numpy(scalars.targets.domains_N)
        # A few temperatures cannot over-fit thousands of tokens; halves of few long documents would be lopsided.
        self._is_fit_N = torch.ones_like(samples_N, dtype=torch.bool)
        if extended:
            self._is_fit_N = is_fitted_on(samples_N, domains_N)
        is_judged_N = ~self._is_fit_N & is_full_N
        is_alike = candidates is not None or not is_judged_N.any()
        self.is_shared_N = is_full_N if is_alike else is_judged_N
        """Rows on which all fusions are compared."""
        self._is_shared_in_full = self.is_shared_N[is_full_N]
        self._fit_tables = scalars.tables.part(self._is_fit_N)
        self._fit_samples = samples_N[self._is_fit_N].unique()

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
        """A linear pool, from scalars alone."""
        fusion = Fusion(weighting=weighting, temperatures=dict(temperatures))
        nll_N = self.scalars.linear_nll(weighting, temperatures)
        return Candidate(fusion, nll_N[self.is_shared_N], float(nll_N.mean()))

    def _given(self, fusions: Sequence[Fusion]) -> list[Candidate]:
        if self._stored_at is None:
            return self._swept(fusions)
        for fusion in fusions:
            require_linear(fusion, self._stored_at)
        return [self.linear(fusion.weighting, fusion.temperatures) for fusion in fusions]

    def _usual(self) -> list[Candidate]:
        if len(self.teachers) == 1:
            weightings: list[Weighting] = [BestSingle(teacher=self.best_single)]
        else:
            weightings = default_weightings(self.best_single)
            if self._is_extended:
                weightings += self._fitted_weightings()
        scored = [self._with_temperatures(weighting) for weighting in weightings]
        linear = [one for pair in scored for one in pair]
        if self._stored_at is not None:
            return linear
        alone = (BestSingle, Route)  # one teacher at each row: every pool is the same
        mixing = [pair for pair in scored if not isinstance(pair[0].fusion.weighting, alone)]
        mixing.sort(key=lambda pair: min(one.nll for one in pair))
        best = mixing[:NUM_SWEPT]
        other = self._swept(self._other_pools([pair[0].fusion for pair in best]))
        swept = other + self._swept(self._pooled([*other, *(c for p in best for c in p)]))
        return linear + swept

    def _fitted_weightings(self) -> list[Weighting]:
        """Rules that the calibration documents set aside for fitting give."""
        has_consensus = self.scalars.consensus_kl_KN is not None
        gate = fit_gate(
            self._fit_stats({}),
            self._fit_tables.rows(),
            self.scalars.teachers,
            with_consensus=has_consensus,
        )
        weightings: list[Weighting] = [self._constant_weights({}), gate]
        if has_consensus:
            weightings.append(Consensus())
        if len(self.scalars.targets.domains) > 1:
            weightings += [self._domain_weights({}), self._route()]
        return weightings

    def _constant_weights(self, temperatures: Mapping[str, float]) -> Fixed:
        return fit_em_weights(self._fit_stats(temperatures), self.scalars.teachers)

    def _domain_weights(self, temperatures: Mapping[str, float]) -> DomainWeights:
        return fit_domain_weights(
            self._fit_stats(temperatures),
            self._fit_tables.rows(),
            self.scalars.teachers,
            domains=self.scalars.targets.domains,
        )

    def _route(self) -> Route:
        return fit_route(
            self._fit_stats({}),
            self._fit_tables.rows(),
            self.scalars.teachers,
            domains=self.scalars.targets.domains,
        )

    def _with_temperatures(self, weighting: Weighting) -> list[Candidate]:
        """The linear pool of the raw teachers, and that of calibrated ones where it differs."""
        pair = [self.linear(weighting, {})]
        if not weighting.needs_consensus:
            fitted = fit_joint_temperatures(self._fit_tables, weighting)
            if temperatures := _fitted(fitted):
                pair.append(self.linear(self._refitted(weighting, temperatures), temperatures))
        return pair

    def _refitted(self, weighting: Weighting, temperatures: Mapping[str, float]) -> Weighting:
        """Fitted constant weights anew for teachers of these temperatures; every other rule as it is."""
        if isinstance(weighting, Fixed):
            return self._constant_weights(temperatures)
        if isinstance(weighting, DomainWeights):
            return self._domain_weights(temperatures)
        return weighting

    def _fit_stats(self, temperatures: Mapping[str, float]) -> RowStats:
        stats = self.scalars.stats(temperatures, self.scalars.teachers)
        kl_KN = stats.consensus_kl_KN
        return RowStats(
            stats.entropy_KN[:, self._is_fit_N],
            stats.label_logp_KN[:, self._is_fit_N],
            stats.max_logp_KN[:, self._is_fit_N],
            None if kl_KN is None else kl_KN[:, self._is_fit_N],
        )

    def _other_pools(self, fusions: Sequence[Fusion]) -> list[Fusion]:
        """Log-linear pools of these weightings, raw and with temperatures; extended, the power mean of the first too."""
        # In a product every teacher answers for every token, so each is calibrated on its own.
        tables = self._fit_tables
        alone = {name: fit_temperature(tables, name) for name in self.scalars.teachers}
        raw = [dataclasses.replace(fusion, pool="log_linear") for fusion in fusions]
        if self._is_extended:
            raw += [dataclasses.replace(fusion, pool="power_mean") for fusion in fusions[:1]]
        return raw + [dataclasses.replace(fusion, temperatures=alone) for fusion in raw]

    def _pooled(self, candidates: Sequence[Candidate]) -> list[Fusion]:
        """A fitted pooled temperature for the best candidate of each pool, with and without temperatures."""
        best: dict[tuple[str, str], Candidate] = {}
        for one in sorted(candidates, key=lambda one: one.nll):
            best.setdefault((one.fusion.pool, one.calibration), one)
        if not best:
            return []
        with torch.no_grad():
            batches = list(self._fit_batches())
        if not batches:
            return []
        pooled = []
        for base in best.values():
            temperature = fit_pooled_temperature(base.fusion, batches, grid=POOLED_GRID)
            if temperature != 1.0:
                pooled.append(dataclasses.replace(base.fusion, pooled_temperature=temperature))
        return pooled

    def _fit_batches(self) -> Iterator[tuple[list[TeacherRows], Rows]]:
        """What the teachers say about the rows that may be fitted on, batch by batch."""
        for answers, rows in self._pool_fit.answers(self.teachers):
            is_kept_N = torch.isin(rows.samples.cpu(), self._fit_samples)
            kept_n = is_kept_N.nonzero()[:, 0]
            if len(kept_n):
                picked = [
                    TeacherRows(answer.name, _PickedRows(answer.scores, kept_n))
                    for answer in answers
                ]
                yield picked, rows.part(kept_n.to(rows.labels.device))

    def _swept(self, fusions: Sequence[Fusion]) -> list[Candidate]:
        if not fusions:
            return []
        nll_FN = sweep_fusions(self.teachers, self._full, fusions)[:, self._is_shared_in_full]
        return [Candidate(fusion, nll_N) for fusion, nll_N in zip(fusions, nll_FN, strict=True)]


@dataclass(frozen=True, eq=False)
class _PickedRows:
    """Some rows of a teacher's answer, as if there were no others."""

    scores: RowLogits
    kept_n: Tensor

    def logits(self, block: slice) -> Tensor:
        kept_n = self.kept_n[block]
        first, last = int(kept_n[0]), int(kept_n[-1])
        between_nV = self.scores.logits(slice(first, last + 1))
        return between_nV[(kept_n - first).to(between_nV.device)]


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


def _fitted(temperatures: Mapping[str, float]) -> dict[str, float]:
    """Without those that stayed at 1."""
    return {name: value for name, value in temperatures.items() if value != 1.0}
