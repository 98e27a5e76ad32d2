"""Kernels as fused loops that `torch.compile` generates for the CPU: one or two sweeps per row.

Shapes: n rows of one block, V vocabulary.

Sizes are symbolic, so neither the last block of a batch nor another batch recompiles. Only a block
of a single row does, once. Compilation takes some seconds per operation. PyTorch caches it on disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from collegium.kernels.plain import MIN_LOGIT
from collegium.kernels.rows import (
    DenseTarget,
    LogSumExp,
    RawRows,
    RowKernels,
    RunningMean,
    logp_floor,
)


def find_compiler() -> str | None:
    """Return the path of the C++ compiler that PyTorch would use, or None."""
    names = (os.environ.get("CXX", "g++"), "clang++")
    return next((path for name in names if (path := shutil.which(name))), None)


Raw = tuple[Tensor, float, float | None]
"""Values, scale and cap of `RawRows`, as arguments that `torch.compile` reads."""
Norm = tuple[Tensor, Tensor]
"""Both parts of a `LogSumExp`."""


class CompiledKernels(RowKernels):
    """Kernels that `torch.compile` makes of the formulas below."""

    def read(self, rows: RawRows) -> tuple[LogSumExp, Tensor]:
        max_n, log_sum_n, entropy_n = _run(_read, _raw(rows))
        return LogSumExp(max_n, log_sum_n), entropy_n

    def add_(
        self, mean: RunningMean, rows: RawRows, logsumexp: LogSumExp, share_n: Tensor | None
    ) -> None:
        norm = _norm(logsumexp.to(mean.values_nV.dtype))
        _run(_add_, mean.values_nV, _raw(rows), norm, share_n, mean.is_log)

    def softmax_(self, rows: RawRows, logsumexp: LogSumExp, factor_n: Tensor) -> None:
        _run(_softmax_, _raw(rows), _norm(logsumexp), factor_n)

    def distill_(
        self, rows: RawRows, target: DenseTarget | None, kd_n: Tensor, ce_n: Tensor
    ) -> tuple[LogSumExp, Tensor]:
        parts = temperature = None
        if target is not None:
            norm = None if target.logsumexp is None else _norm(target.logsumexp)
            parts = target.kind, _raw(target.rows), norm
            # None is a constant of the compiled code and removes the second softmax.
            temperature = None if target.temperature == 1.0 else target.temperature
        max_n, log_sum_n, kl_n = _run(_distill_, _raw(rows), parts, kd_n, ce_n, temperature)
        return LogSumExp(max_n, log_sum_n), kl_n


def _raw(rows: RawRows) -> Raw:
    return rows.values_nV, rows.scale, rows.softcap


def _norm(logsumexp: LogSumExp) -> Norm:
    return logsumexp.max_n, logsumexp.log_sum_n


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the compiled function for the dtypes and constants among the arguments."""
    # Scales, caps and temperatures are symbolic, so their values share the compiled code.
    variant = (
        x.dtype if isinstance(x, Tensor) else float if isinstance(x, float) else x
        for x in tree_leaves(arguments)
    )
    return _compiled(function, *variant)(*arguments)


@cache
def _compiled(function: Callable[..., Any], *variant: object) -> Callable[..., Any]:
    """Compile a copy of a function for one variant of its arguments."""
    # PyTorch gives up on a code object after `torch._dynamo.config.recompile_limit` (8) variants.
    # With a copy of the code object, each variant has a count to itself.
    del variant
    clone = FunctionType(function.__code__.replace(), function.__globals__)
    # fullgraph: raise on a graph break rather than run part of the loop uncompiled.
    return torch.compile(clone, dynamic=True, fullgraph=True)


def _logits(raw: Raw) -> Tensor:
    x_nV, scale, cap = raw
    z_nV = x_nV.to(torch.promote_types(x_nV.dtype, torch.float32)) * scale
    return z_nV if cap is None else cap * torch.tanh(z_nV / cap)


def _slope(z_nV: Tensor, raw: Raw) -> Tensor | float:
    _, scale, cap = raw
    return scale if cap is None else scale * (1.0 - (z_nV / cap).square())


