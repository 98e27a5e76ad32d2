"""Asking the teachers about the rows of a batch: all about all of them, or under a route each about its own.

Shapes: B windows, T time, N rows, m rows of one teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from collegium.fusion.pooling import Fusion
from collegium.fusion.routing import Route
from collegium.types import Batch, DenseRows, Rows, Teacher, TeacherRows

Ask = Callable[[Teacher, Batch, Rows], TeacherRows]
"""How one teacher is asked about rows of a batch."""


def score_teachers(
    teachers: Sequence[Teacher],
    batch: Batch,
    rows: Rows,
    fusion: Fusion | None,
    *,
    ask: Ask = lambda teacher, batch, rows: teacher.score(batch, rows),
    whole: Collection[str] = (),
) -> list[TeacherRows]:
    """What the teachers say, in their order.

    Under `route` a live teacher reads the windows that hold rows of its own, scores those rows alone, and does not run where there are none.

    Args:
        teachers: whom to ask.
        batch: the windows.
        rows: all rows of the batch.
        fusion: how the answers are to be fused; None where only their hidden states count.
        ask: how to ask one of them.
        whole: names of teachers that are asked about all rows whatever the route, since their hidden states are compared at all of them.

    Raises:
        DataError: a row names a teacher that is not there.
    """
    route = None if fusion is None else fusion.weighting
    if not isinstance(route, Route) or not all("dense" in one.provides for one in teachers):
        return [ask(teacher, batch, rows) for teacher in teachers]
    shares = route.shares(rows, [teacher.name for teacher in teachers])
    return [
        ask(teacher, batch, rows)
        if teacher.name in whole
        else _score_own(teacher, batch, rows, own_m, ask)
        for teacher, own_m in zip(teachers, shares, strict=True)
    ]


def _score_own(teacher: Teacher, batch: Batch, rows: Rows, own_m: Tensor, ask: Ask) -> TeacherRows:
    if len(own_m) == 0:
        return TeacherRows(teacher.name, DenseRows(torch.empty(0, 0)), answered=own_m)
    if len(own_m) == len(rows):
        return ask(teacher, batch, rows)
    own_m = own_m.to(rows.index.device)
    own = rows.part(own_m)
    length = batch.input_ids.shape[1]
    windows_b, place_m = torch.unique(own.index // length, return_inverse=True)
    own = replace(own, index=place_m * length + own.index % length)
    return replace(ask(teacher, batch.part(windows_b), own), answered=own_m)
