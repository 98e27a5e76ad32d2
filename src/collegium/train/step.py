"""One training step: the module that is trained, and that Accelerate, DDP or FSDP2 wrap.

    batch ─▶ rows ─▶ student's hidden states      answers of the teachers ─▶ target
             for block in blocks: head product, losses, gradients at once
             terms on inner states ─▶ sum over rows, divided by the trainer

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
from collegium.kernels.backends import kernels_for
from collegium.models.forward import forward_rows, router_weight
from collegium.train.objective import Objective
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

        `vocab_size` is V, without the padding rows of the head. Teachers are scored at each step,
        `targets` are finished ones to train on instead.
        """
        super().__init__()
        self.student = student
        self.objective = objective
        self.vocab_size = vocab_size
        self.teachers = list(teachers)
        self.targets = targets
        # The layers that FSDP2 gathers one at a time, where Accelerate looks for them.
        self._no_split_modules = getattr(student, "_no_split_modules", None)

    def forward(
        self, inputs: Mapping[str, Tensor], *, measure: bool = False, labels_only: bool = False
    ) -> tuple[Tensor, LossSum]:
        """Sum the loss over the trained positions of a batch.

        `inputs` are the tensors of a collator, see `Batch.from_inputs`. `measure` also measures the
        gradient norm of each term. `labels_only` asks no teacher, as for text that a cache does not
        have: the loss is the cross-entropy where the objective reads a target.

        Returns:
            The sum as a tensor that hooks can see, and its record. Without rows the sum is zero
            with a graph, so that every process takes part in every collective.
        """
        loss = self.outputs(inputs, measure=measure, labels_only=labels_only)[2]
        return loss.total, loss

    def outputs(
        self, inputs: Mapping[str, Tensor], *, measure: bool = False, labels_only: bool = False
    ) -> tuple[HiddenRows, list[Answer], LossSum]:
        """The student's hidden states, the answers of the teachers, and the loss of a batch."""
        objective, batch = self.objective, Batch.from_inputs(inputs)
        rows, router_factor = batch.rows(), objective.router_factor
        options = {"vocab_size": self.vocab_size, "is_student": router_factor > 0}
        student = forward_rows(self.student, batch, rows, taps=objective.student_taps, **options)
        # Only the student's layers run under autocast; teachers and losses keep their own dtypes.
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            answers = []
            if self.teachers and objective.needs_teachers and not labels_only:
                tapped = {t.name: objective.teacher_taps(t.name) for t in self.teachers}
                answers = score_teachers(self.teachers, batch, rows, objective.fusion, taps=tapped)
            target = None
            if self.targets is not None and objective.reads_target and not labels_only:
                target = self.targets.target(batch, rows)
            loss = row_losses(objective, student, answers, rows, target=target, measure=measure)
            if student.router_loss is not None:
                weight = router_factor * router_weight(self.student)
                loss = loss.with_term("router", student.router_loss, weight)
        return student, answers, loss


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
        answers: of the teachers; empty for training on labels or on a finished target.
        target: a finished target; else the answers are fused.
        measure: also measure the gradient norm of each term, at the cost of a pass per term.

    Raises:
        RecipeError: teachers have a share of the loss, and there is no fusion.
    """
    weights = objective.term_weights(has_target=target is not None or len(answers) > 0)
    kernels = kernels_for(objective.options.backend, student.hidden.device)
    target = objective.target(answers, rows, kernels, finished=target)
    engine = objective.engine(student, target)
    zero, is_trained = student.hidden.new_zeros((), dtype=engine.dtype), engine.is_trained
    sums = {name: zero.clone() for name in weights}
    square_norms = {n: zero.clone() for n in weights if measure and objective.has_rows(n, rows)}
    weights_Kn, conflicts = [], []
    nll = None if torch.is_grad_enabled() else zero.clone()
    with torch.no_grad():
        for block in engine if weights or nll is not None else ():
            target_n = None if target is None else target.block(block)
            losses = objective.losses(rows.part(block), target_n, kernels, is_trained=is_trained)
            for name in square_norms if is_trained else ():
                _, gradient_nV = losses.terms_(engine.project(block), {name: weights[name]})
                square_norms[name] += engine.square_norm(gradient_nV)
            logits = engine.project(block)
            if nll is not None:
                logsumexp, (z_n, _) = kernels.read(logits)[0], logits.at_labels(rows.labels[block])
                nll -= logsumexp.logp(z_n).sum(dtype=engine.dtype)
            terms, gradient_nV = losses.terms_(logits, weights)
            engine.accumulate(block, gradient_nV)
            for name, value_n in terms.items():
                sums[name] += value_n.sum(dtype=engine.dtype)
            # Not the target itself: over all blocks that would be (N, V).
            if target_n is not None and target_n.weights_Kn is not None:
                weights_Kn.append(target_n.weights_Kn)
            if target_n is not None and target_n.conflict is not None:
                conflicts.append((target_n.conflict.disagreement_n, target_n.conflict.applied_n))
    objective.workspace.release()
    applied = map(torch.cat, zip(*conflicts, strict=True))
    loss = LossSum(
        total=engine.attach(sum((weights[name] * sums[name] for name in weights), start=zero)),
        terms=sums,
        weights=weights,
        grad_norms={name: norm.sqrt() for name, norm in square_norms.items()},
        rows=rows,
        teacher_weights_KN=torch.cat(weights_Kn, dim=1) if weights_Kn else None,
        conflict=dict(zip(("disagreement", "applied"), applied, strict=False)),
        nll=nll,
    )
    return objective.with_states(loss, student, answers, measure=measure)
