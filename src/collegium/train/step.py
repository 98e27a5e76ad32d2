"""One training step: the module that is trained, and that Accelerate, DDP or FSDP2 wrap.

    batch ─▶ rows ─▶ student's hidden states      answers of the teachers ─▶ target
             for block in blocks: head product, losses, gradients at once
             feature terms ─▶ sum over rows, divided by the trainer

Shapes: B batch, T time, N rows, K teachers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collegium.distributions import Answer, HiddenRows, Teacher
from collegium.fusion.fuse import Target, TargetSource
from collegium.fusion.routing import score_teachers
from collegium.models.forward import forward_rows
from collegium.train.objective import Objective, TermSums
from collegium.types import Batch, LossSum, Rows


class DistillStep(nn.Module):
    """Student, objective and the source of its targets: one forward pass gives the loss.

    The losses read the head's weight directly, and hooks that gather or reduce parameters run
    around the `forward` of a wrapped module. So body, head and losses are inside one module.
    Wrappers that average over processes need the loss scaled by their number.
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
            The sum as a tensor that hooks can see, and its record. Without rows the sum is zero
            with a graph, so that every process takes part in every collective.
        """
        loss = self.outputs(inputs, measure=measure)[2]
        return loss.total, loss

    def outputs(
        self, inputs: Mapping[str, Tensor], *, measure: bool = False
    ) -> tuple[HiddenRows, list[Answer], LossSum]:
        """The student's hidden states, the answers of the teachers, and the loss of a batch."""
        batch = Batch.from_inputs(inputs)
        rows = batch.rows()
        taps = self.objective.student_taps
        student = forward_rows(self.student, batch, rows, vocab_size=self.vocab_size, taps=taps)
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
        names = [teacher.name for teacher in self.teachers]
        taps = {name: self.objective.teacher_taps(name) for name in names}
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
        target = objective.fuse(answers, rows, kernels)
    engine = objective.engine(student, target)
    sums = TermSums(weights, student.hidden.new_zeros((), dtype=engine.dtype), measure=measure)
    with torch.no_grad():
        for block in engine:
            target_n = None if target is None else target.block(block)
            losses = objective.losses(rows.labels[block], target_n, kernels)
            if engine.is_trained:
                for name in sums.norms:
                    _, gradient_nV = losses.terms_(engine.project(block), {name: weights[name]})
                    sums.norms[name] += engine.square_norm(gradient_nV)
            terms, gradient_nV = losses.terms_(
                engine.project(block), weights, with_gradient=engine.is_trained
            )
            engine.accumulate(block, gradient_nV)
            sums.add(terms, target_n)
    objective.workspace.release()
    loss = sums.loss(engine, rows)
    if objective.features is None or not answers:
        return loss
    return objective.features.added_to(loss, student.features, answers, measure=measure)
