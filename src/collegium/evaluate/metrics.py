"""Per-row scores of one model on a dataset, and the metrics derived from them.

Shapes: N rows (target tokens) of the dataset, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from collegium.errors import DataError
from collegium.evaluate.intervals import document_interval
from collegium.fusion.calibration import calibration_error, entropy_bins, reliability_bins
from collegium.storage import records

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def perplexity(nll: float) -> float:
    """Return exp(mean NLL in nats), or infinity where float64 would overflow."""
    # math.exp raises OverflowError above 709.78.
    return math.exp(nll) if nll < 700 else math.inf


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """N target tokens of a dataset, shared by all models scored on it."""

    samples_N: Ints
    """Index of the document in its dataset."""
    domains_N: Ints
    """Index into `domains`."""
    num_bytes_N: Ints
    """Bytes of text that each target token covers."""
    domains: tuple[str, ...]

    @classmethod
    def cat(cls, parts: Sequence[ScoredTokens]) -> ScoredTokens:
        """Concatenate batches of one dataset.

        Raises:
            DataError: there are no batches.
        """
        if not parts:
            got = "evaluation: got no target token; must have at least one"
            raise DataError(f"{got}; use a larger validation split")
        return cls(
            np.concatenate([part.samples_N for part in parts]),
            np.concatenate([part.domains_N for part in parts]),
            np.concatenate([part.num_bytes_N for part in parts]),
            parts[0].domains,
        )

    def __len__(self) -> int:
        return len(self.samples_N)

    def by_domain(self) -> Iterator[tuple[str, Bools]]:
        """Yield each domain that has tokens, with the (N,) mask of its tokens."""
        for index, domain in enumerate(self.domains):
            is_here_N = self.domains_N == index
            if is_here_N.any():
                yield domain, is_here_N


@dataclass(frozen=True, eq=False, kw_only=True)
class Metrics:
    """Scores of one model on N target tokens. Means are per token and in nats."""

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
    acceptance_N: Mapping[str, Floats] = field(default_factory=dict)
    """Teacher -> sum_v min(P, Q) of its distribution P and that of the model, Q."""

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats per target token."""
        return _mean(self.nll_N)

    @property
    def overconfidence(self) -> float:
        """Mean NLL minus mean entropy: 0 if calibrated, positive if overconfident."""
        return self.nll - _mean(self.entropy_N)

    @property
    def ece(self) -> float:
        """Expected calibration error of the top-1 prediction over 15 bins of equal mass."""
        return calibration_error(self.confidence_N, self.is_correct_N)[0]

    def by_domain(self) -> dict[str, records.DomainScore]:
        """Return the scores on each non-empty domain."""
        return {domain: self._score(is_here_N) for domain, is_here_N in self.targets.by_domain()}

    def calibration(self) -> records.CalibrationScore:
        """Return the calibration on all rows and on each domain."""
        figures = {"nll", "entropy", "overconfidence", "ece", "ece_over", "ece_under"}
        total = self._score(slice(None)).model_dump(include=figures)
        return records.CalibrationScore(**total, domains=self.by_domain())

    def _score(self, rows: Bools | slice) -> records.DomainScore:
        nll_n, num_bytes = self.nll_N[rows], int(self.targets.num_bytes_N[rows].sum())
        nll, entropy = _mean(nll_n), _mean(self.entropy_N[rows])
        _, over, under = calibration_error(self.confidence_N[rows], self.is_correct_N[rows])
        nats = float(nll_n.sum(dtype=np.float64))
        return records.DomainScore(
            nll=nll,
            perplexity=perplexity(nll),
            bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
            entropy=entropy,
            overconfidence=nll - entropy,
            ece=over + under,
            ece_over=over,
            ece_under=under,
            num_tokens=len(nll_n),
        )

    def _mean_of(self, values_N: Floats) -> records.Acceptance:
        """Return the mean over all tokens, and its interval over documents."""
        _, document_N, count_D = np.unique(
            self.targets.samples_N, return_inverse=True, return_counts=True
        )
        total_D = np.bincount(document_N, values_N).astype(np.float64)
        interval = document_interval([(total_D, count_D)])
        return records.Acceptance(value=_mean(values_N), interval=interval)

    def scores(self) -> records.ModelScores:
        """Return the part of a row of results.json that is measured."""
        figures = {"nll", "perplexity", "bits_per_byte", "entropy", "overconfidence", "num_tokens"}
        kl_N, agrees_N = self.kl_to_fused_N, self.agrees_fused_N
        return records.ModelScores(
            **self._score(slice(None)).model_dump(include=figures),
            ece=self.ece,
            top1=_mean(self.is_correct_N),
            kl_to_fused=None if kl_N is None else _mean(kl_N),
            agreement_fused=None if agrees_N is None else _mean(agrees_N),
            agreement={name: _mean(agrees_N) for name, agrees_N in self.agrees_N.items()},
            acceptance={name: self._mean_of(rows_N) for name, rows_N in self.acceptance_N.items()},
            num_bytes=int(self.targets.num_bytes_N.sum()),
            domains=self.by_domain(),
            reliability=records.Reliability(
                **reliability_bins(self.confidence_N, self.is_correct_N)
            ),
            entropy_bins=records.EntropyBins(
                **entropy_bins(self.entropy_N, self.is_correct_N, self.nll_N)
            ),
        )


def _mean(values_N: Floats | Bools) -> float:
    # Rows are stored as float32 to save memory, but a mean over a million of them needs float64.
    return float(values_N.mean(dtype=np.float64))
