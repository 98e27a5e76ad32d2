"""Differentiable per-row terms of a named target, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.distributions import NamedRows
from collegium.kernels.plain import TorchKernels
from collegium.kernels.rows import RawRows
from collegium.losses.divergences import ForwardKL
from collegium.losses.terms import BlockLosses


class _Term(torch.autograd.Function):
    """One term of `BlockLosses` per row, with its in-place gradient as the backward pass."""

    @staticmethod
    def forward(ctx, logits, labels, target, name):
        rows = RawRows(logits.detach().clone())
        losses = BlockLosses(labels, target, TorchKernels(), {"kd": (ForwardKL(), 1.0)})
        terms, gradient = losses.terms_(rows, {name: 1.0})
        ctx.save_for_backward(gradient)
        return terms[name]

    @staticmethod
    def backward(ctx, *grads):
        return grads[0][:, None] * ctx.saved_tensors[0], None, None, None


def named_terms(logits: Tensor, labels: Tensor, target: NamedRows) -> tuple[Tensor, Tensor]:
    """Return (n,) cross-entropy and (n,) KL."""
    return _Term.apply(logits, labels, target, "ce"), _Term.apply(logits, labels, target, "kd")
