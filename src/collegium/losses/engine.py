"""Blocks of rows through the student's head, with gradients formed in the forward pass.

Shapes: N rows, n rows of one block, V vocabulary, D width of the hidden states.

    engine = BlockEngine(hidden, head, ...)
    for block in engine:
        rows = engine.project(block)               (n, V) product of the head
        ...                                        losses, and their gradient at that product
        engine.accumulate(block, gradient_nV)      gradients of hidden states, weight and bias
    total = engine.attach(total)                   a scalar whose backward returns them

No (N, V) tensor exists, nothing is recomputed, and the head of a teacher that is read inside the
loop is applied once per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from collegium.kernels.rows import (
    RawRows,
    Workspace,
    add_product_,
    head_product,
    multiplies_half,
    spans,
)
from collegium.types import Head

CPU_MEGABYTES, GPU_MEGABYTES = 256, 1024
"""Memory of the (n, V) buffers of a block, the only cost of a loss beside its gradients."""

AUTOGRAD_BYTES = 32
"""Bytes per logit of a loss under autograd: eight (n, V) buffers in float32."""

AUTOGRAD_CPU_BYTES = 8 * 10**6
"""One buffer of a loss under autograd on a CPU, where each operation is fastest from cache."""

# Each block reads and writes the (V, D) gradient of the head; a few rows per block would spend
# the time there.
MIN_AUTOGRAD_BLOCK = 128
MAX_BLOCK = 4096


class BlockEngine:
    """Applies the student's head to blocks of rows, and accumulates gradients.

    Second derivatives are not supported. Gradients are accumulated in float32, or in float64 for
    float64 inputs.
    """

    def __init__(
        self, hidden_ND: Tensor, head: Head, *, workspace: Workspace, block_size: int
    ) -> None:
        """Allocate the gradients of (N, D) hidden states, where N may be 0, and of the head.

        Its weight may be a view of a parameter. The workspace buffer `logits` holds its product.
        """
        self._inputs = hidden_ND, head.weight, head.bias
        self._head, self._weight_VD = head, head.weight.detach()
        self._workspace = workspace
        self._block_size = block_size
        # Sums over the vocabulary or over many rows lose too much in half precision.
        wider = torch.promote_types(head.weight.dtype, hidden_ND.dtype)
        self.dtype = torch.promote_types(wider, torch.float32)
        self._grads = [
            torch.zeros_like(x, dtype=self.dtype)
            if x is not None and torch.is_grad_enabled() and x.requires_grad
            else None
            for x in self._inputs
        ]

    @property
    def is_trained(self) -> bool:
        """Whether any input requires a gradient."""
        return any(grad is not None for grad in self._grads)

    def __iter__(self) -> Iterator[slice]:
        """The blocks, in order."""
        num_rows = self._inputs[0].shape[0]
        for start in range(0, num_rows, self._block_size):
            yield slice(start, min(start + self._block_size, num_rows))

    def project(self, block: slice) -> RawRows:
        """Apply the head: (n, V) in a workspace buffer that the next call overwrites."""
        return head_product(self._inputs[0][block], self._head, self._workspace)

    def accumulate(self, block: slice, gradient_nV: Tensor) -> None:
        """Propagate a gradient at the head's product to hidden states, weight and bias."""
        dhidden_ND, dweight_VD, dbias_V = self._grads
        hidden_nD, weight_VD = self._hidden(block), self._weight_VD
        if dbias_V is not None:
            dbias_V += gradient_nV.sum(0, dtype=self.dtype)
        gradient_nV = self._product_operand(gradient_nV)
        for part in spans(weight_VD):
            if dhidden_ND is not None:
                add_product_(dhidden_ND[block], gradient_nV[:, part], weight_VD[part])
            if dweight_VD is not None:
                add_product_(dweight_VD[part], gradient_nV[:, part].T, hidden_nD)

    def square_norm(self, gradient_nV: Tensor) -> Tensor:
        """Squared norm of the gradient at the hidden states of one block."""
        weight_VD, shape = self._weight_VD, (gradient_nV.shape[0], self._weight_VD.shape[1])
        dhidden_nD = gradient_nV.new_zeros(shape, dtype=self.dtype)
        gradient_nV = self._product_operand(gradient_nV)
        for part in spans(weight_VD):
            add_product_(dhidden_nD, gradient_nV[:, part], weight_VD[part])
        return torch.linalg.vector_norm(dhidden_nD).square()

    def attach(self, total: Tensor) -> Tensor:
        """Return `total` with a graph whose backward yields the accumulated gradients."""
        if not self.is_trained:
            return total
        return _Precomputed.apply(*self._inputs, total, self._grads)  # type: ignore[return-value]

    def _product_operand(self, gradient_nV: Tensor) -> Tensor:
        """The gradient, rounded once per block to the dtype of the head where products need it."""
        if gradient_bytes(self._head) == 0 or gradient_nV.dtype == self._weight_VD.dtype:
            return gradient_nV
        operand_nV = self._workspace.matrix("gradient", gradient_nV.shape, self._weight_VD)
        return operand_nV.copy_(gradient_nV)

    def _hidden(self, block: slice) -> Tensor:
        return self._inputs[0].detach()[block].to(self._weight_VD.dtype)


