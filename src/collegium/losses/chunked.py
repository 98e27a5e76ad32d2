"""The block driver: losses over the vocabulary whose gradients are formed in the forward pass.

Shapes: N rows, n rows of one block, V vocabulary, D width of the hidden states.

Rows go through the head a block at a time. While a block's logits are hot, its losses are differentiated with respect to
them, and the gradients of the hidden states (n, D), of the head's weight (V, D) and of its bias (V,) are formed at once. So no
(N, V) tensor ever exists, nothing is computed twice, and a teacher's head inside `row_losses` is applied once per row.

Losses come in two kinds. Any function of the logits is differentiated by autograd, inside its block. Losses whose gradient is
written down (`InPlaceLosses`) put it in the place of the logits: two (n, V) buffers and no graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from collegium.kernels.rows import RawRows, Workspace, head_product, spans
from collegium.types import Head

RowLosses = Callable[[Tensor, slice], Mapping[str, Tensor]]
"""(logits_nV, block) -> the (n,) losses of the rows in `block` by name; asked once per block, in increasing order."""

CPU_MEGABYTES, GPU_MEGABYTES = 256, 1024
"""What the (n, V) buffers of a block may take together; memory is all that a loss costs beside the gradients themselves."""

AUTOGRAD_BYTES = 32
"""Bytes per logit of a loss under autograd: eight (n, V) buffers in float32. Losses in place say themselves what they take."""

AUTOGRAD_CPU_BYTES = 8 * 10**6
"""One buffer of a loss under autograd on a CPU: each of its operations goes over the whole block, fastest from a cache."""

MIN_AUTOGRAD_BLOCK = 128
MAX_BLOCK = 4096
"""Bounds of the default block: each block reads and writes the whole (V, D) gradient of the head, so a few rows per block
would spend the time there."""


class InPlaceLosses(Protocol):
    """Losses that leave their gradient where the logits were."""

    @property
    def workspace(self) -> Workspace:
        """Whose buffer `logits` is to hold them."""
        ...

    @property
    def bytes_per_logit(self) -> int:
        """What all (n, V) buffers that are alive at a time take per element, that of the logits included."""
        ...

    def begin(self, block: slice) -> None:
        """Turn to the rows of `block`; asked once per block, in increasing order."""
        ...

    def terms_(self, rows: RawRows, weights: Mapping[str, float]) -> Mapping[str, Tensor]:
        """The (n,) losses named by `weights`; the rows become the gradient of their weighted sum at the head's product."""
        ...


@dataclass(frozen=True, slots=True)
class BlockSums:
    """Sums over the N rows."""

    total: Tensor
    """Scalar with a graph (when gradients are on): the weighted sum of the terms."""
    terms: dict[str, Tensor]
    """Unweighted sum of each term, detached."""
    grad_norms: dict[str, Tensor]
    """Norm of d(weight * term) / d(hidden) over all rows; empty unless measured."""


def block_losses(
    hidden_ND: Tensor,
    head: Head,
    row_losses: RowLosses | InPlaceLosses,
    weights: Mapping[str, float],
    *,
    block_size: int | None = None,
    megabytes: int | None = None,
    measure: bool = False,
) -> BlockSums:
    """Sum weighted row losses over blocks of rows: total = sum_n sum_i weight_i loss_i(logits_n).

    The gradients reach `hidden_ND`, `head.weight` and `head.bias`, and nothing else that `row_losses` may read. Second
    derivatives are not supported. Losses and accumulated gradients are in float32, or in float64 for float64 inputs.

    Args:
        hidden_ND: (N, D), what the head reads; N may be 0.
        head: the student's head; its weight may be a view of a parameter.
        row_losses: the losses of one block; their names are those of `weights`.
        weights: the factor of each loss.
        block_size: rows per block; None fits them to the memory.
        megabytes: what the buffers of a block may take; None takes the default of the device.
        measure: also measure the gradient norm of each weighted term, at the price of one more pass per term.
    """
    vocab_size = head.weight.shape[0]
    inputs = (hidden_ND, head.weight, head.bias)
    grads_on = torch.is_grad_enabled()
    if block_size is None:
        block_size = default_block_size(
            vocab_size,
            hidden_ND.device,
            bytes_per_logit=None if callable(row_losses) else row_losses.bytes_per_logit,
            megabytes=megabytes,
        )
        # Blocks of one size: a small last one would read and write the gradient of the head for little.
        num_rows = max(hidden_ND.shape[0], 1)
        block_size = math.ceil(num_rows / math.ceil(num_rows / block_size))
    plan = _Plan(
        head=head,
        row_losses=row_losses,
        weights=dict(weights),
        block_size=block_size,
        needs=tuple(grads_on and x is not None and x.requires_grad for x in inputs),
        measure=measure,
    )
    total, terms_K, norms_K = _BlockLosses.apply(*inputs, plan)
    names = list(plan.weights)
    return BlockSums(
        total=total,
        terms=dict(zip(names, terms_K.unbind(), strict=True)),
        grad_norms=dict(zip(names, norms_K.unbind(), strict=True)) if measure else {},
    )


