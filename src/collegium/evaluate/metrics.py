"""Per-row scores of one model on a dataset, and the metrics derived from them.

Shapes: N rows (target tokens) of the dataset, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collegium.fusion.calibration import (
    calibration_error,
    entropy_bins,
    reliability_bins,
)
from collegium.storage.records import (
    CalibrationScore,
    DomainScore,
    EntropyBins,
    ModelScores,
    Reliability,
)

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def perplexity(nll: float) -> float:
    """Return exp(mean NLL in nats), or infinity where float64 would overflow."""
    # math.exp raises OverflowError above 709.78.
    return math.exp(nll) if nll < 700 else math.inf


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """The N target tokens of a dataset, shared by all models scored on it."""

    samples_N: Ints
    """Index of the document in its dataset."""
    domains_N: Ints
    """Index into `domains`."""
    num_bytes_N: Ints
    """Bytes of text that each target token covers."""
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples_N)


@dataclass(frozen=True, eq=False, kw_only=True)
class Metrics:
    """Scores of one model on N target tokens. Means are per token and in nats."""

    name: str
    targets: ScoredTokens
    nll_N: Floats
    entropy_N: Floats
    confidence_N: Floats
    """Probability of the most likely token."""
    is_correct_N: Bools
    """Whether the most likely token is the target."""
    kl_to_fused_N: Floats | None = None
    """KL(fused || model) of each row, or None without a fused target."""
    agrees_fused_N: Bools | None = None
    """Whether the most likely token agrees with the fused target."""
    agrees_N: Mapping[str, Bools] = field(default_factory=dict)
    """Teacher -> whether the most likely token agrees with that teacher."""

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats per target token."""
        return _mean(self.nll_N)

    @property
    def perplexity(self) -> float:
        """exp(mean NLL)."""
        return perplexity(self.nll)

    @property
    def entropy(self) -> float:
        """Mean entropy of the predicted distribution."""
        return _mean(self.entropy_N)

    @property
    def overconfidence(self) -> float:
        """Mean NLL minus mean entropy: 0 if calibrated, positive if overconfident."""
        return self.nll - self.entropy

    @property
    def top1(self) -> float:
        """Share of rows whose most likely token is the target."""
        return _mean(self.is_correct_N)

    @property
    def bits_per_byte(self) -> float | None:
        """Total NLL / ln 2 / bytes of the target tokens, or None if their bytes are unknown."""
        return _bits_per_byte(self.nll_N, self.targets.num_bytes_N)

    @property
    def ece(self) -> float:
        """Expected calibration error of the top-1 prediction over 15 bins of equal mass."""
        return calibration_error(self.confidence_N, self.is_correct_N)[0]

    def by_domain(self) -> dict[str, DomainScore]:
        """Return the scores on each non-empty domain."""
        scores: dict[str, DomainScore] = {}
        for index, domain in enumerate(self.targets.domains):
            in_domain_N = self.targets.domains_N == index
            if not in_domain_N.any():
                continue
            nll = _mean(self.nll_N[in_domain_N])
            bytes_n = self.targets.num_bytes_N[in_domain_N]
            scores[domain] = DomainScore(
                nll=nll,
                perplexity=perplexity(nll),
                bits_per_byte=_bits_per_byte(self.nll_N[in_domain_N], bytes_n),
                **self._calibration(in_domain_N),
                num_tokens=int(in_domain_N.sum()),
            )
        return scores

    def calibration(self) -> CalibrationScore:
        """Return the calibration on all rows and on each domain."""
        figures = self._calibration(np.ones(len(self.nll_N), dtype=np.bool_))
        return CalibrationScore(nll=self.nll, **figures, domains=self.by_domain())

    def _calibration(self, is_kept_N: Bools) -> dict[str, Any]:
        entropy = _mean(self.entropy_N[is_kept_N])
        _, over, under = calibration_error(
            self.confidence_N[is_kept_N], self.is_correct_N[is_kept_N]
        )
        return {
            "entropy": entropy,
            "overconfidence": _mean(self.nll_N[is_kept_N]) - entropy,
            "ece": over + under,
            "ece_over": over,
            "ece_under": under,
        }

    def scores(self) -> ModelScores:
        """Return the part of a row of results.json that is measured."""
        kl_N, agrees_N = self.kl_to_fused_N, self.agrees_fused_N
        return ModelScores(
            nll=self.nll,
            perplexity=self.perplexity,
            bits_per_byte=self.bits_per_byte,
            entropy=self.entropy,
            overconfidence=self.overconfidence,
            ece=self.ece,
            top1=self.top1,
            kl_to_fused=None if kl_N is None else _mean(kl_N),
            agreement_fused=None if agrees_N is None else _mean(agrees_N),
            agreement={name: _mean(agrees_N) for name, agrees_N in self.agrees_N.items()},
            num_tokens=len(self.targets),
            num_bytes=int(self.targets.num_bytes_N.sum()),
            domains=self.by_domain(),
            reliability=Reliability(**reliability_bins(self.confidence_N, self.is_correct_N)),
            entropy_bins=EntropyBins(**entropy_bins(self.entropy_N, self.is_correct_N, self.nll_N)),
        )


def _mean(values_N: Floats | Bools) -> float:
    # Rows are stored as float32 to save memory, but a mean over a million of them needs float64.
    return float(values_N.mean(dtype=np.float64))


def _bits_per_byte(nll_N: Floats, num_bytes_N: Ints) -> float | None:
    num_bytes = int(num_bytes_N.sum())
    return float(nll_N.sum(dtype=np.float64)) / math.log(2) / num_bytes if num_bytes else None
