"""Score the rows of a batch with every teacher, or each row with the teacher it is routed to.

Shapes: B windows, T time, N rows, m rows of one teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from collegium.distributions import Answer, Capability, DenseRows, Teacher
from collegium.fusion.fitted import Route
from collegium.fusion.fuse import Fusion
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

    Under `route` a live teacher reads only the windows that hold rows routed to it, scores those
    rows, and is skipped where there are none. A teacher whose hidden states are compared scores all
    rows.

    Args:
        teachers: the frozen models, or sources that answer for them.
        batch: the windows.
        rows: all rows of the batch.
        fusion: the rule that fuses the answers; None where only hidden states are read.
        taps: hidden states to return, by name of the teacher.

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
