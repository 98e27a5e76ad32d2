"""The objective: the weights of its terms at each step, their target and their blocks of rows.

Shapes: N rows, n rows of one block, V vocabulary.

`train.step` loops over the blocks. The trainer divides once, by the number of target tokens of the
whole optimizer step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from collegium.distributions import Answer, HiddenRows
from collegium.errors import RecipeError, TrainingError
from collegium.fusion.fuse import Fusion, Target, TargetBlock, TargetUse, fuse
from collegium.fusion.requirements import Requirement, fusion_requirements
from collegium.kernels.rows import DenseTarget, RowKernels, Workspace
from collegium.losses.attention import AttentionLoss, RelationLoss
from collegium.losses.divergences import Divergence
from collegium.losses.engine import BlockEngine, default_block_size, gradient_bytes
from collegium.losses.features import FeatureLoss
from collegium.losses.pairing import (
    NO_ORIGINS,
    AttentionOptions,
    Origins,
    RelationOptions,
    StateTerm,
)
from collegium.losses.row_terms import DivergenceTerm, RouterTerm, RowTerm
from collegium.losses.states import StateLoss
from collegium.losses.terms import TRUTH, BlockLosses, has_closed_form, softened_
from collegium.train.options import ObjectiveOptions
from collegium.types import LossSum, Rows


class Objective(nn.Module):
    """The loss that a training step minimizes, summed over rows.

    L = sum_i w_i(s) sum_n F_i(n) over the terms, with a weight that depends on the step s only. In
    the short form of the options,
    L = sum_n [kd_ratio T^2 D(P^(1/T), Q_T) + (1 - kd_ratio) CE_n]
        + sum_k weight_k scale_k sum_n F_k(n),
    with P the fused target, P^(1/T) renormalized, Q_T = softmax(z / T), and CE at temperature 1.
    Without teachers, L = sum_n CE_n. Where a conflict policy gives row n the factor f_n, D counts
    f_n times and (1 - f_n) CE_n is added as the term `truth`, with the weights of the divergences.

    Source: Hinton et al. 2015, arXiv 1503.02531, with a fused target instead of one teacher.
    """

    def __init__(
        self, options: ObjectiveOptions, fusion: Fusion | None, *, states: Sequence[StateLoss] = ()
    ) -> None:
        """Combine the parts: `fusion` is None for training on labels only.

        The terms on inner states are `states`, see `state_losses`. Their adapters train with the
        student. `DistillTrainer` builds those of live teachers itself.

        Raises:
            RecipeError: a term is excluded by the conflict policy of the fusion.
        """
        super().__init__()
        self.options = options
        self.fusion = fusion
        self._states = nn.ModuleList(states)
        self.workspace = Workspace()
        self._terms = {one.name: one.term for one in options.placed_terms()}
        self._place = 0, 1
        if problems := [] if fusion is None else list(options.problems(fusion)):
            raise RecipeError("\n".join(problems))

    @property
    def states(self) -> list[StateLoss]:
        """The terms on inner states."""
        return cast(list[StateLoss], list(self._states))

    def build_states(
        self,
        student_widths: Mapping[str, int],
        teacher_widths: Mapping[str, Mapping[str, int]],
        *,
        seed: int,
    ) -> None:
        """Build the terms on inner states unless some were given. Raises as `state_losses`."""
        if not self.states:
            built = state_losses(self.options, student_widths, teacher_widths, seed=seed)
            self._states.extend(built)

    def start_step(self, step: int, num_steps: int) -> None:
        """Set the weights of step 0, 1, ... of a run, before the first call those of step 0.

        After the run, they are those of its last step.

        Raises:
            TrainingError: no term has a weight.
        """
        num_steps = max(num_steps, 1)
        self._place = min(step, num_steps - 1), num_steps
        self.__dict__.pop("_active", None)
        if not self._active and not self._active_states():
            raise TrainingError(
                f"objective.terms: got no weight at step {step}; must have a term with some at "
                "each step; change a schedule"
            )

    def _row_terms(self) -> dict[str, RowTerm]:
        return {name: term for name, term in self._terms.items() if isinstance(term, RowTerm)}

    @cached_property
    def _active(self) -> dict[str, tuple[RowTerm, float]]:
        """The terms over the vocabulary that have a weight at this step."""
        terms = self._row_terms().items()
        weighted = {name: (term, term.weight_at(*self._place)) for name, term in terms}
        return {name: pair for name, pair in weighted.items() if pair[1] > 0}

    @property
    def _divergences(self) -> dict[str, tuple[Divergence, float]]:
        """Divergence and temperature of each term that reads the target at this step."""
        terms = {name: term for name, (term, _) in self._active.items()}
        return {
            name: (term.divergence, term.temperature)
            for name, term in terms.items()
            if isinstance(term, DivergenceTerm)
        }

    def _active_states(self) -> list[tuple[StateLoss, float]]:
        """The terms on inner states with a weight at this step, and the factor of the schedule."""
        terms = [(loss, loss.options.factor_at(*self._place)) for loss in self.states if loss.pairs]
        return [(loss, factor) for loss, factor in terms if factor > 0]

    @property
    def has_stages(self) -> bool:
        """Whether the terms change during a run."""
        options = (*self._terms.values(), *(loss.options for loss in self.states))
        return any(term.schedule is not None for term in options)

    @property
    def reads_target(self) -> bool:
        """Whether a term reads the fused target at this step."""
        return bool(self._divergences)

    @property
    def needs_teachers(self) -> bool:
        """False if no term reads the teachers at this step, which then need not be scored."""
        return len(self._active_states()) > 0 or (self.fusion is not None and self.reads_target)

    @property
    def router_factor(self) -> float:
        """Factor of the load-balancing loss at this step."""
        routers = (term for term in self._terms.values() if isinstance(term, RouterTerm))
        return next((term.weight_at(*self._place) for term in routers), 1.0)

    @property
    def student_taps(self) -> list[str]:
        """Names of the student's inner states that the terms read at this step."""
        taps = (tap for loss, _ in self._active_states() for tap in loss.student_taps)
        return list(dict.fromkeys(taps))

    def teacher_taps(self, name: str) -> list[str]:
        """Names of one teacher's inner states that the terms read at this step."""
        taps = (tap for loss, _ in self._active_states() for tap in loss.teacher_taps(name))
        return list(dict.fromkeys(taps))

    def requirements(self) -> list[Requirement]:
        """The requirements on the source of targets, of the fusion and of the terms."""
        reads = self.fusion is not None and self.options.has_divergence
        needs = self.options.requirements() if reads or any(x.pairs for x in self.states) else []
        return needs + ([] if self.fusion is None else fusion_requirements(self.fusion))

    def term_weights(self, *, has_target: bool) -> dict[str, float]:
        """Weights of the terms over the vocabulary; terms without weight are omitted."""
        if self.reads_target and not has_target:
            return {"ce": 1.0}
        weights = {name: weight for name, (_, weight) in self._active.items()}
        if self.fusion is not None and self.fusion.conflict.yields_to_labels and self.reads_target:
            terms = {name: self._terms[name] for name in self._divergences}
            # Without T^2: a label takes the place of the teachers at temperature 1.
            weights[TRUTH] = sum(t.weight * t.factor_at(*self._place) for t in terms.values())
        return weights

    def target(
        self,
        answers: Sequence[Answer],
        rows: Rows,
        kernels: RowKernels,
        *,
        finished: Target | None = None,
    ) -> Target | None:
        """The target of the rows, fused from the answers of the teachers unless it is finished.

        None without teachers, or where no term reads it at this step.

        Raises:
            RecipeError: there is no fusion.
        """
        if not self.reads_target or finished is not None or not answers:
            return finished if self.reads_target else None
        if self.fusion is None:
            raise RecipeError(
                f"fusion: got none for {len(answers)} teachers; must be given where kd_ratio > 0; "
                "add it or use kd_ratio: 0"
            )
        is_plain_kl = has_closed_form(self._divergences) and self._temperature == 1.0
        use = TargetUse(self._temperature, reads_logp=not is_plain_kl)
        workspace = self.workspace
        return fuse(self.fusion, answers, rows, kernels=kernels, workspace=workspace, use=use)

    @property
    def _temperature(self) -> float:
        """The temperature of all divergences at this step; 1 if they have several."""
        temperatures = {temperature for _, temperature in self._divergences.values()}
        return temperatures.pop() if len(temperatures) == 1 else 1.0

    def engine(self, student: HiddenRows, target: Target | None) -> BlockEngine:
        """The block engine of the student, with blocks that fit in memory."""
        num_bytes, is_softened = student.logit_bytes, self._temperature != 1.0
        if target is not None:
            num_bytes = target.bytes_per_logit(num_bytes, is_softened=is_softened)
        num_bytes += gradient_bytes(student.head)
        is_closed = target is None or has_closed_form(self._divergences)
        size = self.options.block_size or default_block_size(
            student.head.weight.shape[0],
            student.hidden.device,
            num_rows=len(student),
            bytes_per_logit=num_bytes if is_closed else None,
            megabytes=self.options.block_megabytes,
        )
        # In a stage without terms over the vocabulary, the head has no gradient to be allocated.
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self._active)):
            hidden, head, workspace = student.hidden, student.head, self.workspace
            return BlockEngine(hidden, head, workspace=workspace, block_size=size)

    def losses(
        self, rows: Rows, block: TargetBlock | None, kernels: RowKernels, *, is_trained: bool
    ) -> BlockLosses:
        """The terms over the vocabulary at n rows; values of a full target are overwritten."""
        divergences = {} if block is None else self._divergences
        target = None if block is None else block.target
        if isinstance(target, DenseTarget):
            to_logp = not has_closed_form(divergences)
            target = softened_(target, self._temperature, kernels, to_logp=to_logp)
        factors: dict[str, Tensor] = {}
        for name, (term, _) in self._active.items():
            is_read_n = term.is_read(rows)
            if is_read_n is not None:
                factors[name] = is_read_n
        factor_n = None if block is None or block.conflict is None else block.conflict.kd_factor_n
        if factor_n is not None:
            factors |= {**dict.fromkeys(divergences, factor_n), TRUTH: 1.0 - factor_n}
        return BlockLosses(rows.labels, target, kernels, divergences, factors, is_trained)

    def has_rows(self, name: str, rows: Rows) -> bool:
        """Whether a term over the vocabulary has any of the rows."""
        term = self._terms.get(name)
        is_read_N = term.is_read(rows) if isinstance(term, RowTerm) else None
        return is_read_N is None or bool(is_read_N.any())

    def with_states(
        self, loss: LossSum, student: HiddenRows, answers: Sequence[Answer], *, measure: bool
    ) -> LossSum:
        """Add the terms on inner states, and the zero weights of terms that a schedule disables."""
        for states, factor in self._active_states() if answers else ():
            loss = states.added_to(loss, student, answers, factor=factor, measure=measure)
        scheduled = {n: 0.0 for n, t in self._row_terms().items() if t.schedule is not None}
        for states in self.states:
            if states.options.schedule is not None:
                scheduled |= {f"{states.name}/{teacher}": 0.0 for teacher in states.pairs}
        return replace(loss, weights={**scheduled, **loss.weights}) if scheduled else loss

    def end_step(self) -> None:
        """Update dynamic scales after an optimizer step; they are constant within one."""
        for states in self.states:
            states.end_step()


