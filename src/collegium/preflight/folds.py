"""Weightings and temperatures fitted on one fold of the calibration split, scored on the other.

Shapes: N rows of the calibration split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from collegium.fusion.calibration import TemperatureTables, fit_joint_temperatures, fit_temperature
from collegium.fusion.fuse import Fusion
from collegium.fusion.pools import PoolKind
from collegium.fusion.rules import Uniform
from collegium.fusion.weighting import CalibrationData, Fit, Weighting

# Only a few dozen parameters are fitted: more rows cost time and change nothing.
FIT_ROWS = 65_536
"""Approximate number of rows that weights and temperatures are fitted on."""

MIN_DOCUMENTS = 8
"""Number of documents from which a domain is split by whole documents."""


class Fits:
    """Weightings and temperatures fitted on a subset of the rows."""

    def __init__(self, tables: TemperatureTables, is_fit_N: Tensor, domains: Sequence[str]) -> None:
        self.tables = tables.part(_subsample(is_fit_N, tables.rows.documents))
        """The temperature tables of these rows."""
        self._domains = domains
        self._joint: dict[str, dict[str, float]] = {}

    @cached_property
    def individual(self) -> dict[str, float]:
        """Temperature of each teacher, fitted without the others, for products."""
        # In a product every teacher counts fully at every token, so no responsibilities apply.
        fitted = {name: fit_temperature(self.tables, name) for name in self.tables.teachers}
        return {name: value for name, value in fitted.items() if value is not None}

    def joint(self, weighting: Weighting) -> dict[str, float]:
        """Return the temperatures for the linear pool of a weighting, without those equal to 1."""
        key = repr(weighting)
        if key not in self._joint:
            # Scalars do not determine the consensus at other temperatures; uniform weights are the
            # closest rule that they do determine.
            proxy = Uniform() if weighting.needs_consensus else weighting
            fitted = fit_joint_temperatures(self.tables, proxy)
            self._joint[key] = {name: value for name, value in fitted.items() if value != 1.0}
        return self._joint[key]

    def weighting(self, fit: Fit, temperatures: Mapping[str, float]) -> Weighting:
        """Fit a weighting for teachers at these temperatures."""
        data = CalibrationData(
            teachers=self.tables.teachers,
            rows=self.tables.rows,
            stats=self.tables.stats(temperatures),
            raw=self.tables.stats({}),
            domains=self._domains,
        )
        return fit(data)

    def fusion(self, fit: Fit, pool: PoolKind, *, calibrated: bool) -> Fusion:
        """Fit the fusion of a rule and a pool, with temperatures fitted for that pool."""
        temperatures: dict[str, float] = {}
        if calibrated and pool == "linear":
            temperatures = self.joint(self.weighting(fit, {}))
        elif calibrated:
            # Products of generalists gain 0.01 nats from these. Products of specialists lose 0.4
            # (docs/results/fusion.md), so the raw product is always tried as well.
            temperatures = self.individual
        weighting = self.weighting(fit, temperatures)
        return Fusion(weighting=weighting, pool=pool, temperatures=dict(temperatures))


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
