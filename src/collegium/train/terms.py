"""The terms over the vocabulary for one block of rows: which driver computes them, and what they remember.

Shapes: N rows, n rows of one block, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from collegium.fusion.conflict import ConflictBlock
from collegium.fusion.pooling import FusedRows, FusedTarget
from collegium.kernels.rows import DenseTarget, RawRows, RowKernels, Workspace
from collegium.losses.chunked import InPlaceLosses, RowLosses
from collegium.losses.closed import TRUTH, BlockTarget, ClosedForm
from collegium.losses.divergences import ForwardKL
from collegium.types import Divergence, Head, SparseRows


class TermOptions(Protocol):
    """What of the objective's options the terms read."""

    @property
    def temperature(self) -> float: ...

    @property
    def divergence(self) -> Divergence: ...


class RowTerms:
    """The terms `kd`, `ce` and `truth`; remembers the fusion weights and conflicts that it met."""

    def __init__(
        self,
        options: TermOptions,
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

    def losses(
        self, kernels: RowKernels, workspace: Workspace, head: Head
    ) -> RowLosses | InPlaceLosses:
        """Closed forms for forward KL and cross-entropy, any other divergence under autograd; `head` is the student's."""
        if self._target is not None and not isinstance(self._options.divergence, ForwardKL):
            return self._differentiable
        num_bytes = head.weight.element_size()
        if isinstance(self._target, FusedTarget):
            is_softened = self._options.temperature != 1.0
            num_bytes = self._target.bytes_per_logit(num_bytes, is_softened=is_softened)
        return ClosedForm(
            self._labels_N,
            lambda block: self._block_target(block, kernels),
            kernels,
            temperature=self._options.temperature,
            workspace=workspace,
            bytes_per_logit=num_bytes,
        )

    def _block_target(self, block: slice, kernels: RowKernels) -> BlockTarget:
        if self._target is None:
            return BlockTarget()
        if isinstance(self._target, SparseRows):
            return BlockTarget(self._target.block(block))
        fused, kd_factor_n = self._fused(self._target, block)
        target, temperature = fused.target, self._options.temperature
        if temperature != 1.0:
            values_nV = target.logp_().div_(temperature)
            reading = kernels.read(RawRows(values_nV), self._labels_N[block] * 0)
            target = DenseTarget(RawRows(values_nV), "logits", reading.logsumexp)
        return BlockTarget(target, kd_factor_n)

    def _differentiable(self, logits_nV: Tensor, block: slice) -> dict[str, Tensor]:
        assert isinstance(self._target, FusedTarget)
        temperature = self._options.temperature
        losses: dict[str, Tensor] = {}
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
        # One pass over the vocabulary serves both terms.
        student_logp_nV = logits_nV.log_softmax(-1)
        ce_n: Tensor | None = None
        if "ce" in self._terms or TRUTH in self._terms:
            ce_n = -student_logp_nV.gather(1, self._labels_N[block, None]).squeeze(1)
        if "ce" in self._terms and ce_n is not None:
            losses["ce"] = ce_n
        with torch.no_grad():
            fused, kd_factor_n = self._fused(self._target, block)
            target_logp_nV = fused.target.logp_()
            if temperature != 1.0:
                target_logp_nV = (target_logp_nV / temperature).log_softmax(-1)
        if temperature != 1.0:
            student_logp_nV = (logits_nV / temperature).log_softmax(-1)
        kd_n = self._options.divergence(target_logp_nV.to(logits_nV.dtype), student_logp_nV)
        losses["kd"] = kd_n if kd_factor_n is None else kd_factor_n.to(kd_n.dtype) * kd_n
        if kd_factor_n is not None and ce_n is not None:
            losses[TRUTH] = (1.0 - kd_factor_n).to(ce_n.dtype) * ce_n
        return losses

    def _fused(self, target: FusedTarget, block: slice) -> tuple[FusedRows, Tensor | None]:
        """The fused target of one block, and the factor on its rows where a conflict policy gives one."""
        fused = target.rows_of(block)
        self._weights.append(fused.weights_Kn)
        if fused.conflict is None:
            return fused, None
        self._conflicts.append(fused.conflict)
        return fused, fused.conflict.kd_factor_n

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
