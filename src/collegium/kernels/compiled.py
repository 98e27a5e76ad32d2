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

from collegium.kernels.plain import MIN_LOGIT
from collegium.kernels.rows import BlockStats, DenseTarget, LogSumExp, RawRows, logp_floor


def find_compiler() -> str | None:
    """Return the path of the C++ compiler that PyTorch would use, or None."""
    names = (os.environ.get("CXX", "g++"), "clang++")
    return next((path for name in names if (path := shutil.which(name))), None)


class CompiledKernels:
    """`RowKernels` compiled by `torch.compile`."""

    name = "compiled"

    def read(self, rows: RawRows, labels_n: Tensor) -> BlockStats:
        x_nV = rows.values_nV
        max_n, log_sum_n, entropy_n = _compiled(_read, x_nV.dtype, rows.softcap is None)(
            x_nV, rows.scale, rows.softcap
        )
        logsumexp = LogSumExp(max_n, log_sum_n)
        return BlockStats(logsumexp, entropy_n, logsumexp.logp(rows.at_labels(labels_n)[0]))

    def add_(
        self,
        pool_nV: Tensor,
        rows: RawRows,
        logsumexp: LogSumExp,
        share_n: Tensor | None,
        *,
        is_log: bool,
        unit_n: Tensor | None = None,
        is_last: bool = True,
    ) -> None:
        x_nV, dtype = rows.values_nV, pool_nV.dtype
        variant = (x_nV.dtype, dtype, rows.softcap is None, share_n is None, is_log)
        norm = (logsumexp.max_n.to(dtype), logsumexp.log_sum_n.to(dtype))
        _compiled(_add_, *variant)(pool_nV, x_nV, rows.scale, rows.softcap, *norm, share_n, is_log)

    def softmax_(self, rows: RawRows, logsumexp: LogSumExp, factor_n: Tensor) -> None:
        x_nV = rows.values_nV
        _compiled(_softmax_, x_nV.dtype, rows.softcap is None)(
            x_nV, rows.scale, rows.softcap, logsumexp.max_n, logsumexp.log_sum_n, factor_n
        )

    def distill_(
        self,
        rows: RawRows,
        target: DenseTarget | None,
        kd_n: Tensor,
        ce_n: Tensor,
        *,
        temperature: float,
    ) -> tuple[LogSumExp, Tensor]:
        x_nV, cap = rows.values_nV, rows.softcap
        student = (x_nV, rows.scale, cap)
        variant = (x_nV.dtype, cap is None, temperature == 1.0)
        if target is None:
            max_n, log_sum_n = _compiled(_label_, *variant)(*student, ce_n)
            return LogSumExp(max_n, log_sum_n), torch.zeros_like(max_n)
        t_rows = target.rows
        t_max_n = None if target.logsumexp is None else target.logsumexp.max_n
        t_log_sum_n = None if target.logsumexp is None else target.logsumexp.log_sum_n
        variant = (*variant, target.kind, t_rows.values_nV.dtype, t_rows.softcap is None)
        max_n, log_sum_n, kl_n = _compiled(_distill_, *variant)(
            *student,
            (t_rows.values_nV, t_rows.scale, t_rows.softcap, t_max_n, t_log_sum_n),
            target.kind,
            kd_n,
            ce_n,
            # None is a constant of the compiled code and removes the second softmax.
            None if temperature == 1.0 else temperature,
        )
        return LogSumExp(max_n, log_sum_n), kl_n


@cache
def _compiled(function: Callable[..., Any], *variant: object) -> Callable[..., Any]:
    """Compile a copy of a function for one variant of its arguments."""
    # PyTorch gives up on a code object after `torch._dynamo.config.recompile_limit` (8) variants.
    # With a copy of the code object, each variant has a count to itself.
    del variant
    clone = FunctionType(function.__code__.replace(), function.__globals__)
    # fullgraph: raise on a graph break rather than run part of the loop uncompiled.
    return torch.compile(clone, dynamic=True, fullgraph=True)


def _logits(x_nV: Tensor, scale: float, cap: float | None) -> Tensor:
    z_nV = x_nV.to(torch.promote_types(x_nV.dtype, torch.float32)) * scale
    return z_nV if cap is None else cap * torch.tanh(z_nV / cap)


def _slope(z_nV: Tensor, scale: float, cap: float | None) -> Tensor | float:
    return scale if cap is None else scale * (1.0 - (z_nV / cap).square())