def _logp(z_nV: Tensor, norm: Norm) -> Tensor:
    max_n, log_sum_n = norm
    return (z_nV - max_n[:, None]) - log_sum_n[:, None]


def _read(raw: Raw) -> tuple[Tensor, Tensor, Tensor]:
    z_nV = _logits(raw)
    max_n1 = z_nV.amax(-1, keepdim=True)
    shifted_nV = z_nV - max_n1
    is_top_nV = shifted_nV == 0
    # The largest logits are kept out of the sum: 1 + x would round the entropy of certain rows.
    count_n = is_top_nV.to(z_nV.dtype).sum(-1)
    exp_nV = torch.where(is_top_nV, 0.0, shifted_nV.exp())
    rest_n = exp_nV.sum(-1)
    # Clamped: 0 * -inf of an excluded token would be NaN.
    dot_n = (exp_nV * shifted_nV.clamp(min=MIN_LOGIT)).sum(-1)
    log_sum_n = count_n.log() + torch.log1p(rest_n / count_n)
    return max_n1[:, 0], log_sum_n, log_sum_n - dot_n / (count_n + rest_n)


def _add_(mean_nV: Tensor, raw: Raw, norm: Norm, share_n: Tensor | None, is_log: bool) -> None:
    logp_nV = _logp(_logits(raw), norm)
    member_nV = logp_nV.clamp(min=logp_floor(logp_nV.dtype)) if is_log else logp_nV.exp()
    if share_n is None:
        mean_nV.copy_(member_nV)
    else:
        mean_nV.copy_(mean_nV * (1.0 - share_n)[:, None] + member_nV * share_n[:, None])


def _softmax_(raw: Raw, norm: Norm, factor_n: Tensor) -> None:
    z_nV = _logits(raw)
    prob_nV = _logp(z_nV, norm).exp()
    raw[0].copy_(factor_n[:, None] * prob_nV * _slope(z_nV, raw))


def _distill_(
    raw: Raw,
    target: tuple[str, Raw, Norm | None] | None,
    kd_n: Tensor,
    ce_n: Tensor,
    temperature: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    z_nV = _logits(raw)
    max_n1 = z_nV.amax(-1, keepdim=True)
    shifted_nV = z_nV - max_n1
    exp_nV = shifted_nV.exp()
    sum_n1 = exp_nV.sum(-1, keepdim=True)
    kd_n1, ce_n1 = kd_n[:, None], ce_n[:, None]
    if target is None:
        raw[0].copy_(exp_nV * (ce_n1 / sum_n1) * _slope(z_nV, raw))
        return max_n1[:, 0], sum_n1.log()[:, 0], torch.zeros_like(kd_n)
    prob_nV, logp_nV = _target(*target)
    mass_n1 = prob_nV.sum(-1, keepdim=True)
    if temperature is None:
        soft_nV, soft_sum_n1, factor_n1 = shifted_nV, sum_n1, kd_n1
        grad_nV = exp_nV * ((ce_n1 + kd_n1 * mass_n1) / sum_n1)
    else:
        soft_nV, factor_n1 = shifted_nV / temperature, kd_n1 / temperature
        soft_exp_nV = soft_nV.exp()
        soft_sum_n1 = soft_exp_nV.sum(-1, keepdim=True)
        grad_nV = exp_nV * (ce_n1 / sum_n1) + soft_exp_nV * (factor_n1 * mass_n1 / soft_sum_n1)
    kl_n = (prob_nV * (logp_nV - soft_nV + soft_sum_n1.log())).sum(-1)
    raw[0].copy_((grad_nV - factor_n1 * prob_nV) * _slope(z_nV, raw))
    return max_n1[:, 0], sum_n1.log()[:, 0], kl_n


def _target(kind: str, raw: Raw, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """P and log P of a target, (n, V) each."""
    if kind == "prob":
        return raw[0], raw[0].clamp(min=torch.finfo(raw[0].dtype).tiny).log()
    logp_nV = _logits(raw)
    if norm is not None:
        logp_nV = _logp(logp_nV, norm).clamp(min=logp_floor(logp_nV.dtype))
    return logp_nV.exp(), logp_nV
