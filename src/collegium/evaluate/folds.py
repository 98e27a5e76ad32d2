"""What a pre-flight fits on a part of the calibration rows, so that it can be judged on the others.

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
from collegium.fusion.isotonic import fit_entropy_maps
from collegium.fusion.pooling import Fusion, PoolKind
from collegium.fusion.rules import CalibratedEntropy
from collegium.fusion.weights import BestSingle, RowStats, Uniform, Weighting

FIT_ROWS = 65_536
"""About how many rows weights and temperatures are fitted on: a few dozen numbers, for which more would cost time and change nothing."""


MIN_DOCUMENTS = 8
"""Documents of a domain from which on they are kept whole in one fold."""


class Fits:
    """Fitted weights and temperatures of some of the rows; each is fitted once."""

    def __init__(self, scalars: Scalars, is_fit_N: Tensor) -> None:
        self.scalars = scalars
        self._is_fit_N = _thinned(is_fit_N, scalars.rows.documents)
        self._joint: dict[str, dict[str, float]] = {}

    @cached_property
    def tables(self) -> TemperatureTables:
        """The temperature tables of these rows."""
        return self.scalars.tables.part(self._is_fit_N)

    @cached_property
    def alone(self) -> dict[str, float]:
        """The temperature of each teacher alone: in a product, every teacher answers for every token."""
        return {name: fit_temperature(self.tables, name) for name in self.scalars.teachers}

    def joint(self, weighting: Weighting) -> dict[str, float]:
        """Temperatures that suit the linear pool of a weighting, those that stayed at 1 left out."""
        key = repr(weighting)
        if key not in self._joint:
            # What the consensus is at other temperatures, scalars do not say; uniform weights come nearest.
            known = Uniform() if weighting.needs_consensus else weighting
            self._joint[key] = _fitted(fit_joint_temperatures(self.tables, known))
        return self._joint[key]

    def constant_weights(self, temperatures: Mapping[str, float]) -> Weighting:
        """Constant weights of highest likelihood."""
        return fit_em_weights(self._stats(temperatures), self.scalars.teachers)

    def domain_weights(self, temperatures: Mapping[str, float]) -> Weighting:
        """The same in each domain."""
        return fit_domain_weights(
            self._stats(temperatures),
            self.tables.rows(),
            self.scalars.teachers,
            domains=self.scalars.targets.domains,
        )

    def calibrated_entropy(self, temperatures: Mapping[str, float]) -> Weighting:
        """Entropy weights by what an entropy of each teacher has been worth."""
        names = self.scalars.teachers
        maps = fit_entropy_maps(self._stats(temperatures), names)
        return CalibratedEntropy(
            maps={name: [list(knot) for knot in knots] for name, knots in maps.items()}
        )

    def gate(self, temperatures: Mapping[str, float]) -> Weighting:
        """The learned gate of the raw teachers: one of its features, the consensus, is known for those alone."""
        del temperatures
        return fit_gate(
            self._stats({}),
            self.tables.rows(),
            self.scalars.teachers,
            with_consensus=self.scalars.consensus_kl_KN is not None,
        )

    def route(self, temperatures: Mapping[str, float]) -> Weighting:
        """The best teacher of each domain, alone."""
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
    """A weighting that is as it is, or that has to be fitted."""

    weighting: Callable[[Fits, Mapping[str, float]], Weighting]
    """What it is for teachers of these temperatures, fitted on these rows."""
    family: str
    """Rules of one family differ in their options alone; the best of them speaks for it."""
    is_single: bool = False
    """Whether it takes one teacher, so that there is nothing to pool."""

    @classmethod
    def plain(cls, weighting: Weighting, family: str) -> Rule:
        """A weighting without fitted parts."""
        return cls(lambda *_: weighting, family, isinstance(weighting, BestSingle))

    def fusion(self, fits: Fits, pool: PoolKind, *, calibrated: bool) -> Fusion:
        """The fusion of this rule and pool, fitted on these rows; the temperatures suit the kind of pool."""
        temperatures: dict[str, float] = {}
        if calibrated and pool == "linear":
            temperatures = fits.joint(self.weighting(fits, {}))
        elif calibrated:
            temperatures = dict(fits.alone)
        weighting = self.weighting(fits, temperatures)
        return Fusion(weighting=weighting, pool=pool, temperatures=temperatures)


def balanced_folds(samples_N: Tensor, pieces_N: Tensor, domains_N: Tensor) -> Tensor:
    """(N,) int64, 0 or 1: two folds with about as many rows of each domain, the same rows every time.

    Whole documents, where a domain has at least eight; of fewer, whole pieces (what a window holds of a document), since halves of two or three
    long documents would leave a domain without text to fit on. The units of each domain, the longest first, go where fewer
    rows of that domain are, at first where fewer rows are at all. With one unit there is no second fold.

    Args:
        samples_N: (N,) the document of each row.
        pieces_N: (N,) the piece of each row, unique among all documents.
        domains_N: (N,) the domain of each row.
    """
    fold_N = torch.zeros_like(samples_N)
    total = [0, 0]
    for domain in domains_N.unique():
        rows_n = (domains_N == domain).nonzero()[:, 0]
        units_n = samples_N[rows_n]
        if len(units_n.unique()) < MIN_DOCUMENTS:
            units_n = pieces_N[rows_n]
        _, place_n, count_U = units_n.unique(return_inverse=True, return_counts=True)
        fold_U = torch.zeros_like(count_U)
        here = [0, 0]
        for unit in torch.argsort(count_U, descending=True, stable=True).tolist():
            fold = 0 if (here[0], total[0]) <= (here[1], total[1]) else 1
            fold_U[unit] = fold
            here[fold] += int(count_U[unit])
            total[fold] += int(count_U[unit])
        fold_N[rows_n] = fold_U[place_n]
    return fold_N


def _thinned(is_fit_N: Tensor, documents_N: Tensor) -> Tensor:
    """Every n-th piece of a document among these rows, so that about FIT_ROWS are left."""
    size = int(is_fit_N.sum())
    if size <= FIT_ROWS:
        return is_fit_N
    kept = documents_N[is_fit_N].unique()[:: -(-size // FIT_ROWS)]
    return is_fit_N & torch.isin(documents_N, kept)


def _fitted(temperatures: Mapping[str, float]) -> dict[str, float]:
    """Without those that stayed at 1."""
    return {name: value for name, value in temperatures.items() if value != 1.0}
