"""The protocol of weighting rules, the statistics they read, and the ways a preflight tries them.

Shapes: N rows (or one block of them), K teachers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from typing_extensions import Self

from collegium.options import Tensor, torch
from collegium.types import Rows, domain_number, join_tensors, map_tensors

SCALAR_BYTES = 2200
"""Peak memory of the statistics at 25 temperatures and of fits, per token and teacher."""


@dataclass(frozen=True, slots=True)
class RowStats:
    """Per-row statistics of each (calibrated) teacher distribution, the input of a weighting."""

    entropy_KN: Tensor
    """(K, N) nats."""
    label_logp_KN: Tensor
    """(K, N) log-probability of the row's label. A causal rule uses it for later rows only."""
    max_logp_KN: Tensor
    """(K, N) log-probability of the most likely token."""
    consensus_kl_KN: Tensor | None = None
    """(K, N) nats, KL(P_k || mean of all P). None unless the rule sets `needs_consensus`."""
    answered_KN: Tensor | None = None
    """(K, N) bool: the teacher answers the row. None for all. Statistics of other rows are 0."""
    shared_N: Tensor | None = None
    """(N,) bool: every teacher that answers in the document answers the row. None for all."""

    @classmethod
    def stack(cls, parts: Sequence[RowStats]) -> RowStats:
        """Stack the (N,) statistics of each teacher into (K, N)."""
        return replace(join_tensors(parts, torch.stack), shared_N=parts[0].shared_N)

    @classmethod
    def cat(cls, parts: Sequence[RowStats]) -> RowStats:
        """Concatenate the statistics of consecutive blocks of rows."""
        return join_tensors(parts, partial(torch.cat, dim=-1))

    def with_nan(self) -> RowStats:
        """The same statistics with NaN at rows without an answer, for reports."""
        if self.answered_KN is None:
            return self
        is_missing_KN = ~self.answered_KN
        columns = replace(self, answered_KN=None, shared_N=None)
        return map_tensors(columns, lambda x_KN: x_KN.masked_fill(is_missing_KN, torch.nan))

    def consensus_kl(self) -> Tensor:
        """Return `consensus_kl_KN` for a rule that requires it.

        Raises:
            ValueError: it was not measured.
        """
        if self.consensus_kl_KN is None:
            raise ValueError(
                "RowStats.consensus_kl: got None; must be measured for rules with "
                "`needs_consensus`; use `fuse`, scalars of single teachers are not enough"
            )
        return self.consensus_kl_KN


@dataclass(frozen=True, slots=True)
class Carry:
    """State that a weighting carries from one block to the next."""

    evidence_K: Tensor
    """(K,) float64: decayed sum of label log-probabilities up to and including the last row."""
    document: Tensor
    """Scalar int64: the document of the last row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationData:
    """Rows of the calibration split that a rule is fitted on.

    Raises:
        ValueError: there are no rows.
    """

    teachers: Sequence[str]
    """Names in the order of the statistics."""
    rows: Rows
    """N rows; documents are unique among them."""
    stats: RowStats
    """(K, N) each, at the temperatures that the teachers are fused at."""
    raw: RowStats
    """(K, N) each, without temperatures, and with the consensus if it was measured."""
    domains: Sequence[str] = ()
    """Names of the domains of the split."""

    def __post_init__(self) -> None:
        if self.stats.entropy_KN.shape[1] == 0:
            raise ValueError("calibration: got no rows; must have some; use a larger split")

    def by_domain(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each domain that has rows, with the (N,) mask of its rows.

        Raises:
            ValueError: the rows have no domains.
        """
        if self.rows.domains is None:
            raise ValueError(
                "calibration: got rows without domains; must have them; name a domain for each "
                "data source"
            )
        for domain in self.domains:
            is_here_N = self.rows.domains == domain_number(domain)
            if is_here_N.any():
                yield domain, is_here_N


