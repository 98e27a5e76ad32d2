"""Scoring the teachers of a batch, and reading each row from the one teacher it is routed to.

Shapes: b windows, N rows, n rows of one block, m rows of one teacher, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from collegium.distributions import Answer, Capability, DenseRows, Distribution, NamedRows, Teacher
from collegium.fusion.fitted import Route
from collegium.fusion.options import Fusion
from collegium.fusion.pools import RowReader, rows_inside
from collegium.fusion.weighting import RowStats
from collegium.options import Tensor, torch
from collegium.types import Batch, Rows


def score_teachers(
    teachers: Sequence[Teacher],
    batch: Batch,
    rows: Rows,
    fusion: Fusion | None,
    *,
    taps: Mapping[str, Sequence[str]] | None = None,
) -> list[Answer]:
    """Score the rows with the teachers, in their order.

    Under `route` a live teacher reads only the windows with rows routed to it, scores those rows,
    and is skipped where there are none. One whose hidden states are compared scores all rows.
    `fusion` is None if only hidden states are read. `taps` are those to return, by teacher name.

    Raises:
        DataError: a row names a teacher that is missing.
    """
    taps = taps or {}
    route = None if fusion is None else fusion.weighting
    if not isinstance(route, Route):
        return [teacher.score(batch, rows, taps.get(teacher.name, ())) for teacher in teachers]
    shares = route.shares(rows, [teacher.name for teacher in teachers])
    return [
        teacher.score(batch, rows, taps.get(teacher.name, ()))
        if taps.get(teacher.name) or Capability.SUBSETS not in teacher.capabilities.supported
        else _score_own_rows(teacher, batch, rows, own_m)
        for teacher, own_m in zip(teachers, shares, strict=True)
    ]


def _score_own_rows(teacher: Teacher, batch: Batch, rows: Rows, own_m: Tensor) -> Answer:
    if len(own_m) == 0:
        return Answer(teacher.name, DenseRows(torch.empty(0, 0)), rows=own_m)
    if len(own_m) == len(rows):
        return teacher.score(batch, rows)
    own_m = own_m.to(rows.index.device)
    routed = rows.part(own_m)
    length = batch.input_ids.shape[1]
    windows_b, place_m = torch.unique(routed.index // length, return_inverse=True)
    routed = replace(routed, index=place_m * length + routed.index % length)
    return replace(teacher.score(batch.part(windows_b), routed), rows=own_m)


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
        self._reader = RowReader()
        self._temperatures = [temperatures.get(answer.name, 1.0) for answer in answers]
        self._shares = route.shares(rows, [answer.name for answer in answers])
        shares = zip(answers, self._shares, self._temperatures, strict=True)
        self._distributions = [_own_rows(*share) for share in shares]

    def read(self, block: slice) -> tuple[RowStats, Tensor, Tensor]:
        """(K, n) statistics, NaN where not read, (K, n) scores, and (n, V) log-probabilities."""
        labels_n = self._rows.labels[block]
        scalars_3Kn: Tensor | None = None
        logp_nV: Tensor | None = None
        shape = len(self._shares), len(labels_n)
        score_Kn = torch.full(shape, -torch.inf, dtype=torch.float64, device=labels_n.device)
        for number, distribution in enumerate(self._distributions):
            part, at_m = rows_inside(self._shares[number], block)
            if len(at_m) == 0:
                continue
            at_m, temperature = at_m.to(labels_n.device), self._temperatures[number]
            # Named rows are at this temperature already.
            divisor = temperature if distribution.is_full else 1.0
            logits_mV, labels_m = distribution.logits(part), labels_n[at_m]
            stats, logp_mV = self._reader.read(logits_mV, labels_m, temperature=divisor)
            if logp_nV is None or scalars_3Kn is None:
                logp_nV = logp_mV.new_empty(len(labels_n), logp_mV.shape[1])
                scalars_3Kn = logp_mV.new_full((3, *score_Kn.shape), torch.nan)
            logp_nV[at_m] = logp_mV.to(logp_nV.dtype)
            score_Kn[number, at_m] = 0.0
            scalars = distribution.scalars(part, temperature)
            if scalars is None:
                scalars = stats.entropy_KN, stats.label_logp_KN, stats.max_logp_KN
            scalars_3Kn[:, number, at_m] = torch.stack(scalars).to(scalars_3Kn.dtype)
        assert scalars_3Kn is not None
        assert logp_nV is not None
        return RowStats(*scalars_3Kn), score_Kn, logp_nV


def _own_rows(answer: Answer, own_m: Tensor, temperature: float) -> Distribution:
    """The answer at the rows routed to its teacher."""
    distribution = answer.distribution
    if isinstance(distribution, NamedRows):
        distribution = distribution.tempered(temperature)
    index_m = own_m
    if answer.rows is not None:
        answered_m = answer.rows.cpu()
        if not bool(torch.isin(own_m, answered_m).all()):
            raise ValueError(
                f"teacher `{answer.name}`: answers {len(answered_m)} rows and lacks some of the "
                f"{len(own_m)} routed to it; must answer all of them; score it by the same route"
            )
        index_m = torch.searchsorted(answered_m, own_m)
    return distribution if len(index_m) == len(distribution) else distribution.take(index_m)
