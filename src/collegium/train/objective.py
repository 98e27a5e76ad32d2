"""The objective: from what student and teachers say about N rows to one sum with a graph.

Shapes: N rows, n rows of one block, V vocabulary, K teachers.

The only place where losses are summed, and the only place that knows of the temperature and of the factors of the terms. Nothing
is divided here: the trainer divides once, by the number of target tokens of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from collegium.errors import RecipeError, TrainingError
from collegium.fusion.pooling import FusedTarget, Fusion
from collegium.fusion.stored import fuse_stored
from collegium.kernels.backends import Backend, kernels_for
from collegium.kernels.rows import RowKernels, Workspace
from collegium.losses.chunked import block_losses
from collegium.losses.closed import TRUTH
from collegium.losses.divergences import DivergenceOption, ForwardKL
from collegium.losses.features import FeatureLoss, FeatureOptions
from collegium.train.terms import RowTerms
from collegium.types import STRICT, LossSum, Rows, SparseRows, StoredRows, StudentRows, TeacherRows


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ObjectiveOptions:
    """What the student is trained on: teachers, labels and hidden states, and how much of each."""

    kd_ratio: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the fused target; the labels have the rest. 0 trains on the labels alone."""
    temperature: float = 1.0
    """Softens target and student alike; the divergence is multiplied by its square to keep the size of the gradient."""
    divergence: DivergenceOption = ForwardKL()
    """Distance between fused target and student."""
    block_size: Annotated[int, Field(ge=1)] | None = None
    """Rows whose logits exist at a time; none fits it to `block_megabytes`. Changes speed and memory, never the result."""
    block_megabytes: Annotated[int, Field(ge=1)] | None = None
    """Memory for the logits of one block of rows; none takes 256 on a CPU and 1024 on a GPU."""
    backend: Backend = "auto"
    """Who does the arithmetic over the vocabulary; changes the speed, never the result beyond rounding."""
    features: FeatureOptions | None = None
    """Feature terms; none leaves hidden states alone."""

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("must be > 0; for hard labels use kd_ratio: 0")
        return value


class Objective(nn.Module):
    """The sum over rows that a training step minimises.

    L = sum_n [kd_ratio T^2 D(P^(1/T), Q_T) + (1 - kd_ratio) CE_n] + sum_k weight_k scale_k sum_n F_k(n), with P the fused
    target, P^(1/T) renormalised, Q_T = softmax(z / T) and CE at temperature 1. Without teachers, L = sum_n CE_n. Where a conflict policy
    gives a row the factor f_n, D counts f_n times, and kd_ratio (1 - f_n) CE_n is added: the term `truth`.

    Source: Hinton et al. 2015, arXiv 1503.02531, with a fused target in the place of one teacher.
    """

    def __init__(
        self,
        options: ObjectiveOptions,
        fusion: Fusion | None,
        *,
        features: FeatureLoss | None = None,
    ) -> None:
        """Take the parts.

        Args:
            options: the choices of the recipe.
            fusion: how teachers become one target; None for training on labels alone.
            features: the feature terms with their adapters; their parameters train with the student's.
        """
        super().__init__()
        self.options = options
        self.fusion = fusion
        self.features = features
        self._workspace = Workspace()

    @property
    def needs_teachers(self) -> bool:
        """Whether any term reads the teachers; where not, they need not be scored."""
        has_features = self.features is not None and len(self.features.pairs) > 0
        return has_features or (self.fusion is not None and self.options.kd_ratio > 0)

    @property
    def student_taps(self) -> list[str]:
        """Which hidden states of the student to give."""
        return [] if self.features is None else self.features.student_taps

    def teacher_taps(self, name: str) -> list[str]:
        """Which hidden states of one teacher to give."""
        return [] if self.features is None else self.features.teacher_taps(name)

    def forward(
        self,
        student: StudentRows,
        teachers: Sequence[TeacherRows],
        rows: Rows,
        *,
        measure: bool = False,
    ) -> LossSum:
        """Sum all terms over the rows.

        Args:
            student: hidden states and head of the student, with the taps asked for.
            teachers: the scored teachers; empty for training on labels alone.
            rows: the labels of the rows.
            measure: also measure the gradient norm of each term.

        Raises:
            RecipeError: there are teachers and a share for them, but no fusion; or a target of a cache that the
                options ask too much of.
        """
        weights = self._row_weights(has_teachers=len(teachers) > 0)
        kernels = kernels_for(self.options.backend, student.hidden.device)
        target = self._target(weights, teachers, rows, kernels)
        known_KN = None
        if isinstance(target, tuple):
            target, known_KN = target
        row_terms = RowTerms(self.options, rows.labels, target, weights)
        sums = block_losses(
            student.hidden,
            student.head,
            row_terms.losses(kernels, self._workspace, student.head),
            weights,
            block_size=self.options.block_size,
            megabytes=self.options.block_megabytes,
            measure=measure,
        )
        self._workspace.release()
        total, terms, norms = sums.total, dict(sums.terms), dict(sums.grad_norms)
        if self.features is not None and teachers:
            feature_weights = self.features.weights()
            values = self.features(student.features, teachers)
            summed = {name: value.sum() for name, value in values.items()}
            if total.requires_grad and summed:
                reference = "kd" if "kd" in terms else "ce"
                self.features.record(weights[reference] * terms[reference], summed)
            for name, value in summed.items():
                weighted = feature_weights[name] * value
                total = total + weighted
                terms[name] = value.detach()
                if measure and total.requires_grad:
                    norms[name] = _grad_norm(weighted, student.features)
            weights |= feature_weights
        return LossSum(
            total=total,
            terms=terms,
            weights=weights,
            grad_norms=norms,
            num_rows=len(rows),
            teacher_weights_KN=row_terms.teacher_weights() if known_KN is None else known_KN,
            conflict=row_terms.conflict(),
        )

    def end_step(self) -> None:
        """Say that an optimizer step has ended; until then all factors stay as they are."""
        if self.features is not None:
            self.features.end_step()

    def _row_weights(self, *, has_teachers: bool) -> dict[str, float]:
        """Factors of the terms over the vocabulary; a term without weight is left out, not multiplied by 0."""
        if not has_teachers:
            return {"ce": 1.0}
        kd_ratio = self.options.kd_ratio
        weights = {"kd": kd_ratio * self.options.temperature**2, "ce": 1 - kd_ratio}
        if self.fusion is not None and self.fusion.conflict.yields_to_labels:
            weights[TRUTH] = kd_ratio
        return {name: weight for name, weight in weights.items() if weight > 0}

    def _target(
        self,
        weights: Mapping[str, float],
        teachers: Sequence[TeacherRows],
        rows: Rows,
        kernels: RowKernels,
    ) -> FusedTarget | SparseRows | tuple[SparseRows, Tensor] | None:
        """What the student is drawn to; a target fused out of a per-teacher cache comes with the (K, N) weights."""
        if "kd" not in weights:
            return None
        cached = [t.scores for t in teachers if isinstance(t.scores, SparseRows)]
        if cached:
            require_sparse_objective(self.options, where="objective", has_features=False)
            if len(teachers) > 1:
                raise RecipeError(
                    f"objective: got {len(teachers)} teachers, one of them a cache; must be the cache alone"
                )
            return cached[0]
        if self.fusion is None:
            raise RecipeError(
                f"fusion: got none for {len(teachers)} teachers; must be given where kd_ratio > 0; add it or use kd_ratio: 0"
            )
        stored = [t.scores for t in teachers if isinstance(t.scores, StoredRows)]
        if stored:
            require_sparse_objective(self.options, where="objective")
            if len(stored) < len(teachers):
                raise RecipeError(
                    f"objective: got {len(stored)} of {len(teachers)} teachers from a per-teacher cache; must be all or none"
                )
            return fuse_stored(self.fusion, [t.name for t in teachers], stored, rows)
        return FusedTarget(self.fusion, teachers, rows, kernels=kernels, workspace=self._workspace)


