"""Kernels in Triton: one program per row or per tile of a row, bfloat16 in, float32 inside.

Shapes: n rows of one block, V vocabulary.

Passes over an (n, V) block: statistics 1 read, pooling 2 reads and 1 write, distilling 3 reads (one
of them partly from the L2 cache) and 1 write.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton may not be installed, and `tl.constexpr` parameters are annotated as constants.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from collegium.kernels.plain import MIN_LOGIT
from collegium.kernels.rows import (
    DenseTarget,
    LogSumExp,
    RawRows,
    RowKernels,
    RunningMean,
    logp_floor,
)

MAX_TILE = 4096
"""Columns that a program holds at once."""
# 8 columns per thread, 16 bytes of bfloat16. With 64, 32, 16 and 8, kernels for capability 9.0 use
# up to 123, 80, 64 and 40 registers, so 16, 24, 32 and 48 of 64 warps are resident.
COLUMNS_PER_WARP = 256
KINDS = {None: 0, "logits": 1, "logp": 2, "prob": 3}
_MIN = tl.constexpr(MIN_LOGIT)
_NONE, _LOGITS, _PROB = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)


class TritonKernels(RowKernels):
    """Kernels in Triton, on a CPU only in its interpreter."""

    def read(self, rows: RawRows) -> tuple[LogSumExp, Tensor]:
        out_3n = rows.empty_columns(3)
        _read_kernel[(out_3n.shape[1],)](rows.values_nV, out_3n, **_constants(rows))
        max_n, log_sum_n, entropy_n = out_3n
        return LogSumExp(max_n, log_sum_n), entropy_n

    def add_(
        self, mean: RunningMean, rows: RawRows, logsumexp: LogSumExp, share_n: Tensor | None
    ) -> None:
        _add_kernel[_tiles(rows)](
            *(mean.values_nV, rows.values_nV, logsumexp.max_n, logsumexp.log_sum_n),
            logsumexp.max_n if share_n is None else share_n,
            mean_stride=mean.values_nV.stride(0),
            has_share=share_n is not None,
            is_log=mean.is_log,
            floor=logp_floor(mean.values_nV.dtype),
            **_constants(rows),
        )

    def softmax_(self, rows: RawRows, logsumexp: LogSumExp, factor_n: Tensor) -> None:
        norm = (logsumexp.max_n, logsumexp.log_sum_n)
        _softmax_kernel[_tiles(rows)](rows.values_nV, *norm, factor_n, **_constants(rows))

    def distill_(
        self, rows: RawRows, target: DenseTarget | None, kd_n: Tensor, ce_n: Tensor
    ) -> tuple[LogSumExp, Tensor]:
        out_3n = rows.empty_columns(3)
        kind = KINDS[None if target is None else target.kind]
        # Placeholders: the constants of the kernel exclude the loads of what is missing.
        target = target or DenseTarget(rows, "logp")
        norm = target.logsumexp or LogSumExp(kd_n, kd_n)
        mass_n = torch.ones_like(kd_n) if target.is_normalized else target.mass()
        _distill_kernel[(out_3n.shape[1],)](
            *(rows.values_nV, target.rows.values_nV, norm.max_n, norm.log_sum_n),
            *(mass_n, kd_n, ce_n, out_3n),
            target_stride=target.rows.values_nV.stride(0),
            kind=kind,
            target_head=_head(target.rows),
            temperature=target.temperature,
            floor=logp_floor(rows.dtype),
            tiny=torch.finfo(rows.dtype).tiny,
            **_constants(rows),
        )
        max_n, log_sum_n, kl_n = out_3n
        return LogSumExp(max_n, log_sum_n), kl_n


def _head(rows: RawRows) -> tuple[float, float]:
    """Scale and cap, 0 for no cap."""
    return rows.scale, rows.softcap or 0.0


def _constants(rows: RawRows) -> dict[str, object]:
    tile = _tile(rows)
    # enable_fp_fusion is explicit because its default depends on the Triton version.
    return {
        "num_columns": rows.values_nV.shape[1],
        "x_stride": rows.values_nV.stride(0),
        "head": _head(rows),
        "tile": tile,
        "num_warps": max(1, tile // COLUMNS_PER_WARP),
        "enable_fp_fusion": True,
    }


def _tile(rows: RawRows) -> int:
    return min(MAX_TILE, triton.next_power_of_2(rows.values_nV.shape[1]))


def _tiles(rows: RawRows) -> tuple[int, int]:
    num_rows, vocab_size = rows.values_nV.shape
    return num_rows, triton.cdiv(vocab_size, _tile(rows))


@triton.jit
def _logits(x, head: tl.constexpr):
    cap: tl.constexpr = head[1]
    z = x * head[0]
    if cap > 0.0:
        # tanh |y| = (1 - e) / (1 + e) with e = exp(-2 |y|), which cannot overflow.
        decay = tl.exp(-2.0 * tl.abs(z / cap))
        tanh = (1.0 - decay) / (1.0 + decay)
        z = cap * tl.where(z < 0.0, -tanh, tanh)
    return z


@triton.jit
def _slope(z, head: tl.constexpr):
    cap: tl.constexpr = head[1]
    slope = z * 0.0 + head[0]
    if cap > 0.0:
        slope = head[0] * (1.0 - (z / cap) * (z / cap))
    return slope


@triton.jit
def _finite(z):
    """Replace -inf by a finite value and keep NaN."""
    return tl.where(z < _MIN, _MIN, z)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to the precision of x, after Kahan."""
    rounded = 1.0 + x
    safe = tl.where(rounded == 1.0, 2.0, rounded)
    return tl.where(rounded == 1.0, x, tl.log(safe) * (x / (safe - 1.0)))


