"""The kernels as fused loops that PyTorch compiles for the CPU: each operation goes over a row in one or two sweeps.

Shapes: n rows of one block, V vocabulary.

The sizes are symbols of the compiled code, so that neither the last block of a batch nor another batch compiles anew; only a
single row does, once. Compiling takes some seconds per operation, and is cached on disk by PyTorch.
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
from collegium.kernels.rows import BlockStats, DenseTarget, LogSumExp, RawRows, floor


def find_compiler() -> str | None:
    """The C++ compiler that PyTorch would use, None where there is none."""
    names = (os.environ.get("CXX", "g++"), "clang++")
    return next((found for name in names if (found := shutil.which(name))), None)


class CompiledKernels:
    """`RowKernels` by `torch.compile`."""

    name = "compiled"

    def read(self, rows: RawRows, labels_n: Tensor) -> BlockStats:
        x_nV = rows.values_nV
        max_n, log_sum_n, entropy_n = _compiled(_read, x_nV.dtype, rows.softcap is None)(
            x_nV, rows.scale, rows.softcap
        )
        log_sum = LogSumExp(max_n, log_sum_n)
        return BlockStats(log_sum, entropy_n, log_sum.logp(rows.at_labels(labels_n)[0]))

    def add_(
        self,
        pool_nV: Tensor,
        rows: RawRows,
        log_sum: LogSumExp,
        share_n: Tensor | None,
        *,
        is_log: bool,
        unit_n: Tensor | None = None,
        is_last: bool = True,
    ) -> None:
        x_nV, dtype = rows.values_nV, pool_nV.dtype
        variant = (x_nV.dtype, dtype, rows.softcap is None, share_n is None, is_log)
        norm = (log_sum.max_n.to(dtype), log_sum.log_sum_n.to(dtype))
        _compiled(_add_, *variant)(pool_nV, x_nV, rows.scale, rows.softcap, *norm, share_n, is_log)

    def softmax_(self, rows: RawRows, log_sum: LogSumExp, factor_n: Tensor) -> None:
        x_nV = rows.values_nV
        _compiled(_softmax_, x_nV.dtype, rows.softcap is None)(
            x_nV, rows.scale, rows.softcap, log_sum.max_n, log_sum.log_sum_n, factor_n
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
        given = target.rows
        norm = None if target.log_sum is None else target.log_sum.max_n
        log_norm = None if target.log_sum is None else target.log_sum.log_sum_n
        variant = (*variant, target.kind, given.values_nV.dtype, given.softcap is None)
        max_n, log_sum_n, kl_n = _compiled(_distill_, *variant)(
            *student,
            (given.values_nV, given.scale, given.softcap, norm, log_norm),
            target.kind,
            kd_n,
            ce_n,
            None if temperature == 1.0 else temperature,
        )
        return LogSumExp(max_n, log_sum_n), kl_n


@cache
def _compiled(function: Callable[..., Any], *variant: object) -> Callable[..., Any]:
    """A compiled function for one variant.

    Each variant would be compiled anew anyway; with code of its own it does not count towards the few recompilations after
    which PyTorch gives up on a function.
    """
    del variant
    own = FunctionType(function.__code__.replace(), function.__globals__)
    return torch.compile(own, dynamic=True, fullgraph=True)


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
    member_nV = logp_nV.clamp(min=floor(logp_nV.dtype)) if is_log else logp_nV.exp()
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
        logp_nV = ((logp_nV - max_n[:, None]) - log_sum_n[:, None]).clamp(min=floor(logp_nV.dtype))
    return logp_nV.exp(), logp_nV
