"""Weights and temperatures fitted on one fold of the calibration split, to be scored on the other.

Shapes: N rows of the calibration split, K teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from collegium.evaluate.sweeps import Scalars
from collegium.fusion.calibration import (
    TemperatureTables,
    fit_joint_temperatures,
    fit_temperature,
)
from collegium.fusion.fits import fit_domain_weights, fit_em_weights, fit_gate, fit_route
from collegium.fusion.fuse import Fusion
from collegium.fusion.isotonic import fit_entropy_maps
from collegium.fusion.pools import PoolKind
from collegium.fusion.rules import CalibratedEntropy
from collegium.fusion.weights import BestSingle, RowStats, Uniform, Weighting

# Only a few dozen parameters are fitted: more rows cost time and change nothing.
FIT_ROWS = 65_536
"""Approximate number of rows that weights and temperatures are fitted on."""

MIN_DOCUMENTS = 8
"""Number of documents from which a domain is split by whole documents."""


class Fits:
    """Weights and temperatures fitted on a subset of the rows, each fitted on first use."""

    def __init__(self, scalars: Scalars, is_fit_N: Tensor) -> None:
        self.scalars = scalars
        self._is_fit_N = _subsample(is_fit_N, scalars.rows.documents)
        self._joint: dict[str, dict[str, float]] = {}

    @cached_property
    def tables(self) -> TemperatureTables:
        """The temperature tables of these rows."""
        return self.scalars.tables.part(self._is_fit_N)

    @cached_property
    def individual(self) -> dict[str, float]:
        """Temperature of each teacher, fitted without the others, for products."""
        # In a product every teacher counts fully at every token, so no responsibilities apply.
        return {name: fit_temperature(self.tables, name) for name in self.scalars.teachers}

    def joint(self, weighting: Weighting) -> dict[str, float]:
        """Return the temperatures for the linear pool of a weighting, without those equal to 1."""
        key = repr(weighting)
        if key not in self._joint:
            # Scalars do not determine the consensus at other temperatures; uniform weights are the
            # closest rule that they do determine.
            proxy = Uniform() if weighting.needs_consensus else weighting
            self._joint[key] = _drop_ones(fit_joint_temperatures(self.tables, proxy))
        return self._joint[key]

    def constant_weights(self, temperatures: Mapping[str, float]) -> Weighting:
        """Fit constant weights by maximum likelihood (EM)."""
        return fit_em_weights(self._stats(temperatures), self.scalars.teachers)

    def domain_weights(self, temperatures: Mapping[str, float]) -> Weighting:
        """Fit constant weights by maximum likelihood in each domain."""
        return fit_domain_weights(
            self._stats(temperatures),
            self.tables.rows(),
            self.scalars.teachers,
            domains=self.scalars.targets.domains,
        )

    def calibrated_entropy(self, temperatures: Mapping[str, float]) -> Weighting:
        """Fit entropy weights on each teacher's isotonic map from entropy to NLL."""
        names = self.scalars.teachers
        maps = fit_entropy_maps(self._stats(temperatures), names)
        return CalibratedEntropy(
            maps={name: [list(knot) for knot in knots] for name, knots in maps.items()}
        )

    def gate(self, temperatures: Mapping[str, float]) -> Weighting:
        """Fit the learned gate on the raw teachers, whatever the temperatures."""
        # The consensus, one of its features, is stored for the raw teachers only.
        del temperatures
        return fit_gate(
            self._stats({}),
            self.tables.rows(),
            self.scalars.teachers,
            with_consensus=self.scalars.consensus_kl_KN is not None,
        )

    def route(self, temperatures: Mapping[str, float]) -> Weighting:
        """Fit the route that sends each domain to its best teacher."""
        return fit_route(
            self._stats(temperatures),
            self.tables.rows(),
            self.scalars.teachers,
            domains=self.scalars.targets.domains,
        )

    def _stats(self, temperatures: Mapping[str, float]) -> RowStats:
        stats = self.scalars.stats(temperatures, self.scalars.teachers)
        kl_KN, is_fit_N = stats.consensus_kl_KN, self._is_fit_N
        return RowStats(
            stats.entropy_KN[:, is_fit_N],
            stats.label_logp_KN[:, is_fit_N],
            stats.max_logp_KN[:, is_fit_N],
            None if kl_KN is None else kl_KN[:, is_fit_N],
        )


