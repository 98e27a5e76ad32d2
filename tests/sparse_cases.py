"""Differentiable per-row terms of a sparse target, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.kernels.plain import TorchKernels
from collegium.kernels.rows import RawRows
from collegium.losses.closed import BlockTarget, ClosedForm
from collegium.types import SparseRows


class _Term(torch.autograd.Function):
    """One term of `ClosedForm` per row, with its in-place gradient as the backward pass."""

    @staticmethod
    def forward(ctx, logits, labels, target, name):
        rows = RawRows(logits.detach().clone())
        form = ClosedForm(labels, lambda block: BlockTarget(target), TorchKernels())
        form.begin(slice(None))
        term = form.terms_(rows, {name: 1.0})[name]
        ctx.save_for_backward(rows.values_nV)
        return term

    @staticmethod
    def backward(ctx, *grads):
        return grads[0][:, None] * ctx.saved_tensors[0], None, None, None


def sparse_terms(logits: Tensor, labels: Tensor, target: SparseRows) -> tuple[Tensor, Tensor]:
    """Return (n,) cross-entropy and (n,) KL."""
    return _Term.apply(logits, labels, target, "ce"), _Term.apply(logits, labels, target, "kd")