@triton.jit
def _load(ptr, columns, num_columns, is_partial: tl.constexpr):
    """Load values as float32, or as float64 from float64."""
    # Full tiles and the partial one at the end of a row are two copies of each loop. With a mask on
    # full tiles too, an odd vocabulary makes the compiler emit loads of 2 bytes instead of 16.
    if is_partial:
        values = tl.load(ptr + columns, mask=columns < num_columns, other=0.0)
    else:
        values = tl.load(ptr + columns)
    if ptr.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)
    return values


@triton.jit
def _store(ptr, columns, values, num_columns, is_partial: tl.constexpr):
    values = values.to(ptr.dtype.element_ty)
    if is_partial:
        tl.store(ptr + columns, values, mask=columns < num_columns)
    else:
        tl.store(ptr + columns, values)


@triton.jit
def _store_columns(out_ptr, row, first, second, third):
    """Store three scalars of a row in (3, n) columns, with one program per row."""
    tl.store(out_ptr + row, first)
    tl.store(out_ptr + tl.num_programs(0) + row, second)
    tl.store(out_ptr + 2 * tl.num_programs(0) + row, third)


@triton.jit
def _mask_partial(values, other, columns, num_columns, is_partial: tl.constexpr):
    """Replace the values beyond the end of a row."""
    if is_partial:
        values = tl.where(columns < num_columns, values, other)
    return values


@triton.jit
def _load_logits(ptr, columns, num_columns, beyond, head: tl.constexpr, is_partial: tl.constexpr):
    """Logits of a tile, with `beyond` after the end of a row."""
    z = _logits(_load(ptr, columns, num_columns, is_partial), head)
    return _mask_partial(z, beyond, columns, num_columns, is_partial)


@triton.jit
def _read_kernel(x_ptr, out_ptr, num_columns, x_stride, head: tl.constexpr, tile: tl.constexpr):
    """Maximum, log of the remaining sum and entropy of each row in (3, n) `out_ptr`."""
    dtype = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    full = num_columns // tile * tile
    # The sum of exp is that of `count` largest logits, 1 each, and the rest: 1 + x would round the
    # entropy of nearly certain rows.
    row_max, count = tl.full((), _MIN, dtype), tl.full((), 0.0, dtype)
    rest, dot = tl.full((), 0.0, dtype), tl.full((), 0.0, dtype)
    for is_partial in tl.static_range(2):
        for start in range(is_partial * full, full + is_partial * (num_columns - full), tile):
            columns = start + tl.arange(0, tile)
            z = _finite(_load_logits(x_ptr, columns, num_columns, _MIN, head, is_partial))
            new_max = tl.maximum(row_max, tl.max(z, 0))
            # Online softmax: rescale the sums of the earlier tiles to the new maximum.
            rescale = tl.exp(row_max - new_max)
            dot = (dot + (count + rest) * (row_max - new_max)) * rescale
            rest = tl.where(new_max > row_max, (count + rest) * rescale, rest)
            count = tl.where(new_max > row_max, 0.0, count)
            exp = _mask_partial(tl.exp(z - new_max), 0.0, columns, num_columns, is_partial)
            below = tl.where(z < new_max, exp, 0.0)
            count += tl.sum(exp - below, 0)
            rest += tl.sum(below, 0)
            dot += tl.sum(below * (z - new_max), 0)
            row_max = new_max
    log_sum = tl.log(count) + _log1p(rest / count)
    _store_columns(out_ptr, row, row_max, log_sum, log_sum - dot / (count + rest))