@dataclass(frozen=True)
class Rule:
    """A weighting with fixed or fitted parameters."""

    weighting: Callable[[Fits, Mapping[str, float]], Weighting]
    """Returns the weighting fitted on these rows, for teachers at these temperatures."""
    family: str
    """Rules of one family differ only in their options. The best one represents the family."""
    is_single: bool = False
    """Whether it uses one teacher per row, so that there is nothing to pool."""

    @classmethod
    def plain(cls, weighting: Weighting, family: str) -> Rule:
        """Wrap a weighting without fitted parameters."""
        return cls(lambda *_: weighting, family, isinstance(weighting, BestSingle))

    def fusion(self, fits: Fits, pool: PoolKind, *, calibrated: bool) -> Fusion:
        """Return the fusion of this rule and pool, with temperatures fitted for that pool."""
        temperatures: dict[str, float] = {}
        if calibrated and pool == "linear":
            temperatures = fits.joint(self.weighting(fits, {}))
        elif calibrated:
            # Products of generalists gain 0.01 nats from these. Products of specialists lose 0.4
            # (docs/results/fusion.md), so the raw product is always tried as well.
            temperatures = dict(fits.individual)
        weighting = self.weighting(fits, temperatures)
        return Fusion(weighting=weighting, pool=pool, temperatures=temperatures)


def balanced_folds(samples_N: Tensor, pieces_N: Tensor, domains_N: Tensor) -> Tensor:
    """Split rows into two folds with about equal numbers of rows per domain: (N,) int64, 0 or 1.

    Domains with at least eight documents are split by whole documents, others by whole pieces (the
    part of a document within one window). Units are assigned longest first, each to the fold with
    fewer rows of its domain, then with fewer rows overall. Deterministic. A single unit leaves the
    second fold empty.

    Args:
        samples_N: (N,) document of each row.
        pieces_N: (N,) piece of each row, unique across documents.
        domains_N: (N,) domain of each row.
    """
    fold_N = torch.zeros_like(samples_N)
    total = [0, 0]
    for domain in domains_N.unique():
        rows_n = (domains_N == domain).nonzero()[:, 0]
        units_n = samples_N[rows_n]
        # Splitting two or three long documents would leave a fold without text of this domain.
        if len(units_n.unique()) < MIN_DOCUMENTS:
            units_n = pieces_N[rows_n]
        _, unit_n, count_U = units_n.unique(return_inverse=True, return_counts=True)
        fold_U = torch.zeros_like(count_U)
        in_domain = [0, 0]
        # Longest first (Graham's LPT rule): short units at the end even out the sizes.
        for unit in torch.argsort(count_U, descending=True, stable=True).tolist():
            fold = 0 if (in_domain[0], total[0]) <= (in_domain[1], total[1]) else 1
            fold_U[unit] = fold
            in_domain[fold] += int(count_U[unit])
            total[fold] += int(count_U[unit])
        fold_N[rows_n] = fold_U[unit_n]
    return fold_N


def _subsample(is_fit_N: Tensor, documents_N: Tensor) -> Tensor:
    """Keep every n-th piece, about FIT_ROWS rows in total."""
    size = int(is_fit_N.sum())
    if size <= FIT_ROWS:
        return is_fit_N
    # Whole pieces, since rules such as prefix likelihood read the earlier rows of a piece.
    kept = documents_N[is_fit_N].unique()[:: -(-size // FIT_ROWS)]
    return is_fit_N & torch.isin(documents_N, kept)


def _drop_ones(temperatures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in temperatures.items() if value != 1.0}