def state_losses(
    options: ObjectiveOptions,
    student_widths: Mapping[str, int],
    teacher_widths: Mapping[str, Mapping[str, int]],
    *,
    seed: int = 0,
    origins: Origins = NO_ORIGINS,
) -> list[StateLoss]:
    """Build the terms on inner states of an objective.

    The widths are those of all taps of a model, in order of depth (`tap_names`, `tap_width`), and
    `seed` determines the initial adapters. `origins` are the layers that those of the student are
    copies of.

    Raises:
        RecipeError: a named teacher or tap does not exist.
    """
    classes = {AttentionOptions: AttentionLoss, RelationOptions: RelationLoss}
    placed = [one for one in options.placed_terms() if isinstance(one.term, StateTerm)]
    return [
        classes.get(type(one.term), FeatureLoss)(
            one.term,
            student_widths,
            teacher_widths,
            seed=seed + number,
            name=one.name,
            origins=origins,
        )
        for number, one in enumerate(placed)
    ]


class InertTermCheck:
    """Finds terms that have a weight but no gradient in the first measured micro-batches.

    Not saved in checkpoints: a resumed run repeats the check.
    """

    def __init__(self, num_steps: int = 3) -> None:
        """Check `num_steps` measured micro-batches with rows of each term."""
        self._num_steps = num_steps
        self._seen: Counter[str] = Counter()
        self._moved: dict[str, bool] = {}

    def __call__(self, loss: LossSum) -> None:
        """Check one measured micro-batch.

        Raises:
            TrainingError: a term had no gradient in any of them.
        """
        for name, norm in loss.grad_norms.items() if loss.num_rows > 0 else ():
            if self._seen[name] == self._num_steps:
                continue
            self._seen[name] += 1
            is_moving = name == TRUTH or loss.weights[name] == 0 or bool(norm != 0)
            self._moved[name] = is_moving or self._moved.get(name, False)
            if self._seen[name] == self._num_steps and not self._moved[name]:
                raise TrainingError(
                    f"term `{name}`: got no gradient in the first {self._num_steps} steps; must "
                    "train the student; set its weight to 0, or unfreeze what it reads"
                )
