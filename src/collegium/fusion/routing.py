"""Reading each row from one teacher, without a pool.

Shapes: N rows, n rows of one block, m rows of one teacher, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from collegium.distributions import Answer, Distribution, NamedRows
from collegium.fusion.fitted import Route
from collegium.fusion.pools import RowReader
from collegium.fusion.weighting import RowStats
from collegium.options import torch
from collegium.types import Rows

if TYPE_CHECKING:
    from torch import Tensor


class RoutedReader:
    """Reads each row from its own teacher, at that teacher's temperature.

    Raises:
        DataError: a row names a teacher that is missing.
        ValueError: a teacher answers some rows, and not all of its own.
    """

    def __init__(
        self, route: Route, answers: Sequence[Answer], rows: Rows, temperatures: Mapping[str, float]
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