def default_block_size(
    vocab_size: int,
    device: torch.device,
    *,
    num_rows: int = 0,
    bytes_per_logit: int | None = None,
    megabytes: int | None = None,
) -> int:
    """Rows per block whose buffers fit in memory, between 1 and `MAX_BLOCK`.

    `bytes_per_logit` is of all (n, V) buffers together, None for a loss under autograd. `megabytes`
    defaults to those of the device. For N `num_rows`, all blocks have about the same size.
    """
    is_cpu = device.type == "cpu"
    memory = (megabytes or (CPU_MEGABYTES if is_cpu else GPU_MEGABYTES)) * 2**20
    size = memory // (vocab_size * (bytes_per_logit or AUTOGRAD_BYTES))
    if is_cpu and megabytes is None and bytes_per_logit is None:
        size = min(size, max(MIN_AUTOGRAD_BLOCK, AUTOGRAD_CPU_BYTES // (4 * vocab_size)))
    size = max(1, min(MAX_BLOCK, size))
    # A small last block would read and write the gradient of the head for a few rows.
    return math.ceil(num_rows / math.ceil(num_rows / size)) if num_rows else size


class _Precomputed(torch.autograd.Function):
    """(hidden, weight, bias, total, their gradients) -> total; see `BlockEngine.attach`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, total, ctx.grads = arguments
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "BlockEngine: got a second backward pass; must be one; "
                "pass retain_graph=True to the first"
            )
        # Without retain_graph the gradients are scaled in place: that of the head is the largest
        # tensor of a loss, and a copy would cost as much memory as a block.
        bindings: Any = torch._C  # the function is missing in the stubs
        is_kept = bindings._autograd._get_current_graph_task_keep_graph()
        grads = [
            None if grad is None else _scaled(grad, grad_output, dtype, in_place=not is_kept)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        if not is_kept:
            ctx.grads = None
        return (*grads, None, None)


def gradient_bytes(head: Head) -> int:
    """Bytes per logit of the gradient's copy in the dtype of the head, 0 where none is needed."""
    weight_VD = head.weight
    is_copied = weight_VD.element_size() < 4 and multiplies_half(weight_VD.device)
    return weight_VD.element_size() if is_copied else 0


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    # Scaled before the cast: a sum over many rows may overflow float16, its mean does not.
    if grad.is_cuda and grad.dtype != dtype:
        # One sweep on a device; a CPU would allocate new memory to do so.
        return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
    return (grad.mul_(factor) if in_place else grad * factor).to(dtype)
