"""Base of the losses on inner states: one term per teacher, with a dynamic scale.

Shapes: N rows, K teachers with a term.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from collegium.distributions import Answer, HiddenRows
from collegium.errors import RecipeError, TrainingError, nearest
from collegium.losses.pairing import NO_ORIGINS, EmbeddingOptions, LayerTerm, Origins, feature_map
from collegium.types import LossSum, Rows


class StateLoss(nn.Module, ABC):
    """One term per teacher, the mean over its pairs of layers, with a dynamic scale.

    The scale follows NVIDIA ModelOpt's `LogitsAndIntermediatesLossBalancer`.
    """

    scale_K: Tensor

    def __init__(
        self,
        options: LayerTerm | EmbeddingOptions,
        student_widths: Mapping[str, int],
        teacher_widths: Mapping[str, Mapping[str, int]],
        *,
        seed: int = 0,
        name: str | None = None,
        origins: Origins = NO_ORIGINS,
    ) -> None:
        """Pair the layers. `name` is that of the terms in the log, `seed` that of adapters, if any.

        The widths are those of all taps of a model, in order of depth. `origins` are the layers
        that those of the student are copies of.

        Raises:
            RecipeError: a named teacher or tap does not exist.
        """
        super().__init__()
        for key, names in options.named_teachers().items():
            for teacher in (teacher for teacher in names if teacher not in teacher_widths):
                raise RecipeError(
                    f"{options.section}.{key}: got `{teacher}`; must be a teacher"
                    f"{nearest(teacher, teacher_widths)}"
                )
        self.options: Any = options
        self.name = options.log_name if name is None else name
        self.pairs = {
            name: feature_map(
                options,
                list(student_widths),
                list(widths),
                origin=origins.get(name),
                where=options.section,
            )
            for name, widths in teacher_widths.items()
            if options.teacher_weight(name) > 0
        }
        self.register_buffer("scale_K", torch.ones(len(self.pairs)))
        self._sums: Tensor | None = None  # (1 + K,): distribution loss, then the terms

    @property
    def student_taps(self) -> list[str]:
        """Taps of the student that the terms read, without duplicates."""
        pairs = (pair for pairs in self.pairs.values() for pair in pairs)
        return list(dict.fromkeys(self.tap(ours) for ours, _ in pairs))

    def teacher_taps(self, name: str) -> list[str]:
        """Return the taps that the term of one teacher reads, empty if it has no term."""
        return list(dict.fromkeys(self.tap(theirs) for _, theirs in self.pairs.get(name, [])))

    def tap(self, layer: str) -> str:
        """Return the tap of a layer that the term reads."""
        return layer

    @abstractmethod
    def pair_values(
        self, teacher: int, student: HiddenRows, answer: Answer, rows: Rows
    ) -> list[Tensor]:
        """(N,) values of each pair of layers with the teacher of this number in `pairs`."""

    def weights(self, factor: float = 1.0) -> dict[str, float]:
        """Return the current weight of each term: its factor * teacher weight * dynamic scale.

        `factor` is that of the schedule.
        """
        return {
            f"{self.name}/{name}": self.options.teacher_weight(name) * factor * scale
            for name, scale in zip(self.pairs, self.scale_K.tolist(), strict=True)
        }

    def forward(
        self, student: HiddenRows, answers: Sequence[Answer], rows: Rows
    ) -> dict[str, Tensor]:
        """Compute the term of each teacher per row: `NAME/TEACHER` -> (N,) in float32 or wider.

        Raises:
            TrainingError: a teacher with a term is missing.
        """
        by_name = {answer.name: answer for answer in answers}
        losses: dict[str, Tensor] = {}
        for number, name in enumerate(self.pairs):
            term = f"{self.name}/{name}"
            if name not in by_name:
                raise TrainingError(f"{term}: teacher not scored; every term needs it")
            # Autocast would run adapters, norms and scores in half precision.
            with torch.autocast(rows.index.device.type, enabled=False):
                values = self.pair_values(number, student, by_name[name], rows)
            losses[term] = torch.stack(values).mean(0)
        return losses

    def added_to(
        self,
        loss: LossSum,
        student: HiddenRows,
        answers: Sequence[Answer],
        *,
        factor: float = 1.0,
        measure: bool = False,
    ) -> LossSum:
        """Add the terms to a loss, and record their size for the next dynamic scales.

        `factor` is that of the schedule, and `measure` also measures the gradient norm of each
        term.
        """
        factors, values = self.weights(factor), self(student, answers, loss.rows)
        sums = {name: value.sum() for name, value in values.items()}
        total, norms = loss.total, dict(loss.grad_norms)
        if total.requires_grad and sums and (reference := _distribution_loss(loss)) is not None:
            self.record(reference, sums)
        for name, value in sums.items():
            weighted = factors[name] * value
            total = total + weighted
            if measure and total.requires_grad:
                norms[name] = _grad_norm(weighted, student)
        terms = {**loss.terms, **{name: value.detach() for name, value in sums.items()}}
        weights = {**loss.weights, **factors}
        return replace(loss, total=total, terms=terms, weights=weights, grad_norms=norms)

    def record(self, reference: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Accumulate a micro-batch's sums over rows of the distribution loss and the terms."""
        terms = [sums[f"{self.name}/{name}"].detach() for name in self.pairs]
        step = torch.stack([reference.detach().to(terms[0].dtype), *terms])
        self._sums = step if self._sums is None else self._sums + step

    def end_step(self) -> None:
        """Update the dynamic scales from the sums of the optimizer step that just ended.

        The scales are constant within a step, and the first step has scale 1.
        """
        # Sums cover the whole step and all ranks, so any split of a batch gives the same gradient.
        # Scales per micro-batch would give small micro-batches the weight of large ones.
        sums, self._sums = self._sums, None
        if sums is None or not self.options.dynamic_scale:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        ratio_K = sums[0] / sums[1:]
        # Without rows, or with a loss of zero, a step has no usable ratio: keep the previous scale.
        is_usable_K = ratio_K.isfinite() & (ratio_K > 0)
        self.scale_K.copy_(torch.where(is_usable_K, ratio_K.to(self.scale_K.dtype), self.scale_K))


def _distribution_loss(loss: LossSum) -> Tensor | None:
    """The weighted divergences, else the cross-entropy; None where a stage has neither."""
    for kind in ("kd", "ce"):
        names = [name for name in loss.terms if name.partition("_")[0] == kind]
        if names:
            weighted = [loss.weights[name] * loss.terms[name] for name in names]
            return torch.stack(weighted).sum() if len(weighted) > 1 else weighted[0]
    return None


def _grad_norm(value: Tensor, student: HiddenRows) -> Tensor:
    """Norm of a term's gradient at all tapped states together."""
    square = torch.zeros((), dtype=value.dtype, device=value.device)
    attention = [x for a in student.attention.values() for x in (a.query, a.key, a.value)]
    taps = [tap for tap in (*student.features.values(), *attention) if tap.requires_grad]
    grads = torch.autograd.grad(value, taps, retain_graph=True, allow_unused=True) if taps else ()
    for grad in (grad for grad in grads if grad is not None):
        square += torch.linalg.vector_norm(grad, dtype=value.dtype).square()
    return square.sqrt()