@triton.jit
def _add_kernel(
    mean_ptr, x_ptr, max_ptr, log_sum_ptr, share_ptr, num_columns, x_stride, mean_stride,
    has_share: tl.constexpr, is_log: tl.constexpr, floor: tl.constexpr, head: tl.constexpr,
    tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    mean_ptr += row * mean_stride
    start = tl.program_id(1) * tile
    columns = start + tl.arange(0, tile)
    row_max, log_sum = tl.load(max_ptr + row), tl.load(log_sum_ptr + row)
    for is_partial in tl.static_range(2):
        if (start + tile > num_columns) == is_partial:
            z = _load_logits(x_ptr, columns, num_columns, row_max, head, is_partial)
            member = (z - row_max) - log_sum
            if is_log:
                member = tl.where(member < floor, floor, member)
            else:
                member = tl.exp(member)
            if has_share:
                share = tl.load(share_ptr + row)
                mean = _load(mean_ptr, columns, num_columns, is_partial).to(z.dtype)
                member = mean * (1.0 - share) + member * share
            _store(mean_ptr, columns, member, num_columns, is_partial)


@triton.jit
def _softmax_kernel(
    x_ptr, max_ptr, log_sum_ptr, factor_ptr, num_columns, x_stride,
    head: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    start = tl.program_id(1) * tile
    columns = start + tl.arange(0, tile)
    row_max, log_sum = tl.load(max_ptr + row), tl.load(log_sum_ptr + row)
    factor = tl.load(factor_ptr + row)
    for is_partial in tl.static_range(2):
        if (start + tile > num_columns) == is_partial:
            z = _load_logits(x_ptr, columns, num_columns, row_max, head, is_partial)
            grad = factor * tl.exp((z - row_max) - log_sum) * _slope(z, head)
            _store(x_ptr, columns, grad, num_columns, is_partial)


@triton.jit
def _target_logp(
    value, row_max, log_sum, kind: tl.constexpr, target_head: tl.constexpr, floor: tl.constexpr,
    tiny: tl.constexpr,
):  # fmt: skip
    if kind == _PROB:
        logp = tl.log(tl.maximum(value, tiny))
    else:
        logp = _logits(value, target_head)
        if kind == _LOGITS:
            logp = (logp - row_max) - log_sum
        logp = tl.where(logp < floor, floor, logp)
    return logp


@triton.jit
def _distill_kernel(
    x_ptr, target_ptr, target_max_ptr, target_log_sum_ptr, mass_ptr, kd_ptr, ce_ptr, out_ptr,
    num_columns, x_stride, target_stride, kind: tl.constexpr, target_head: tl.constexpr,
    temperature: tl.constexpr, floor: tl.constexpr, tiny: tl.constexpr, head: tl.constexpr,
    tile: tl.constexpr,
):  # fmt: skip
    """Like `distill_`: maximum, log of the remaining sum and KL in (3, n) `out_ptr`."""
    dtype = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    target_ptr += row * target_stride
    full = num_columns // tile * tile
    row_max, sum_exp = tl.full((), _MIN, dtype), tl.full((), 0.0, dtype)
    soft_sum = tl.full((), 0.0, dtype)
    for is_partial in tl.static_range(2):
        for start in range(is_partial * full, full + is_partial * (num_columns - full), tile):
            columns = start + tl.arange(0, tile)
            z = _finite(_load_logits(x_ptr, columns, num_columns, _MIN, head, is_partial))
            new_max = tl.maximum(row_max, tl.max(z, 0))
            exp = _mask_partial(tl.exp(z - new_max), 0.0, columns, num_columns, is_partial)
            sum_exp = sum_exp * tl.exp(row_max - new_max) + tl.sum(exp, 0)
            if temperature != 1.0:
                exp = tl.exp((z - new_max) / temperature)
                exp = _mask_partial(exp, 0.0, columns, num_columns, is_partial)
                soft_sum = soft_sum * tl.exp((row_max - new_max) / temperature) + tl.sum(exp, 0)
            row_max = new_max
    log_sum = tl.log(sum_exp)
    log_soft_sum = log_sum
    if temperature != 1.0:
        log_soft_sum = tl.log(soft_sum)
    mass, kd, ce = tl.load(mass_ptr + row), tl.load(kd_ptr + row), tl.load(ce_ptr + row)
    target_max, target_log_sum = row_max, log_sum
    if kind == _LOGITS:
        target_max = tl.load(target_max_ptr + row)
        target_log_sum = tl.load(target_log_sum_ptr + row)
    kl = tl.full((), 0.0, dtype)
    for is_partial in tl.static_range(2):
        for start in range(is_partial * full, full + is_partial * (num_columns - full), tile):
            columns = start + tl.arange(0, tile)
            z = _load_logits(x_ptr, columns, num_columns, row_max, head, is_partial)
            grad = ce * tl.exp((z - row_max) - log_sum)
            if kind != _NONE:
                value = _load(target_ptr, columns, num_columns, is_partial)
                logp = _target_logp(
                    value, target_max, target_log_sum, kind, target_head, floor, tiny
                )
                # logp is clamped at the floor; a probability of exactly 0 must stay 0.
                prob = tl.exp(logp)
                if kind == _PROB:
                    prob = value
                logq = (_finite(z) - row_max) / temperature - log_soft_sum
                part = prob * (logp - logq)
                kl += tl.sum(_mask_partial(part, 0.0, columns, num_columns, is_partial), 0)
                grad += kd * (mass * tl.exp(logq) - prob) / temperature
            _store(x_ptr, columns, grad * _slope(z, head), num_columns, is_partial)
    _store_columns(out_ptr, row, row_max, log_sum, kl)
