"""Diagnosis of a non-finite step: the first component to produce it, and its samples.

Shapes: N rows, n block of rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from collegium.types import LossSum, RowLogits, Rows, StudentRows, TeacherRows

_BLOCK = 512
_MAX_SHOWN = 8


def first_bad_rows(
    student: StudentRows, teachers: Sequence[TeacherRows], loss: LossSum, rows: Rows
) -> tuple[str, Tensor] | None:
    """Name the first of teachers, student and loss terms that is not finite, with its samples.

    A logit of -inf is a token ruled out, not an error. Returns None if everything is finite.
    """
    # Teachers first: their logits are inputs of the loss, so they cannot be a consequence of it.
    for teacher in teachers:
        answered = teacher.answered
        scored = rows if answered is None else rows.part(answered.to(rows.samples.device))
        is_bad_N = _bad_rows(teacher.scores, len(scored))
        if is_bad_N.any():
            return f"teacher `{teacher.name}`", scored.samples[is_bad_N]
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
    """Return the names of the parameters whose gradient is not finite."""
    return [
        name
        for name, parameter in named
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]


def sample_list(samples: Tensor, names: list[str] | None) -> str:
    """Format samples as `samples 3, 7, ...`, by name if they have one."""
    numbers: list[int] = samples.unique().tolist()
    titles = names or []
    shown = [titles[n] if 0 <= n < len(titles) else str(n) for n in numbers]
    more = f" and {len(shown) - _MAX_SHOWN} more" if len(shown) > _MAX_SHOWN else ""
    return f"samples {', '.join(shown[:_MAX_SHOWN])}{more}"


def _bad_rows(scores: RowLogits, num_rows: int) -> Tensor:
    # `cat` of an empty list raises, and a routed teacher may score no row.
    flags = [torch.zeros(0, dtype=torch.bool)]
    # In blocks: the step that failed never held (N, V) logits either.
    for start in range(0, num_rows, _BLOCK):
        logits_nV = scores.logits(slice(start, min(start + _BLOCK, num_rows)))
        flags.append((logits_nV.isnan() | logits_nV.isposinf()).any(-1).cpu())
    return torch.cat(flags)
