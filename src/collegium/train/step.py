"""One training step: the module that is trained, and that Accelerate, DDP or FSDP2 wrap.

    batch ─▶ rows ─▶ student's hidden states      answers of the teachers ─▶ target
             for block in blocks: head product, losses, gradients at once
             feature terms ─▶ sum over rows, divided by the trainer

Shapes: B batch, T time, N rows, K teachers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collegium.distributions import Answer, HiddenRows, Teacher
from collegium.errors import RecipeError
from collegium.fusion.conflict import ConflictBlock
from collegium.fusion.fuse import Target, TargetBlock, TargetSource, fuse
from collegium.fusion.score import score_teachers
from collegium.kernels.rows import RowKernels
from collegium.losses.features import FeatureLoss
from collegium.models.forward import forward_rows
from collegium.train.objective import Objective
from collegium.types import Batch, LossSum, Rows


class DistillStep(nn.Module):
    """Student, objective and the source of its targets: one forward pass gives the loss.

    The losses read the head's weight directly, and hooks that gather or reduce parameters run around
    the `forward` of a wrapped module. So body, head and losses are inside one module. Wrappers that
    average over processes need the loss scaled by their number.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        objective: Objective,
        *,
        vocab_size: int,
        teachers: Sequence[Teacher] = (),
        targets: TargetSource | None = None,
    ) -> None:
        """Combine the parts; teachers are not submodules, and stay frozen.

        Args:
            student: the trained model.
            objective: the loss.
            vocab_size: V, without the padding rows of the head.
            teachers: scored at each step.
            targets: finished targets to train on instead.
        """
        super().__init__()
        self.student = student
        self.objective = objective
        self.vocab_size = vocab_size
        self.teachers = list(teachers)
        self.targets = targets

    def forward(
        self, inputs: Mapping[str, Tensor], *, measure: bool = False
    ) -> tuple[Tensor, LossSum]:
        """Sum the loss over the trained positions of a batch.

        Args:
            inputs: the tensors of a collator, see `Batch.from_inputs`.
            measure: also measure the gradient norm of each term.

        Returns:
            The sum as a tensor that hooks can see, and its record. Without rows the sum is zero with a
            graph, so that every process takes part in every collective.
        """
        loss = self.outputs(inputs, measure=measure)[2]
        return loss.total, loss

    def outputs(
        self, inputs: Mapping[str, Tensor], *, measure: bool = False
    ) -> tuple[HiddenRows, list[Answer], LossSum]:
        """The student's hidden states, the answers of the teachers, and the loss of a batch."""
        batch = Batch.from_inputs(inputs)
        rows = batch.rows()
        student = forward_rows(
            self.student,
            batch,
            rows,
            vocab_size=self.vocab_size,
            taps=self.objective.student_taps,
        )
        # Only the student's layers run under autocast; teachers and losses keep their own dtypes.
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            answers = self.score(batch, rows)
            target = None if self.targets is None else self.targets.target(batch, rows)
            loss = row_losses(
                self.objective, student, answers, rows, target=target, measure=measure
            )
        return student, answers, loss

    def score(self, batch: Batch, rows: Rows) -> list[Answer]:
        """Score the rows with the teachers that any term reads."""
        if not self.teachers or not self.objective.needs_teachers:
            return []
        taps = {
            teacher.name: self.objective.teacher_taps(teacher.name) for teacher in self.teachers
        }
        return score_teachers(self.teachers, batch, rows, self.objective.fusion, taps=taps)


def row_losses(
    objective: Objective,
    student: HiddenRows,
    answers: Sequence[Answer],
    rows: Rows,
    *,
    target: Target | None = None,
    measure: bool = False,
) -> LossSum:
    """Sum all terms over the rows.

    Args:
        objective: options, fusion and feature terms.
        student: hidden states, head and taps of the student.
        answers: of the teachers; empty for training on labels or on a finished target.
        rows: labels, documents and domains of the rows.
        target: a finished target; else the answers are fused.
        measure: also measure the gradient norm of each term, at the cost of a pass per term.

    Raises:
        RecipeError: teachers have a share of the loss, and there is no fusion.
    """
    weights = objective.term_weights(has_target=target is not None or len(answers) > 0)
    kernels = objective.kernels(student.hidden.device)
    if "kd" not in weights:
        target = None
    elif target is None:
        target = _fused(objective, answers, rows, kernels)
    engine = objective.engine(student, target)
    sums = _TermSums(weights, student.hidden.new_zeros((), dtype=engine.dtype))
    with torch.no_grad():
        for block in engine:
            target_n = None if target is None else target.block(block)
            losses = objective.losses(rows.labels[block], target_n, kernels)
            if measure and engine.is_trained:
                for name, weight in weights.items():
                    _, gradient_nV = losses.terms_(engine.project(block), {name: weight})
                    sums.norms[name] += engine.square_norm(gradient_nV)
            terms, gradient_nV = losses.terms_(
                engine.project(block), weights, with_gradient=engine.is_trained
            )
            engine.accumulate(block, gradient_nV)
            sums.add(terms, target_n)
    objective.workspace.release()
    loss = LossSum(
        total=engine.attach(sums.total()),
        terms=sums.terms,
        weights=weights,
        grad_norms={name: norm.sqrt() for name, norm in sums.norms.items()} if measure else {},
        rows=rows,
        teacher_weights_KN=torch.cat(sums.weights_Kn, dim=1) if sums.weights_Kn else None,
        conflict=_measurements(sums.conflicts),
    )
    if objective.features is None or not answers:
        return loss
    return _with_features(loss, objective.features, student.features, answers, measure=measure)