def require_sparse_objective(
    options: ObjectiveOptions, *, where: str, has_features: bool = True
) -> None:
    """Refuse what a target that names a few tokens per row cannot give; `has_features`: the cache holds hidden states beside it.

    Raises:
        RecipeError: another divergence than forward KL, a temperature, or feature terms.
    """
    wanted = "with a cached target, which names a few tokens per row; change it, or set cache.enabled: false"
    if not isinstance(options.divergence, ForwardKL):
        name = type(options.divergence).__name__
        raise RecipeError(f"{where}.divergence: got {name}; must be forward_kl {wanted}")
    if options.temperature != 1.0:
        raise RecipeError(f"{where}.temperature: got {options.temperature:g}; must be 1 {wanted}")
    if options.features is not None and not has_features:
        raise RecipeError(
            f"{where}.features: needs the hidden states of live teachers; must be left out {wanted}, or keep them with "
            "`cache: {kind: per_teacher, features: {}}`"
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


class InertTermCheck:
    """Watch the first measured micro-batches for a term that has a weight but never any gradient.

    A resumed run watches anew: nothing of it is saved.
    """

    def __init__(self, num_steps: int = 3) -> None:
        """Watch `num_steps` measured micro-batches with rows, then rest."""
        self._num_steps = num_steps
        self._seen = 0
        self._moved: dict[str, bool] = {}

    def __call__(self, loss: LossSum) -> None:
        """Look at one measured step.

        Raises:
            TrainingError: a term had no gradient at all in any of the steps.
        """
        if self._seen >= self._num_steps or loss.num_rows == 0 or not loss.grad_norms:
            return
        self._seen += 1
        for name, norm in loss.grad_norms.items():
            if name == TRUTH:
                continue
            has_moved = loss.weights[name] == 0 or bool(norm != 0)
            self._moved[name] = self._moved.get(name, False) or has_moved
        if self._seen < self._num_steps:
            return
        for name, has_moved in self._moved.items():
            if not has_moved:
                raise TrainingError(
                    f"term `{name}`: contributes no gradient in the first {self._num_steps} steps; must move the student; "
                    "give it weight 0, or see whether what it reads is frozen"
                )
