"""Diagnosis of a non-finite step: the first component to produce it, and its samples.

Shapes: N rows, n block of rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from collegium.distributions import Answer, Distribution, HiddenRows
from collegium.errors import TrainingError
from collegium.train.sharded import gathered_root, is_true_anywhere
from collegium.train.step import DistillStep
from collegium.types import LossSum

_BLOCK = 512
_MAX_SHOWN = 8


def first_bad_rows(
    student: HiddenRows, answers: Sequence[Answer], loss: LossSum
) -> tuple[str, Tensor] | None:
    """Name the first of teachers, student and loss terms that is not finite, with its samples.

    A logit of -inf is a token ruled out, not an error. Returns None if everything is finite.
    """
    rows, sources = loss.rows, []
    for answer in answers:
        at_m = answer.rows
        scored = rows if at_m is None else rows.part(at_m.to(rows.samples.device))
        sources.append((f"teacher `{answer.name}`", answer.distribution, scored))
    # Teachers first: their logits are inputs of the loss, so they cannot be a consequence of it.
    for name, distribution, scored in (*sources, ("the student's logits", student, rows)):
        is_bad_N = _bad_rows(distribution, len(scored))
        if is_bad_N.any():
            return name, scored.samples[is_bad_N]
    terms = {f"the loss term `{name}`": value for name, value in loss.terms.items()}
    for name, value in {**terms, "the sum of the loss terms": loss.total}.items():
        if not torch.isfinite(value):
            return name, rows.samples
    return None


def _bad_rows(distribution: Distribution, num_rows: int) -> Tensor:
    # `cat` of an empty list raises, and a routed teacher may score no row.
    flags = [torch.zeros(0, dtype=torch.bool)]
    # In blocks: the step that failed never held (N, V) logits either.
    for start in range(0, num_rows, _BLOCK):
        logits_nV = distribution.logits(slice(start, min(start + _BLOCK, num_rows)))
        flags.append((logits_nV.isnan() | logits_nV.isposinf()).any(-1).cpu())
    return torch.cat(flags)


class NanGuard:
    """Refuses an optimizer step whose loss or gradients are not finite, and names the cause."""

    def __init__(self, step: DistillStep, names: Sequence[str] = ()) -> None:
        """Name samples by `names`, else by their number."""
        self._step = step
        self._names = names
        self._micro_batches: list[Mapping[str, Tensor]] = []
        self._losses: list[Tensor] = []

    def add(self, inputs: Mapping[str, Tensor], loss: Tensor) -> None:
        """Add a micro-batch and its loss, detached."""
        self._micro_batches.append(inputs)
        self._losses.append(loss)

    def check(self, step: int) -> None:
        """Check the micro-batches since the last call, before the optimizer step.

        Raises:
            TrainingError: loss or gradients are not finite. Nothing was updated.
        """
        micro_batches, loss = self._micro_batches, cast(Tensor, sum(self._losses))
        self._micro_batches, self._losses = [], []
        grads = [p.grad for p in self._step.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        # One synchronization per step, beside those of choosing rows and of the teachers' checks.
        if not is_true_anywhere(is_bad, self._step):
            return
        with gathered_root(self._step):
            part, samples = self._diagnose(micro_batches)
        numbers: list[int] = samples.unique().tolist()
        known = range(len(self._names))
        shown = [self._names[n] if n in known else str(n) for n in numbers]
        more = f" and {len(shown) - _MAX_SHOWN} more" if len(shown) > _MAX_SHOWN else ""
        raise TrainingError(
            f"step {step}: got loss {loss.item():g} with gradient norm {norm.item():g}, first seen "
            f"in {part}, samples {', '.join(shown[:_MAX_SHOWN])}{more}; must be finite; nothing "
            "was updated or saved; look at these samples, run that part in float32 or lower "
            "learning_rate"
        )

    @torch.no_grad()
    def _diagnose(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> tuple[str, Tensor]:
        samples = []
        for inputs in micro_batches:
            student, answers, loss = self._step.outputs(inputs)
            bad = first_bad_rows(student, answers, loss)
            if bad is not None:
                return bad
            samples.append(loss.rows.samples)
        for name, parameter in self._step.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return f"the gradient of {name}", torch.cat(samples)
        return "the norm of all gradients together", torch.cat(samples)
