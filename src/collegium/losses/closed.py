"""Forward KL and cross-entropy whose gradients are written down, not derived: in the place of the student's logits.

Shapes: N rows, n rows of one block, V vocabulary, E entries of a sparse target.

With Q = softmax(z): the gradient of KL(P || Q) at z is Q sum_v P - P, that of CE is Q - onehot(label). A sparse target speaks of
log q at E places only: if g_e is the gradient there, that at z is the g_e in their places minus Q times their sum over the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.kernels.rows import DenseTarget, LogSumExp, RawRows, RowKernels, Workspace
from collegium.losses.sparse import row_sums, sparse_kl
from collegium.types import SparseRows

TRUTH = "truth"
"""The term of the labels that stand in for teachers who contradict each other; without any such row it has no gradient."""


@dataclass(frozen=True, slots=True)
class BlockTarget:
    """What the student is drawn to at n rows."""

    target: DenseTarget | SparseRows | None = None
    """At the temperature of the objective; None for labels alone."""
    kd_factor_n: Tensor | None = None
    """(n,) f: the divergence counts f times and the term `truth` (1 - f) times; None for 1."""


class ClosedForm:
    """The terms `kd`, `ce` and `truth` of a block, and the gradient of their weighted sum.

    kd_n = f_n KL(P || softmax(z / T)), ce_n = -log softmax(z)_label, truth_n = (1 - f_n) ce_n.
    """

    def __init__(
        self,
        labels_N: Tensor,
        target_of: Callable[[slice], BlockTarget] | None,
        kernels: RowKernels,
        *,
        temperature: float = 1.0,
        workspace: Workspace | None = None,
        bytes_per_logit: int = 8,
    ) -> None:
        """Take the parts.

        Args:
            labels_N: the labels of all rows.
            target_of: gives the target of a block; None for labels alone. Asked once per block, in increasing order.
            kernels: who does the arithmetic.
            temperature: T, of a dense target only.
            workspace: whose buffers the student's logits use; the target may live in its buffer `pool`.
            bytes_per_logit: what the target and the student's logits take together.
        """
        self.kernels = kernels
        self.workspace = workspace or Workspace()
        self.bytes_per_logit = bytes_per_logit
        self._labels_N = labels_N
        self._target_of = target_of
        self._temperature = temperature
        self._labels_n = labels_N[:0]
        self._target = BlockTarget()

    def begin(self, block: slice) -> None:
        """Turn to the rows of `block`."""
        self._labels_n = self._labels_N[block]
        self._target = BlockTarget() if self._target_of is None else self._target_of(block)

    def terms_(self, rows: RawRows, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The (n,) terms that have a weight; the rows become the gradient of sum_i weight_i term_i at the head's product."""
        one_n = torch.ones(len(self._labels_n), dtype=rows.dtype, device=rows.values_nV.device)
        factor_n = self._target.kd_factor_n
        factor_n = one_n if factor_n is None else factor_n.to(rows.dtype)
        kd_n = weights.get("kd", 0.0) * factor_n
        ce_n = weights.get("ce", 0.0) * one_n + weights.get(TRUTH, 0.0) * (1.0 - factor_n)
        needs_labels = "ce" in weights or TRUTH in weights
        # Out-of-vocabulary labels are refused here, and never asked about where no term needs them.
        labels_n = self._labels_n if needs_labels else torch.zeros_like(self._labels_n)
        z_label_n, slope_n = rows.at_labels(labels_n)
        target = self._target.target
        if isinstance(target, SparseRows):
            log_sum, kl_n = self._sparse_(rows, target, labels_n, kd_n, ce_n)
        else:
            target = None if target is None else target.to(rows.dtype)
            log_sum, kl_n = self.kernels.distill_(
                rows, target, kd_n, ce_n, temperature=self._temperature
            )
        if needs_labels:
            values_nV = rows.values_nV
            missing_n1 = (-ce_n * slope_n)[:, None].to(values_nV.dtype)
            values_nV.scatter_add_(1, labels_n[:, None], missing_n1)
        ce_loss_n = -log_sum.logp(z_label_n)
        terms = {"kd": factor_n * kl_n, "ce": ce_loss_n, TRUTH: (1.0 - factor_n) * ce_loss_n}
        return {name: terms[name] for name in weights}

    def _sparse_(
        self, rows: RawRows, target: SparseRows, labels_n: Tensor, kd_n: Tensor, ce_n: Tensor
    ) -> tuple[LogSumExp, Tensor]:
        num_rows, row_E = len(labels_n), target.row_of_entry()
        z_E, slope_E = rows.at(row_E, target.ids)
        if target.log_tail is None:
            # What the row's entries pull is then known without the student: one sweep does, as for labels alone.
            pull_n = row_sums(target.logp.to(rows.dtype).exp(), row_E, num_rows)
            log_sum, _ = self.kernels.distill_(
                rows, None, kd_n, ce_n + kd_n * pull_n, temperature=1.0
            )
        else:
            log_sum = self.kernels.read(rows, labels_n).logsumexp
        logq_E = LogSumExp(log_sum.max_n[row_E], log_sum.log_sum_n[row_E]).logp(z_E)
        kl_n, grad_E = sparse_kl(logq_E, row_E, target)
        grad_E = grad_E * kd_n[row_E]
        if target.log_tail is not None:
            mass_n = row_sums(grad_E, row_E, num_rows)
            self.kernels.softmax_(rows, log_sum, ce_n - mass_n)
        rows.add_at_(row_E, target.ids, grad_E * slope_E)
        return log_sum, kl_n
