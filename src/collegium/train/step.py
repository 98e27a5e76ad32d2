"""Student and objective as one module: what wrappers of distributed training must wrap."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from collegium.models import forward_rows
from collegium.train.objective import Objective
from collegium.types import Batch, LossSum, Rows, TeacherRows


class DistillStep(nn.Module):
    """One forward pass of the student and all its losses, for training loops of one's own.

    The losses read the head's weight themselves. Hooks that gather or watch parameters run around the `forward` of a wrapped
    module, so body, head and losses must lie inside one: `DistributedDataParallel(DistillStep(...))`, or `fully_shard` on the
    blocks of the student and then on the step. Both average over the processes: scale the loss by their number, and divide
    by the target tokens of all of them.
    """

    def __init__(self, student: PreTrainedModel, objective: Objective, *, vocab_size: int) -> None:
        """Take the parts; `vocab_size` is V, without the pad rows of the head."""
        super().__init__()
        self.student = student
        self.objective = objective
        self.vocab_size = vocab_size

    def forward(
        self, batch: Batch, rows: Rows, teachers: Sequence[TeacherRows]
    ) -> tuple[Tensor, LossSum]:
        """The sum of all terms over the rows, as a tensor that hooks can see, and the record of it.

        Rows may be none: the sum is then zero and has a graph, so that every process takes part in every collective.
        """
        taps = self.objective.student_taps
        student = forward_rows(self.student, batch, rows, vocab_size=self.vocab_size, taps=taps)
        loss = self.objective(student, teachers, rows)
        return loss.total, loss