Fit = Callable[[CalibrationData], "Weighting"]
"""Fits a rule on calibration rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The circumstances of a preflight that decide which rules it can try."""

    best_single: str
    """Teacher of lowest NLL on the calibration split."""
    domains: Sequence[str]
    """Names of the domains of the split."""
    has_consensus: bool
    """Whether the divergence from the consensus was measured."""
    is_extended: bool
    """Whether to try fitted rules, and rules that apply each head more than once."""


class Weighting(ABC):
    """A rule that maps statistics of rows to unnormalized log-weights of teachers.

    A rule *streams* when the score of a teacher depends only on that teacher's statistics up to
    the current row. It is then evaluated inside the loop over blocks, and each head is applied
    once. Other rules see all rows and teachers at once, so each head is applied twice.
    """

    streams: bool = False
    """True if `stream` can be called per block and per teacher."""
    needs_consensus: bool = False
    """True if the rule reads `consensus_kl_KN`, at the cost of two more passes of each head."""
    uses_label: ClassVar[bool] = False
    """True if a row's label enters its own weight, which makes the target's NLL meaningless."""
    reads_prefix: bool = False
    """True if the labels of earlier rows of the document enter a weight."""
    is_fitted: ClassVar[bool] = False
    """True if a preflight fits its options, which makes it more complex than one that is not."""
    is_single: ClassVar[bool] = False
    """True if every row gets one teacher, so that all pools are equal and nothing is fused."""
    is_only_compared: ClassVar[bool] = False
    """True if a preflight measures the rule, and chooses it only if there is no other."""
    zero_excludes: ClassVar[bool] = False
    """True if an entry of 0 in each table of `teacher_tables` leaves a teacher out."""

    @abstractmethod
    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        """Score the teachers at these rows. Weights are the softmax of the scores over K.

        From (K, n) statistics, in the order of `teachers`, and the same n rows in document order.

        Returns:
            (K, n) float64 scores.
        """

    def stream(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None
    ) -> tuple[Tensor, Carry | None]:
        """Score one block of rows of a rule that streams.

        The statistics are (1, n), of one teacher. The rows follow those of the call before, which
        returned `carry`. It is None at the first.

        Returns:
            (1, n) float64 scores, and the carry for the following rows.
        """
        return self.log_scores(stats, rows, teachers), None

    @classmethod
    def candidates(cls, conditions: Conditions) -> Sequence[Fit]:
        """Return the rules of this class that a preflight tries; none by default."""
        return ()

    def unchanged(self, data: CalibrationData) -> Self:
        """Return this rule: the `Fit` of a candidate whose options are not fitted."""
        return self

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        """Options that require one entry per teacher: path inside the options -> table."""
        return {}

    def teacher_fields(self) -> Mapping[tuple[str, ...], str]:
        """Options that hold one teacher's name: path inside the options -> name."""
        return {}

    def domain_names(self) -> Mapping[tuple[str, ...], Sequence[str]]:
        """Options that list domains: path inside the options -> names."""
        return {}

    def excludes(self, teacher: str) -> bool:
        """True if this teacher's weight is zero at every row, independent of its outputs."""
        tables = self.teacher_tables().values() if self.zero_excludes else ()
        return len(tables) > 0 and all(table[teacher] == 0.0 for table in tables)


class FittedWeighting(Weighting):
    """A rule whose options a preflight fits on calibration text."""

    is_fitted = True
    needs_domains: ClassVar[bool] = False
    """True if a preflight tries the rule only on a split of several domains."""

    @classmethod
    @abstractmethod
    def fit(cls, data: CalibrationData) -> Self:
        """Fit the options. Defaults of further parameters are those of a preflight.

        Raises:
            ValueError: the rows lack something that the rule reads.
        """

    @classmethod
    def candidates(cls, conditions: Conditions) -> Sequence[Fit]:
        has_domains = len(conditions.domains) > 1 or not cls.needs_domains
        return [cls.fit] if conditions.is_extended and has_domains else []
