"""After a non-finite step: which part said it first, and for which samples.

Shapes: N rows, n block of rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from collegium.types import LossSum, RowLogits, Rows, StudentRows, TeacherRows

_BLOCK = 512
_SHOWN = 8


def first_bad_rows(
    student: StudentRows, teachers: Sequence[TeacherRows], loss: LossSum, rows: Rows
) -> tuple[str, Tensor] | None:
    """Name the first of teachers, student and terms that is not finite, with the samples it is seen in.

    A logit of -inf is a token ruled out, not an error.
    """
    for teacher in teachers:
        answered = teacher.answered
        own = rows if answered is None else rows.part(answered.to(rows.samples.device))
        is_bad_N = _bad_rows(teacher.scores, len(own))
        if is_bad_N.any():
            return f"teacher `{teacher.name}`", own.samples[is_bad_N]
    is_bad_N = _bad_rows(student, len(rows))
    if is_bad_N.any():
        return "the student's logits", rows.samples[is_bad_N]
    for name, value in loss.terms.items():
        if not torch.isfinite(value):
            return f"the loss term `{name}`", rows.samples
    if not torch.isfinite(loss.total):
        return "the sum of the loss terms", rows.samples
    return None


def bad_gradients(named: Iterator[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the parameters whose gradient is not finite."""
    return [
        name
        for name, parameter in named
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]


def sample_list(samples: Tensor, names: list[str] | None) -> str:
    """`samples 3, 7, ...`, by name where there are names."""
    numbers: list[int] = samples.unique().tolist()
    known = names or []
    shown = [known[n] if 0 <= n < len(known) else str(n) for n in numbers]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"samples {', '.join(shown[:_SHOWN])}{more}"


def _bad_rows(scores: RowLogits, num_rows: int) -> Tensor:
    found = [torch.zeros(0, dtype=torch.bool)]
    for start in range(0, num_rows, _BLOCK):
        logits_nV = scores.logits(slice(start, min(start + _BLOCK, num_rows)))
        found.append((logits_nV.isnan() | logits_nV.isposinf()).any(-1).cpu())
    return torch.cat(found)
