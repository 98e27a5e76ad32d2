"""The kernels in Triton: one program per row, or per row and tile of it; bfloat16 in, float32 inside.

Shapes: n rows of one block, V vocabulary.

Passes over a block, r reads and w writes of (n, V): statistics r; pooling r of the logits, r and w of the pool; distilling 2 r
and w of the logits, the second r in part from the cache of the device, and r of the target. The mass of a target counts as 1.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# Triton is not installed everywhere, and what its compiler takes as a constant has the type of one.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from collegium.kernels.plain import MIN_LOGIT
from collegium.kernels.rows import BlockStats, DenseTarget, LogSumExp, RawRows, floor

MAX_TILE = 4096
"""Columns that a program holds at a time."""
COLUMNS_PER_WARP = 256
"""Eight per thread, 16 bytes of bfloat16: with more, so many registers are taken that fewer warps hide the memory of a multiprocessor."""
KINDS = {None: 0, "logits": 1, "logp": 2, "prob": 3}
_MIN = tl.constexpr(MIN_LOGIT)
_NONE, _LOGITS, _PROB = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)


class TritonKernels:
    """`RowKernels` by Triton; on a CPU only in its interpreter."""

    name = "triton"

    def read(self, rows: RawRows, labels_n: Tensor) -> BlockStats:
        x_nV = rows.values_nV
        max_n, log_sum_n, entropy_n = _empty_rows(rows, 3)
        _read_kernel[(x_nV.shape[0],)](
            x_nV, max_n, log_sum_n, entropy_n, **_head(rows), **_shape(rows)
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
        _add_kernel[_tiles(rows)](
            pool_nV,
            rows.values_nV,
            log_sum.max_n,
            log_sum.log_sum_n,
            log_sum.max_n if share_n is None else share_n,
            pool_stride=pool_nV.stride(0),
            has_share=share_n is not None,
            is_log=is_log,
            least=floor(pool_nV.dtype),
            **_head(rows),
            **_shape(rows),
        )

    def softmax_(self, rows: RawRows, log_sum: LogSumExp, factor_n: Tensor) -> None:
        x_nV = rows.values_nV
        norm = (log_sum.max_n, log_sum.log_sum_n)
        _softmax_kernel[_tiles(rows)](x_nV, *norm, factor_n, **_head(rows), **_shape(rows))

    def distill_(
        self,
        rows: RawRows,
        target: DenseTarget | None,
        kd_n: Tensor,
        ce_n: Tensor,
        *,
        temperature: float,
    ) -> tuple[LogSumExp, Tensor]:
        x_nV = rows.values_nV
        max_n, log_sum_n, kl_n = _empty_rows(rows, 3)
        given = rows if target is None else target.rows
        norm = None if target is None else target.log_sum
        _distill_kernel[(x_nV.shape[0],)](
            x_nV,
            given.values_nV,
            max_n if norm is None else norm.max_n,
            max_n if norm is None else norm.log_sum_n,
            kd_n,
            ce_n,
            max_n,
            log_sum_n,
            kl_n,
            target_stride=given.values_nV.stride(0),
            kind=KINDS[None if target is None else target.kind],
            target_scale=given.scale,
            target_cap=given.softcap or 0.0,
            temperature=temperature,
            least=floor(rows.dtype),
            tiny=torch.finfo(rows.dtype).tiny,
            **_head(rows),
            **_shape(rows),
        )
        return LogSumExp(max_n, log_sum_n), kl_n


def _head(rows: RawRows) -> dict[str, float]:
    return {"scale": rows.scale, "cap": rows.softcap or 0.0}


def _shape(rows: RawRows) -> dict[str, object]:
    """The extent, and what is compiled in. Multiplications and additions are fused, whatever the default of the Triton at hand."""
    tile = _tile(rows)
    return {
        "num_columns": rows.values_nV.shape[1],
        "x_stride": rows.values_nV.stride(0),
        "wide": tl.float64 if rows.dtype == torch.float64 else tl.float32,
        "tile": tile,
        "num_warps": max(1, tile // COLUMNS_PER_WARP),
        "enable_fp_fusion": True,
    }


def _tile(rows: RawRows) -> int:
    return min(MAX_TILE, triton.next_power_of_2(rows.values_nV.shape[1]))


def _tiles(rows: RawRows) -> tuple[int, int]:
    num_rows, vocab_size = rows.values_nV.shape
    return num_rows, triton.cdiv(vocab_size, _tile(rows))


def _empty_rows(rows: RawRows, count: int) -> tuple[Tensor, ...]:
    shape = (count, rows.values_nV.shape[0])
    return torch.empty(shape, dtype=rows.dtype, device=rows.values_nV.device).unbind()


@triton.jit
def _logits(x, scale: tl.constexpr, cap: tl.constexpr):
    z = x * scale
    if cap > 0.0:
        # tanh by exponentials of what is never positive
        bent = tl.exp(-2.0 * tl.abs(z / cap))
        bent = (1.0 - bent) / (1.0 + bent)
        z = cap * tl.where(z < 0.0, -bent, bent)
    return z


@triton.jit
def _slope(z, scale: tl.constexpr, cap: tl.constexpr):
    slope = z * 0.0 + scale
    if cap > 0.0:
        slope = scale * (1.0 - (z / cap) * (z / cap))
    return slope


@triton.jit
def _finite(z):
    """-inf as a number; what is not a number stays so."""
    return tl.where(z < _MIN, _MIN, z)


# Tiles that a row fills and the rest of the row are two copies of one loop: without a mask the compiler reads 16 bytes at a time.


@triton.jit
def _load(ptr, columns, num_columns, wide: tl.constexpr, is_rest: tl.constexpr):
    if is_rest:
        values = tl.load(ptr + columns, mask=columns < num_columns, other=0.0)
    else:
        values = tl.load(ptr + columns)
    return values.to(wide)


@triton.jit
def _store(ptr, columns, values, num_columns, is_rest: tl.constexpr):
    values = values.to(ptr.dtype.element_ty)
    if is_rest:
        tl.store(ptr + columns, values, mask=columns < num_columns)
    else:
        tl.store(ptr + columns, values)


@triton.jit
def _inside(values, other, columns, num_columns, is_rest: tl.constexpr):
    """The values where a row has columns, something else beyond its end."""
    if is_rest:
        values = tl.where(columns < num_columns, values, other)
    return values


@triton.jit
def _read_kernel(
    x_ptr,
    max_ptr,
    log_sum_ptr,
    entropy_ptr,
    num_columns,
    x_stride,
    scale: tl.constexpr,
    cap: tl.constexpr,
    wide: tl.constexpr,
    tile: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    whole = num_columns // tile * tile
    most = tl.full((), _MIN, wide)
    total = tl.full((), 0.0, wide)
    dot = tl.full((), 0.0, wide)
    for is_rest in tl.static_range(2):
        for start in range(is_rest * whole, whole + is_rest * (num_columns - whole), tile):
            columns = start + tl.arange(0, tile)
            z = _logits(_load(x_ptr, columns, num_columns, wide, is_rest), scale, cap)
            z = _finite(_inside(z, _MIN, columns, num_columns, is_rest))
            higher = tl.maximum(most, tl.max(z, 0))
            # What was summed below another maximum.
            shrink = tl.exp(most - higher)
            dot = (dot + total * (most - higher)) * shrink
            exp = _inside(tl.exp(z - higher), 0.0, columns, num_columns, is_rest)
            total = total * shrink + tl.sum(exp, 0)
            dot += tl.sum(exp * (z - higher), 0)
            most = higher
    log_sum = tl.log(total)
    tl.store(max_ptr + row, most)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(entropy_ptr + row, log_sum - dot / total)


@triton.jit
def _add_kernel(
    pool_ptr,
    x_ptr,
    max_ptr,
    log_sum_ptr,
    share_ptr,
    num_columns,
    x_stride,
    pool_stride,
    has_share: tl.constexpr,
    is_log: tl.constexpr,
    least: tl.constexpr,
    scale: tl.constexpr,
    cap: tl.constexpr,
    wide: tl.constexpr,
    tile: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    pool_ptr += row * pool_stride
    start = tl.program_id(1) * tile
    columns = start + tl.arange(0, tile)
    most, log_sum = tl.load(max_ptr + row), tl.load(log_sum_ptr + row)
    for is_rest in tl.static_range(2):
        if (start + tile > num_columns) == is_rest:
            z = _logits(_load(x_ptr, columns, num_columns, wide, is_rest), scale, cap)
            z = _inside(z, most, columns, num_columns, is_rest)
            member = (z - most) - log_sum
            if is_log:
                member = tl.where(member < least, least, member)
            else:
                member = tl.exp(member)
            if has_share:
                share = tl.load(share_ptr + row)
                pool = _load(pool_ptr, columns, num_columns, wide, is_rest)
                member = pool * (1.0 - share) + member * share
            _store(pool_ptr, columns, member, num_columns, is_rest)


@triton.jit
def _softmax_kernel(
    x_ptr,
    max_ptr,
    log_sum_ptr,
    factor_ptr,
    num_columns,
    x_stride,
    scale: tl.constexpr,
    cap: tl.constexpr,
    wide: tl.constexpr,
    tile: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    start = tl.program_id(1) * tile
    columns = start + tl.arange(0, tile)
    most, log_sum = tl.load(max_ptr + row), tl.load(log_sum_ptr + row)
    factor = tl.load(factor_ptr + row)
    for is_rest in tl.static_range(2):
        if (start + tile > num_columns) == is_rest:
            z = _logits(_load(x_ptr, columns, num_columns, wide, is_rest), scale, cap)
            z = _inside(z, most, columns, num_columns, is_rest)
            grad = factor * tl.exp((z - most) - log_sum) * _slope(z, scale, cap)
            _store(x_ptr, columns, grad, num_columns, is_rest)


@triton.jit
def _target_logp(
    value,
    most,
    log_sum,
    kind: tl.constexpr,
    target_scale: tl.constexpr,
    target_cap: tl.constexpr,
    least: tl.constexpr,
    tiny: tl.constexpr,
):
    if kind == _PROB:
        logp = tl.log(tl.maximum(value, tiny))
    else:
        logp = _logits(value, target_scale, target_cap)
        if kind == _LOGITS:
            logp = (logp - most) - log_sum
        logp = tl.where(logp < least, least, logp)
    return logp


@triton.jit
def _distill_kernel(
    x_ptr,
    target_ptr,
    target_max_ptr,
    target_log_sum_ptr,
    kd_ptr,
    ce_ptr,
    max_ptr,
    log_sum_ptr,
    kl_ptr,
    num_columns,
    x_stride,
    target_stride,
    kind: tl.constexpr,
    target_scale: tl.constexpr,
    target_cap: tl.constexpr,
    temperature: tl.constexpr,
    least: tl.constexpr,
    tiny: tl.constexpr,
    scale: tl.constexpr,
    cap: tl.constexpr,
    wide: tl.constexpr,
    tile: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    target_ptr += row * target_stride
    whole = num_columns // tile * tile
    most = tl.full((), _MIN, wide)
    total = tl.full((), 0.0, wide)
    soft = tl.full((), 0.0, wide)  # the total at the temperature
    for is_rest in tl.static_range(2):
        for start in range(is_rest * whole, whole + is_rest * (num_columns - whole), tile):
            columns = start + tl.arange(0, tile)
            z = _logits(_load(x_ptr, columns, num_columns, wide, is_rest), scale, cap)
            z = _finite(_inside(z, _MIN, columns, num_columns, is_rest))
            higher = tl.maximum(most, tl.max(z, 0))
            exp = _inside(tl.exp(z - higher), 0.0, columns, num_columns, is_rest)
            total = total * tl.exp(most - higher) + tl.sum(exp, 0)
            if temperature != 1.0:
                exp = tl.exp((z - higher) / temperature)
                exp = _inside(exp, 0.0, columns, num_columns, is_rest)
                soft = soft * tl.exp((most - higher) / temperature) + tl.sum(exp, 0)
            most = higher
    log_sum = tl.log(total)
    log_soft = log_sum
    if temperature != 1.0:
        log_soft = tl.log(soft)
    kd, ce = tl.load(kd_ptr + row), tl.load(ce_ptr + row)
    target_most, target_log_sum = most, log_sum
    if kind == _LOGITS:
        target_most = tl.load(target_max_ptr + row)
        target_log_sum = tl.load(target_log_sum_ptr + row)
    kl = tl.full((), 0.0, wide)
    for is_rest in tl.static_range(2):
        for start in range(is_rest * whole, whole + is_rest * (num_columns - whole), tile):
            columns = start + tl.arange(0, tile)
            z = _logits(_load(x_ptr, columns, num_columns, wide, is_rest), scale, cap)
            z = _inside(z, most, columns, num_columns, is_rest)
            grad = ce * tl.exp((z - most) - log_sum)
            if kind != _NONE:
                value = _load(target_ptr, columns, num_columns, wide, is_rest)
                logp = _target_logp(
                    value, target_most, target_log_sum, kind, target_scale, target_cap, least, tiny
                )
                prob = tl.exp(logp)
                if kind == _PROB:
                    prob = value
                logq = (_finite(z) - most) / temperature - log_soft
                part = prob * (logp - logq)
                kl += tl.sum(_inside(part, 0.0, columns, num_columns, is_rest), 0)
                grad += kd * (tl.exp(logq) - prob) / temperature
            _store(x_ptr, columns, grad * _slope(z, scale, cap), num_columns, is_rest)
    tl.store(max_ptr + row, most)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(kl_ptr + row, kl)