def default_block_size(
    vocab_size: int,
    device: torch.device,
    *,
    bytes_per_logit: int | None = None,
    megabytes: int | None = None,
) -> int:
    """Rows per block whose buffers fit the memory, at least 1 and at most `MAX_BLOCK`; without `bytes_per_logit` under autograd."""
    is_cpu = device.type == "cpu"
    memory = (megabytes or (CPU_MEGABYTES if is_cpu else GPU_MEGABYTES)) * 2**20
    size = memory // (vocab_size * (bytes_per_logit or AUTOGRAD_BYTES))
    if is_cpu and megabytes is None and bytes_per_logit is None:
        size = min(size, max(MIN_AUTOGRAD_BLOCK, AUTOGRAD_CPU_BYTES // (4 * vocab_size)))
    return max(1, min(MAX_BLOCK, size))


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that is not an input of the autograd function."""

    head: Head
    row_losses: RowLosses | InPlaceLosses
    weights: dict[str, float]
    block_size: int
    needs: tuple[bool, ...]
    """Which of hidden, weight and bias need a gradient."""
    measure: bool

    def blocks(self, num_rows: int) -> Iterator[slice]:
        for start in range(0, num_rows, self.block_size):
            yield slice(start, min(start + self.block_size, num_rows))

    def add(self, sums: _Sums, hidden_nD: Tensor, block: slice) -> None:
        """Evaluate one block, add its losses, and form its gradients while its logits exist."""
        losses = self.row_losses
        if callable(losses):
            _add_differentiated(sums, self, losses, hidden_nD, block)
        else:
            _add_in_place(sums, self, losses, hidden_nD, block)


@dataclass(slots=True)
class _Sums:
    """What grows from block to block."""

    dtype: torch.dtype
    device: torch.device
    dhidden_ND: Tensor | None
    dweight_VD: Tensor | None
    dbias_V: Tensor | None
    terms: dict[str, Tensor] = field(default_factory=dict)
    square_norms: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, hidden_ND: Tensor, plan: _Plan) -> _Sums:
        weight_VD, bias_V = plan.head.weight, plan.head.bias
        # The sums over the vocabulary or over many rows lose too much in half precision.
        dtype = torch.promote_types(
            torch.promote_types(weight_VD.dtype, hidden_ND.dtype), torch.float32
        )
        is_needed = plan.needs
        sums = cls(
            dtype=dtype,
            device=hidden_ND.device,
            dhidden_ND=torch.zeros_like(hidden_ND, dtype=dtype) if is_needed[0] else None,
            dweight_VD=torch.zeros_like(weight_VD, dtype=dtype) if is_needed[1] else None,
            dbias_V=torch.zeros_like(bias_V, dtype=dtype)
            if bias_V is not None and is_needed[2]
            else None,
        )
        for name in plan.weights:
            sums.terms[name] = torch.zeros((), dtype=dtype, device=hidden_ND.device)
            sums.square_norms[name] = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        return sums

    def add_gradient(
        self, draw_nV: Tensor, hidden_nD: Tensor, weight_VD: Tensor, block: slice
    ) -> None:
        """Send the gradient of the head's output on to the three inputs."""
        for part in spans(weight_VD):
            if self.dhidden_ND is not None:
                add_product_(self.dhidden_ND[block], draw_nV[:, part], weight_VD[part])
            if self.dweight_VD is not None:
                add_product_(self.dweight_VD[part], draw_nV[:, part].T, hidden_nD)
        if self.dbias_V is not None:
            self.dbias_V += draw_nV.sum(0, dtype=self.dtype)


class _BlockLosses(torch.autograd.Function):
    """(hidden, weight, bias, plan) -> (total, sums of the terms, gradient norms); see `block_losses`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = _Sums.zeros(hidden_ND, plan)
        # Autocast would run the losses in half precision.
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for block in plan.blocks(hidden_ND.shape[0]):
                plan.add(sums, hidden_ND[block].to(weight_VD.dtype), block)
        ctx.grads = (sums.dhidden_ND, sums.dweight_VD, sums.dbias_V)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        total = torch.zeros((), dtype=sums.dtype, device=sums.device)
        for name, weight in plan.weights.items():
            total = total + weight * sums.terms[name]
        terms_K = _stack(sums.terms, sums)
        norms_K = _stack(sums.square_norms, sums).sqrt()
        ctx.mark_non_differentiable(terms_K, norms_K)
        return total, terms_K, norms_K

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "block_losses: got a second backward pass; must be one; give retain_graph=True to the first"
            )
        # Only a graph that is kept can be asked again. Else the gradients are scaled in place: that of the head is the largest
        # tensor of a loss, and a copy of it would cost as much memory as a block.
        is_kept = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
        grads = [
            None if grad is None else _scaled(grad, grad_outputs[0], dtype, in_place=not is_kept)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        if not is_kept:
            ctx.grads = None
        return (*grads, None)


def add_product_(sum_RC: Tensor, left_Rn: Tensor, right_nC: Tensor) -> None:
    """sum += left right, added in the dtype of the sum, without a tensor of its size beside it where the device can."""
    if left_Rn.dtype == sum_RC.dtype:
        sum_RC.addmm_(left_Rn, right_nC)
    elif sum_RC.dtype == torch.float32 and _adds_wide_products(sum_RC.device):
        torch.addmm(sum_RC, left_Rn, right_nC, out_dtype=torch.float32, out=sum_RC)
    else:
        sum_RC += left_Rn @ right_nC


def _adds_wide_products(device: torch.device) -> bool:
    """Whether a product of half-precision matrices can be added to a float32 matrix in one operation."""
    return device.type == "cuda" and torch.version.hip is None


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """Scaled before the cast: a sum over many rows may not fit float16, its mean does."""
    if grad.is_cuda and grad.dtype != dtype:
        # Rounded on the way out, in one sweep; a CPU would take new memory to do so.
        return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
    return (grad.mul_(factor) if in_place else grad * factor).to(dtype)


def _stack(values: Mapping[str, Tensor], sums: _Sums) -> Tensor:
    if not values:
        return torch.zeros(0, dtype=sums.dtype, device=sums.device)
    return torch.stack(list(values.values()))


def _add_in_place(
    sums: _Sums, plan: _Plan, losses: InPlaceLosses, hidden_nD: Tensor, block: slice
) -> None:
    weight_VD = plan.head.weight.detach()
    losses.begin(block)

    def gradient(weights: Mapping[str, float]) -> tuple[Mapping[str, Tensor], Tensor]:
        shape = (hidden_nD.shape[0], weight_VD.shape[0])
        out_nV = losses.workspace.matrix("logits", shape, weight_VD)
        rows = head_product(hidden_nD, plan.head, out_nV)
        return losses.terms_(rows, weights), rows.values_nV

    is_trained = any(plan.needs)
    if plan.measure and is_trained:
        for name, weight in plan.weights.items():
            draw_nV = gradient({name: weight})[1]
            norm = torch.linalg.vector_norm(draw_nV @ weight_VD, dtype=sums.dtype)
            sums.square_norms[name] += norm.square()
    terms, draw_nV = gradient(plan.weights)
    for name, value_n in terms.items():
        sums.terms[name] += value_n.sum(dtype=sums.dtype)
    if is_trained:
        sums.add_gradient(draw_nV, hidden_nD, weight_VD, block)


def _add_differentiated(
    sums: _Sums, plan: _Plan, row_losses: RowLosses, hidden_nD: Tensor, block: slice
) -> None:
    head = plan.head
    weight_VD = head.weight.detach()
    bias_V = None if head.bias is None else head.bias.detach()
    raw_nV = torch.nn.functional.linear(hidden_nD, weight_VD, bias_V)
    is_trained = any(plan.needs)
    with torch.set_grad_enabled(is_trained):
        raw_nV.requires_grad_(is_trained)
        losses = row_losses(head.finish(raw_nV), block)
        summed = {name: losses[name].sum(dtype=sums.dtype) for name in plan.weights}
        for name, value in summed.items():
            sums.terms[name] += value.detach()
        if not is_trained:
            return
        weighted = {name: plan.weights[name] * value for name, value in summed.items()}
        if plan.measure:
            for name, value in weighted.items():
                draw_nV = _gradient(value, raw_nV, keep=True)
                if draw_nV is not None:
                    norm = torch.linalg.vector_norm(draw_nV @ weight_VD, dtype=sums.dtype)
                    sums.square_norms[name] += norm.square()
        draw_nV = _gradient(sum(weighted.values(), start=raw_nV.new_zeros(())), raw_nV)
    if draw_nV is not None:
        sums.add_gradient(draw_nV, hidden_nD, weight_VD, block)


def _gradient(value: Tensor, raw_nV: Tensor, *, keep: bool = False) -> Tensor | None:
    """d(value) / d(raw), or None for a value that does not depend on it."""
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, raw_nV, retain_graph=keep, allow_unused=True)[0]