def _fused(
    objective: Objective, answers: Sequence[Answer], rows: Rows, kernels: RowKernels
) -> Target:
    if objective.fusion is None:
        raise RecipeError(
            f"fusion: got none for {len(answers)} teachers; must be given where kd_ratio > 0; add "
            "it or use kd_ratio: 0"
        )
    return fuse(objective.fusion, answers, rows, kernels=kernels, workspace=objective.workspace)


class _TermSums:
    """Sums over the blocks of a batch."""

    def __init__(self, weights: Mapping[str, float], zero: Tensor) -> None:
        self._weights = weights
        self._zero = zero
        self.terms = {name: zero.clone() for name in weights}
        self.norms = {name: zero.clone() for name in weights}
        self.weights_Kn: list[Tensor] = []
        self.conflicts: list[ConflictBlock] = []

    def add(self, terms: Mapping[str, Tensor], target: TargetBlock | None) -> None:
        """Add the (n,) terms of one block, and keep its weights and conflicts."""
        for name, value_n in terms.items():
            self.terms[name] += value_n.sum(dtype=self._zero.dtype)
        # Not the target itself: over all blocks that would be (N, V).
        if target is not None and target.weights_Kn is not None:
            self.weights_Kn.append(target.weights_Kn)
        if target is not None and target.conflict is not None:
            self.conflicts.append(target.conflict)

    def total(self) -> Tensor:
        """Weighted sum of the terms."""
        total = self._zero.clone()
        for name, weight in self._weights.items():
            total = total + weight * self.terms[name]
        return total


def _measurements(blocks: Sequence[ConflictBlock]) -> dict[str, Tensor]:
    """(N,) disagreement and effect of the conflict policy; empty without one."""
    if not blocks:
        return {}
    return {
        "disagreement": torch.cat([block.disagreement_n for block in blocks]),
        "applied": torch.cat([block.applied_n for block in blocks]),
    }


def _with_features(
    loss: LossSum,
    features: FeatureLoss,
    student_features: Mapping[str, Tensor],
    answers: Sequence[Answer],
    *,
    measure: bool,
) -> LossSum:
    """Add the feature terms, and record their size for the dynamic scales of the next step."""
    factors = features.weights()
    sums = {name: value.sum() for name, value in features(student_features, answers).items()}
    total, norms = loss.total, dict(loss.grad_norms)
    if total.requires_grad and sums:
        reference = "kd" if "kd" in loss.terms else "ce"
        features.record(loss.weights[reference] * loss.terms[reference], sums)
    for name, value in sums.items():
        weighted = factors[name] * value
        total = total + weighted
        if measure and total.requires_grad:
            norms[name] = _grad_norm(weighted, student_features)
    return replace(
        loss,
        total=total,
        terms={**loss.terms, **{name: value.detach() for name, value in sums.items()}},
        weights={**loss.weights, **factors},
        grad_norms=norms,
    )


def _grad_norm(weighted: Tensor, features: Mapping[str, Tensor]) -> Tensor:
    """Norm of a term's gradient at all tapped hidden states together."""
    square = torch.zeros((), dtype=weighted.dtype, device=weighted.device)
    taps = [tap for tap in features.values() if tap.requires_grad]
    if not taps:
        return square
    grads = torch.autograd.grad(weighted, taps, retain_graph=True, allow_unused=True)
    for grad in grads:
        if grad is not None:
            square += torch.linalg.vector_norm(grad, dtype=weighted.dtype).square()
    return square.sqrt()
