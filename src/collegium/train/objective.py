"""The objective: the factors of its terms, their target and their blocks of rows.

Shapes: N rows, n rows of one block, V vocabulary.

`train.step` loops over the blocks. The trainer divides once, by the number of target tokens of the
whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from collegium.distributions import Answer, HiddenRows
from collegium.errors import RecipeError, TrainingError
from collegium.fusion.fuse import Fusion, Target, TargetBlock, TargetUse, fuse
from collegium.fusion.requirements import Requirement, fusion_requirements
from collegium.kernels.rows import DenseTarget, RowKernels, Workspace
from collegium.losses.divergences import ForwardKL
from collegium.losses.engine import BlockEngine, default_block_size, gradient_bytes
from collegium.losses.features import FeatureLoss
from collegium.losses.terms import TRUTH, BlockLosses, softened_
from collegium.train.options import ObjectiveOptions
from collegium.types import LossSum, Rows


class Objective(nn.Module):
    """The loss that a training step minimizes, summed over rows.

    L = sum_n [kd_ratio T^2 D(P^(1/T), Q_T) + (1 - kd_ratio) CE_n]
        + sum_k weight_k scale_k sum_n F_k(n),
    with P the fused target, P^(1/T) renormalized, Q_T = softmax(z / T), and CE at temperature 1.
    Without teachers, L = sum_n CE_n. Where a conflict policy gives row n the factor f_n, D counts
    f_n times and kd_ratio (1 - f_n) CE_n is added as the term `truth`.

    Source: Hinton et al. 2015, arXiv 1503.02531, with a fused target instead of one teacher.
    """

    def __init__(
        self,
        options: ObjectiveOptions,
        fusion: Fusion | None,
        *,
        features: FeatureLoss | None = None,
    ) -> None:
        """Combine the parts: `fusion` is None for training on labels only.

        The adapters of the feature terms train with the student.
        """
        super().__init__()
        self.options = options
        self.fusion = fusion
        self.features = features
        self.workspace = Workspace()

    @property
    def needs_teachers(self) -> bool:
        """False if no term reads the teachers, which then need not be scored."""
        has_features = self.features is not None and len(self.features.pairs) > 0
        return has_features or (self.fusion is not None and self.options.kd_ratio > 0)

    @property
    def student_taps(self) -> list[str]:
        """Names of the student's hidden states that the terms read."""
        return [] if self.features is None else self.features.student_taps

    def teacher_taps(self, name: str) -> list[str]:
        """Names of one teacher's hidden states that the terms read."""
        return [] if self.features is None else self.features.teacher_taps(name)

    def requirements(self) -> list[Requirement]:
        """The requirements on the source of targets, of the fusion and of the terms."""
        needs = self.options.requirements() if self.needs_teachers else []
        return needs + ([] if self.fusion is None else fusion_requirements(self.fusion))

    def term_weights(self, *, has_target: bool) -> dict[str, float]:
        """Factors of the terms over the vocabulary; terms without weight are omitted."""
        if not has_target:
            return {"ce": 1.0}
        kd_ratio = self.options.kd_ratio
        weights = {"kd": kd_ratio * self.options.temperature**2, "ce": 1 - kd_ratio}
        if self.fusion is not None and self.fusion.conflict.yields_to_labels:
            weights[TRUTH] = kd_ratio
        return {name: weight for name, weight in weights.items() if weight > 0}

    def fuse(self, answers: Sequence[Answer], rows: Rows, kernels: RowKernels) -> Target:
        """Fuse the answers of the teachers into the target of the rows.

        Raises:
            RecipeError: there is no fusion.
        """
        if self.fusion is None:
            raise RecipeError(
                f"fusion: got none for {len(answers)} teachers; must be given where kd_ratio > 0; "
                "add it or use kd_ratio: 0"
            )
        temperature = self.options.temperature
        is_plain_kl = isinstance(self.options.divergence, ForwardKL) and temperature == 1.0
        use = TargetUse(temperature, reads_logp=not is_plain_kl)
        workspace = self.workspace
        return fuse(self.fusion, answers, rows, kernels=kernels, workspace=workspace, use=use)

    def engine(self, student: HiddenRows, target: Target | None) -> BlockEngine:
        """The block engine of the student, with blocks that fit in memory."""
        num_bytes, is_softened = student.logit_bytes, self.options.temperature != 1.0
        if target is not None:
            num_bytes = target.bytes_per_logit(num_bytes, is_softened=is_softened)
        num_bytes += gradient_bytes(student.head)
        has_closed_form = target is None or isinstance(self.options.divergence, ForwardKL)
        size = self.options.block_size or default_block_size(
            student.head.weight.shape[0],
            student.hidden.device,
            num_rows=len(student),
            bytes_per_logit=num_bytes if has_closed_form else None,
            megabytes=self.options.block_megabytes,
        )
        return BlockEngine(student.hidden, student.head, workspace=self.workspace, block_size=size)

    def losses(
        self, labels_n: Tensor, block: TargetBlock | None, kernels: RowKernels, *, is_trained: bool
    ) -> BlockLosses:
        """The terms over the vocabulary at n rows; values of a full target are overwritten."""
        target, divergence = None if block is None else block.target, self.options.divergence
        if isinstance(target, DenseTarget):
            target = softened_(target, self.options.temperature, divergence, kernels)
        conflict = None if block is None else block.conflict
        factor_n = None if conflict is None else conflict.kd_factor_n
        return BlockLosses(labels_n, target, kernels, divergence, factor_n, is_trained)

    def end_step(self) -> None:
        """Update dynamic scales after an optimizer step; they are constant within one."""
        if self.features is not None:
            self.features.end_step()


class InertTermCheck:
    """Finds terms that have a weight but no gradient in the first measured micro-batches.

    Not saved in checkpoints: a resumed run repeats the check.
    """

    def __init__(self, num_steps: int = 3) -> None:
        """Check `num_steps` measured micro-batches that have rows."""
        self._num_steps = num_steps
        self._seen = 0
        self._moved: dict[str, bool] = {}

    def __call__(self, loss: LossSum) -> None:
        """Check one measured micro-batch.

        Raises:
            TrainingError: a term had no gradient in any of them.
        """
        if self._seen >= self._num_steps or loss.num_rows == 0 or not loss.grad_norms:
            return
        self._seen += 1
        for name, norm in loss.grad_norms.items():
            is_moving = name == TRUTH or loss.weights[name] == 0 or bool(norm != 0)
            self._moved[name] = is_moving or self._moved.get(name, False)
        inert = [name for name, has_moved in self._moved.items() if not has_moved]
        if self._seen == self._num_steps and inert:
            raise TrainingError(
                f"term `{inert[0]}`: got no gradient in the first {self._num_steps} steps; must "
                "train the student; set its weight to 0, or unfreeze what it reads"
            )
