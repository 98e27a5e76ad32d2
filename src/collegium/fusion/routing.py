"""Routing: one teacher per row, named by the row or by its domain.

Shapes: N rows, n rows of one block, m rows of one teacher, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.distributions import Answer, Distribution, NamedRows
from collegium.errors import DataError
from collegium.fusion.pools import RowReader
from collegium.fusion.weights import Carry, RowStats, Weighting
from collegium.types import STRICT, Rows, domain_number, teacher_number


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Route(Weighting):
    """One teacher per row: the one that the row names, else that of its domain, else the default.

    A row names its teacher in the `teacher_column` of its data source. Nothing is pooled: the target
    equals the teacher's distribution bit for bit, and only that teacher's head is applied.
    """

    default: str
    """Teacher of rows that name none, in domains that are not listed."""
    domains: dict[str, str] = Field(default_factory=dict)
    """Domain -> name of its teacher."""

    @property
    def streams(self) -> bool:
        return True

    def teacher_fields(self) -> Mapping[tuple[str, ...], str]:
        return {("default",): self.default, **{("domains", d): t for d, t in self.domains.items()}}

    def domain_names(self) -> Mapping[tuple[str, ...], Sequence[str]]:
        return {("domains",): list(self.domains)}

    def numbers(self, rows: Rows) -> Tensor:
        """(N,) int64: `teacher_number` of the teacher of each row."""
        number_N = torch.full_like(rows.index, teacher_number(self.default))
        if rows.domains is not None:
            for domain, teacher in self.domains.items():
                number_N[rows.domains == domain_number(domain)] = teacher_number(teacher)
        if rows.teachers is not None:
            number_N = torch.where(rows.teachers != 0, rows.teachers, number_N)
        return number_N

    def shares(self, rows: Rows, teachers: Sequence[str]) -> list[Tensor]:
        """Partition the rows: per teacher an ascending (m,) int64 tensor of indices on the CPU.

        Raises:
            DataError: a row names a teacher that is missing.
        """
        number_N = self.numbers(rows).cpu()
        shares = [(number_N == teacher_number(name)).nonzero()[:, 0] for name in teachers]
        num_routed = sum(map(len, shares))
        if num_routed != len(rows):
            raise DataError(
                f"teacher_ids: got {len(rows) - num_routed} of {len(rows)} rows for other teachers; "
                f"must name one of {', '.join(teachers)}; use `teacher_number` of its name, or 0 "
                "for none"
            )
        return shares

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        number_N = self.numbers(rows).to(stats.entropy_KN.device)
        own_K = torch.tensor([teacher_number(name) for name in teachers], device=number_N.device)
        score_KN = torch.zeros_like(stats.entropy_KN, dtype=torch.float64)
        return score_KN.masked_fill(own_K[:, None] != number_N, -torch.inf), None


class RoutedReader:
    """Reads each row from its own teacher, at that teacher's temperature.

    Raises:
        DataError: a row names a teacher that is missing.
        ValueError: a teacher answers some rows, and not all of its own.
    """

    def __init__(
        self,
        route: Route,
        answers: Sequence[Answer],
        rows: Rows,
        temperatures: Mapping[str, float],
    ) -> None:
        self._rows = rows
        self._temperatures = [temperatures.get(answer.name, 1.0) for answer in answers]
        self._shares = route.shares(rows, [answer.name for answer in answers])
        self._reader = RowReader()
        self._distributions = [
            _own_rows(answer, own_m, temperature)
            for answer, own_m, temperature in zip(
                answers, self._shares, self._temperatures, strict=True
            )
        ]

    def read(self, block: slice) -> tuple[RowStats, Tensor, Tensor]:
        """The rows of a block.

        Returns:
            (K, n) statistics, NaN where a teacher was not read, (K, n) scores, and (n, V)
            log-probabilities.
        """
        num_rows, labels_n = block.stop - block.start, self._rows.labels[block]
        num_teachers = len(self._distributions)
        scalars_3Kn: Tensor | None = None
        logp_nV: Tensor | None = None
        score_Kn = torch.full(
            (num_teachers, num_rows), -torch.inf, dtype=torch.float64, device=labels_n.device
        )
        for number, distribution in enumerate(self._distributions):
            first, last = self._bounds(number, block)
            if first == last:
                continue
            at_m = (self._shares[number][first:last] - block.start).to(labels_n.device)
            stats, member_mV = self._read_own(
                number, distribution, slice(first, last), labels_n[at_m]
            )
            if scalars_3Kn is None or logp_nV is None:
                logp_nV = member_mV.new_empty(num_rows, member_mV.shape[1])
                scalars_3Kn = member_mV.new_full((3, num_teachers, num_rows), torch.nan)
            logp_nV[at_m] = member_mV.to(logp_nV.dtype)
            score_Kn[number, at_m] = 0.0
            columns = (stats.entropy_KN, stats.label_logp_KN, stats.max_logp_KN)
            for table_Kn, column_m in zip(scalars_3Kn, columns, strict=True):
                table_Kn[number, at_m] = column_m.to(table_Kn.dtype)
        assert scalars_3Kn is not None
        assert logp_nV is not None
        return RowStats(scalars_3Kn[0], scalars_3Kn[1], scalars_3Kn[2]), score_Kn, logp_nV

    def _read_own(
        self, number: int, distribution: Distribution, own: slice, labels_m: Tensor
    ) -> tuple[RowStats, Tensor]:
        temperature = self._temperatures[number]
        stats, logp_mV = self._reader.read(
            distribution.logits(own),
            labels_m,
            temperature=temperature if distribution.is_full else 1.0,
        )
        scalars = distribution.scalars(own, temperature)
        return stats if scalars is None else RowStats(*scalars), logp_mV

    def _bounds(self, number: int, block: slice) -> tuple[int, int]:
        """The range of a teacher's own rows that lies in the block."""
        edges = torch.tensor([block.start, block.stop])
        first, last = torch.searchsorted(self._shares[number], edges).tolist()
        return first, last


def _own_rows(answer: Answer, own_m: Tensor, temperature: float) -> Distribution:
    """The answer at the rows routed to its teacher."""
    distribution = answer.distribution
    if isinstance(distribution, NamedRows):
        distribution = distribution.tempered(temperature)
    if answer.rows is None:
        return distribution if len(own_m) == len(distribution) else distribution.take(own_m)
    answered_m = answer.rows.cpu()
    if torch.equal(answered_m, own_m):
        return distribution
    if not bool(torch.isin(own_m, answered_m).all()):
        raise ValueError(
            f"teacher `{answer.name}`: answers {len(answered_m)} rows and lacks some of the "
            f"{len(own_m)} routed to it; must answer all of them; score it by the same route"
        )
    return distribution.take(torch.searchsorted(answered_m, own_m))
