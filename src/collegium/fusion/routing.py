"""Routing: one teacher per row, named by the row itself or by its domain.

Shapes: N rows, n rows of one block, m rows of one teacher, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.errors import DataError
from collegium.fusion.stream import RowReader
from collegium.fusion.weights import Carry, RowStats, Weighting
from collegium.types import STRICT, Rows, TeacherRows, domain_number, teacher_number


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Route(Weighting):
    """One teacher per row: w_k = 1 for the teacher that the row names, else for that of its domain, else for the default.

    A row names its teacher in the `teacher_column` of its data source. Nothing is pooled: the target is the teacher's distribution, bit for
    bit, and only that teacher's head is applied to the row.
    """

    default: str
    """Teacher of a row that names none, in a domain that is not listed."""
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
        """The rows of each teacher: K tensors (m,) int64 on the CPU, ascending, that share the N rows among them.

        Raises:
            DataError: a row names a teacher that is not there.
        """
        number_N = self.numbers(rows).cpu()
        found = [(number_N == teacher_number(name)).nonzero()[:, 0] for name in teachers]
        num_found = sum(map(len, found))
        if num_found != len(rows):
            raise DataError(
                f"teacher_ids: got {len(rows) - num_found} of {len(rows)} rows for other teachers; must name one of "
                f"{', '.join(teachers)}; use `teacher_number` of its name, or 0 for none"
            )
        return found

    def log_scores(
        self, stats: RowStats, rows: Rows, teachers: Sequence[str], carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        number_N = self.numbers(rows).to(stats.entropy_KN.device)
        own_K = torch.tensor([teacher_number(name) for name in teachers], device=number_N.device)
        score_KN = torch.zeros_like(stats.entropy_KN, dtype=torch.float64)
        return score_KN.masked_fill(own_K[:, None] != number_N, -torch.inf), None


class RoutedReader:
    """Reads each row from its own teacher alone, at that teacher's temperature.

    Raises:
        DataError: a row names a teacher that is not there.
        ValueError: a teacher was asked about other rows than its own.
    """

    def __init__(
        self,
        route: Route,
        teachers: Sequence[TeacherRows],
        rows: Rows,
        temperatures: Mapping[str, float],
    ) -> None:
        self._teachers = teachers
        self._rows = rows
        self._temperatures = temperatures
        self._shares = route.shares(rows, [teacher.name for teacher in teachers])
        self._reader = RowReader()
        for teacher, own_m in zip(teachers, self._shares, strict=True):
            if teacher.answered is not None and not torch.equal(teacher.answered.cpu(), own_m):
                raise ValueError(
                    f"teacher `{teacher.name}`: answers for other rows than those routed to it; must be asked by the same rule"
                )

    def read(self, block: slice) -> tuple[RowStats, Tensor, Tensor]:
        """The rows of a block: (K, n) statistics, NaN where a teacher was not read; (K, n) scores; (n, V) log-probabilities."""
        num_rows, labels_n = block.stop - block.start, self._rows.labels[block]
        scalars: Tensor | None = None
        logp_nV: Tensor | None = None
        score_Kn = torch.full(
            (len(self._teachers), num_rows),
            -torch.inf,
            dtype=torch.float64,
            device=labels_n.device,
        )
        for number in range(len(self._teachers)):
            first, last = self._bounds(number, block)
            if first == last:
                continue
            at_m = (self._shares[number][first:last] - block.start).to(labels_n.device)
            stats, member_mV = self._reader.read(
                self._logits(number, block, at_m, slice(first, last)),
                labels_n[at_m],
                temperature=self._temperatures.get(self._teachers[number].name, 1.0),
            )
            if scalars is None or logp_nV is None:
                logp_nV = member_mV.new_empty(num_rows, member_mV.shape[1])
                scalars = member_mV.new_full((3, len(self._teachers), num_rows), torch.nan)
            logp_nV[at_m] = member_mV.to(logp_nV.dtype)
            score_Kn[number, at_m] = 0.0
            columns = (stats.entropy_KN, stats.label_logp_KN, stats.max_logp_KN)
            for table_Kn, column_m in zip(scalars, columns, strict=True):
                table_Kn[number, at_m] = column_m.to(table_Kn.dtype)
        assert scalars is not None
        assert logp_nV is not None
        return RowStats(scalars[0], scalars[1], scalars[2]), score_Kn, logp_nV

    def _bounds(self, number: int, block: slice) -> tuple[int, int]:
        """Which of a teacher's own rows lie in the block."""
        edges = torch.tensor([block.start, block.stop])
        first, last = torch.searchsorted(self._shares[number], edges).tolist()
        return first, last

    def _logits(self, number: int, block: slice, at_m: Tensor, own: slice) -> Tensor:
        """(m, V) logits of one teacher at its own rows of the block."""
        teacher = self._teachers[number]
        if teacher.answered is not None:
            return teacher.scores.logits(own)
        logits_nV = teacher.scores.logits(block)
        if len(at_m) == len(logits_nV):
            return logits_nV
        return logits_nV[at_m.to(logits_nV.device)]