def _read(x_nV: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    z_nV = _logits(x_nV, scale, cap)
    max_n1 = z_nV.amax(-1, keepdim=True)
    shifted_nV = z_nV - max_n1
    exp_nV = shifted_nV.exp()
    sum_n = exp_nV.sum(-1)
    # Clamped: 0 * -inf of an excluded token would be NaN.
    dot_n = (exp_nV * shifted_nV.clamp(min=MIN_LOGIT)).sum(-1)
    log_sum_n = sum_n.log()
    return max_n1[:, 0], log_sum_n, log_sum_n - dot_n / sum_n


def _add_(
    pool_nV: Tensor,
    x_nV: Tensor,
    scale: float,
    cap: float | None,
    max_n: Tensor,
    log_sum_n: Tensor,
    share_n: Tensor | None,
    is_log: bool,
) -> None:
    logp_nV = (_logits(x_nV, scale, cap) - max_n[:, None]) - log_sum_n[:, None]
    member_nV = logp_nV.clamp(min=logp_floor(logp_nV.dtype)) if is_log else logp_nV.exp()
    if share_n is None:
        pool_nV.copy_(member_nV)
    else:
        pool_nV.copy_(pool_nV * (1.0 - share_n)[:, None] + member_nV * share_n[:, None])


def _softmax_(
    x_nV: Tensor,
    scale: float,
    cap: float | None,
    max_n: Tensor,
    log_sum_n: Tensor,
    factor_n: Tensor,
) -> None:
    z_nV = _logits(x_nV, scale, cap)
    prob_nV = ((z_nV - max_n[:, None]) - log_sum_n[:, None]).exp()
    x_nV.copy_(factor_n[:, None] * prob_nV * _slope(z_nV, scale, cap))


def _label_(x_nV: Tensor, scale: float, cap: float | None, ce_n: Tensor) -> tuple[Tensor, Tensor]:
    z_nV = _logits(x_nV, scale, cap)
    max_n1 = z_nV.amax(-1, keepdim=True)
    exp_nV = (z_nV - max_n1).exp()
    sum_n1 = exp_nV.sum(-1, keepdim=True)
    x_nV.copy_(exp_nV * (ce_n[:, None] / sum_n1) * _slope(z_nV, scale, cap))
    return max_n1[:, 0], sum_n1.log()[:, 0]


def _distill_(
    x_nV: Tensor,
    scale: float,
    cap: float | None,
    target: tuple[Tensor, float, float | None, Tensor | None, Tensor | None],
    kind: str,
    kd_n: Tensor,
    ce_n: Tensor,
    temperature: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    z_nV = _logits(x_nV, scale, cap)
    max_n1 = z_nV.amax(-1, keepdim=True)
    shifted_nV = z_nV - max_n1
    exp_nV = shifted_nV.exp()
    sum_n1 = exp_nV.sum(-1, keepdim=True)
    prob_nV, logp_nV = _target(*target, kind)
    mass_n1 = prob_nV.sum(-1, keepdim=True)
    kd_n1, ce_n1 = kd_n[:, None], ce_n[:, None]
    if temperature is None:
        soft_nV, soft_sum_n1, factor_n1 = shifted_nV, sum_n1, kd_n1
        grad_nV = exp_nV * ((ce_n1 + kd_n1 * mass_n1) / sum_n1)
    else:
        soft_nV, factor_n1 = shifted_nV / temperature, kd_n1 / temperature
        soft_exp_nV = soft_nV.exp()
        soft_sum_n1 = soft_exp_nV.sum(-1, keepdim=True)
        grad_nV = exp_nV * (ce_n1 / sum_n1) + soft_exp_nV * (factor_n1 * mass_n1 / soft_sum_n1)
    kl_n = (prob_nV * (logp_nV - soft_nV + soft_sum_n1.log())).sum(-1)
    x_nV.copy_((grad_nV - factor_n1 * prob_nV) * _slope(z_nV, scale, cap))
    return max_n1[:, 0], sum_n1.log()[:, 0], kl_n


def _target(
    values_nV: Tensor,
    scale: float,
    cap: float | None,
    max_n: Tensor | None,
    log_sum_n: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    if kind == "prob":
        return values_nV, values_nV.clamp(min=torch.finfo(values_nV.dtype).tiny).log()
    logp_nV = _logits(values_nV, scale, cap)
    if max_n is not None and log_sum_n is not None:
        logp_nV = ((logp_nV - max_n[:, None]) - log_sum_n[:, None]).clamp(
            min=logp_floor(logp_nV.dtype)
        )
    return logp_nV.exp(), logp_nV
