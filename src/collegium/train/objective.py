"""The objective: from what student and teachers say about N rows to one sum with a graph.

Shapes: N rows, n rows of one block, V vocabulary, K teachers.

The only place where losses are summed, and the only place that knows of the temperature and of the factors of the terms. Nothing
is divided here: the trainer divides once, by the number of target tokens of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from collegium.errors import RecipeError, TrainingError
from collegium.fusion.conflict import ConflictBlock
from collegium.fusion.pooling import FusedTarget, Fusion
from collegium.fusion.stored import fuse_stored
from collegium.losses.chunked import block_losses
from collegium.losses.divergences import DivergenceOption, ForwardKL
from collegium.losses.features import FeatureLoss, FeatureOptions
from collegium.losses.sparse import sparse_terms
from collegium.types import STRICT, LossSum, Rows, SparseRows, StoredRows, StudentRows, TeacherRows

TRUTH = "truth"
"""The term of the labels that stand in for teachers who contradict each other; without any such row it has no gradient."""


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
    """Rows whose logits exist at a time; none fits it to a memory budget. Changes speed and memory, never the result."""
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
        target = self._target(weights, teachers, rows)
        known_KN = None
        if isinstance(target, tuple):
            target, known_KN = target
        row_losses = _RowLosses(self.options, rows.labels, target, weights)
        sums = block_losses(
            student.hidden,
            student.head,
            row_losses,
            weights,
            block_size=self.options.block_size,
            measure=measure,
        )
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
            teacher_weights_KN=row_losses.teacher_weights() if known_KN is None else known_KN,
            conflict=row_losses.conflict(),
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
        self, weights: Mapping[str, float], teachers: Sequence[TeacherRows], rows: Rows
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
        return FusedTarget(self.fusion, teachers, rows)


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


class _RowLosses:
    """The terms over the vocabulary for one block of rows; remembers the fusion weights it met."""

    def __init__(
        self,
        options: ObjectiveOptions,
        labels_N: Tensor,
        target: FusedTarget | SparseRows | None,
        terms: Collection[str],
    ) -> None:
        self._options = options
        self._labels_N = labels_N
        self._target = target
        self._terms = terms
        self._weights: list[Tensor] = []
        self._conflicts: list[ConflictBlock] = []

    def __call__(self, logits_nV: Tensor, block: slice) -> dict[str, Tensor]:
        temperature = self._options.temperature
        losses: dict[str, Tensor] = {}
        student_logp_nV: Tensor | None = None
        if isinstance(self._target, SparseRows):
            terms = sparse_terms(
                logits_nV.log_softmax(-1), self._labels_N[block], self._target.block(block)
            )
            return dict(zip(("ce", "kd"), terms, strict=True))
        ce_n: Tensor | None = None
        if "ce" in self._terms or TRUTH in self._terms or temperature == 1.0:
            # One pass over the vocabulary serves both terms.
            student_logp_nV = logits_nV.log_softmax(-1)
            ce_n = -student_logp_nV.gather(1, self._labels_N[block, None]).squeeze(1)
        if "ce" in self._terms and ce_n is not None:
            losses["ce"] = ce_n
        if self._target is not None:
            target_logp_nV, kd_factor_n = self._fused(self._target, block)
            if temperature != 1.0 or student_logp_nV is None:
                student_logp_nV = (logits_nV / temperature).log_softmax(-1)
            kd_n = self._options.divergence(target_logp_nV.to(logits_nV.dtype), student_logp_nV)
            losses["kd"] = kd_n if kd_factor_n is None else kd_factor_n.to(kd_n.dtype) * kd_n
            if kd_factor_n is not None and ce_n is not None:
                losses[TRUTH] = (1.0 - kd_factor_n).to(ce_n.dtype) * ce_n
        return losses

    def _fused(self, target: FusedTarget, block: slice) -> tuple[Tensor, Tensor | None]:
        """log P^(1/T), renormalised, of one block, and the factor on its rows where a conflict policy gives one."""
        with torch.no_grad():
            fused = target.block(block)
            self._weights.append(fused.weights_Kn)
            kd_factor_n = None
            if fused.conflict is not None:
                self._conflicts.append(fused.conflict)
                kd_factor_n = fused.conflict.kd_factor_n
            if self._options.temperature == 1.0:
                return fused.logp_nV, kd_factor_n
            return (fused.logp_nV / self._options.temperature).log_softmax(-1), kd_factor_n

    def teacher_weights(self) -> Tensor | None:
        """(K, N) fusion weights of all rows met so far; None where there were none."""
        return torch.cat(self._weights, dim=1).detach() if self._weights else None

    def conflict(self) -> dict[str, Tensor]:
        """What the conflict policy saw and did at all rows met so far, (N,) each; empty without a policy."""
        if not self._conflicts:
            return {}
        return {
            "disagreement": torch.cat([block.disagreement_n for block in self._conflicts]),
            "applied": torch.cat([block.applied_n for block in self._conflicts]),
        }


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
