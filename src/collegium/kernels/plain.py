"""Kernels in plain PyTorch: the reference for the other backends and the default on a CPU.

Shapes: n rows of one block, V vocabulary, s rows of a strip.

A block is processed in strips of a few rows. A strip stays in the processor's cache while all
operations run on it, so each kernel reads a block from memory once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from collegium.kernels.rows import (
    DenseTarget,
    LogSumExp,
    RawRows,
    RowKernels,
    RunningMean,
    Workspace,
    floor_,
    to_logits,
)
from collegium.options import torch

if TYPE_CHECKING:
    from torch import Tensor

# From 2 to 16 rows of V = 49,152, the height of a strip changes the time by no more than noise.
CPU_STRIP_BYTES = 2**19
"""Size of one (s, V) buffer per thread; up to six are in use at once."""
GPU_STRIP_BYTES = 2**27
"""Larger than on a CPU: a GPU needs many rows to be busy."""
MIN_LOGIT = -1e30
"""Finite stand-in for z - max z = -inf: its exp is 0, and 0 times it is not NaN."""

# In float32 exp overflows at 88; a sum of 2^20 terms of exp 50 is only exp 64.
MIN_SAFE_MAX, MAX_SAFE_MAX = -40.0, 50.0
"""Range of a row's largest logit in which exp z needs no shift in float32."""
NEARLY_CERTAIN = 0.01
"""Entropy in nats below which unshifted sums, off by up to 2.5e-7 max |z|, are too rough."""
MIN_UNIT = 1e-30
"""Smallest unit u of a pool that stores P / u: its values stay below 1 / u."""


class TorchKernels(RowKernels):
    """Kernels as PyTorch operations on strips."""

    def __init__(self) -> None:
        self._scratch = Workspace()

    def read(self, rows: RawRows) -> tuple[LogSumExp, Tensor]:
        if rows.values_nV.device.type != "cpu":
            return self._read_precisely(rows)
        logsumexp, entropy_n = self._read(rows)
        # Rows with logits of -inf (NaN so far) and nearly certain rows: a second sweep for them is
        # cheaper than a more precise one for all.
        again_m = (~(entropy_n >= NEARLY_CERTAIN)).nonzero()[:, 0]
        for strip in strips(replace(rows, values_nV=rows.values_nV[: len(again_m)])):
            index = again_m[strip]
            part = replace(rows, values_nV=rows.values_nV[index])
            precise, entropy_n[index] = self._read_precisely(part)
            logsumexp.max_n[index] = precise.max_n
            logsumexp.log_sum_n[index] = precise.log_sum_n
        return logsumexp, entropy_n

    def _read_precisely(self, rows: RawRows) -> tuple[LogSumExp, Tensor]:
        """Keep the largest logits out of the sums, which 1 + x would round."""
        max_n, log_sum_n, entropy_n = rows.empty_columns(3)
        for part in strips(rows):
            z_sV = self._logits(rows, part, "z")
            max_s = torch.amax(z_sV, -1, out=max_n[part])
            z_sV = torch.sub(z_sV, max_s[:, None], out=self._strip(z_sV, "shifted"))
            is_top_sV = z_sV == 0
            count_s = is_top_sV.sum(-1).to(rows.dtype)
            exp_sV = torch.exp(z_sV, out=self._strip(z_sV, "exp")).masked_fill_(is_top_sV, 0.0)
            rest_s = exp_sV.sum(-1)
            dot_s = exp_sV.mul_(z_sV.clamp_(min=MIN_LOGIT)).sum(-1)
            log_sum_n[part] = count_s.log() + torch.log1p(rest_s / count_s)
            entropy_n[part] = log_sum_n[part] - dot_s / (count_s + rest_s)
        return LogSumExp(max_n, log_sum_n), entropy_n

    def _read(self, rows: RawRows) -> tuple[LogSumExp, Tensor]:
        max_n, sum_n, dot_n = rows.empty_columns(3)
        shift_n = torch.zeros_like(max_n)
        for part in strips(rows):
            z_sV = self._logits(rows, part, "z")
            exp_sV = self._strip(z_sV, "exp")
            max_s = torch.amax(z_sV, -1, out=max_n[part])
            if not _exp_is_safe(max_s):
                shift_n[part] = max_s
                z_sV = torch.sub(z_sV, max_s[:, None], out=self._strip(z_sV, "shifted"))
            torch.exp(z_sV, out=exp_sV)
            torch.sum(exp_sV, -1, out=sum_n[part])
            # 0.28 ns per element; `vecdot` allocates a strip for the products and takes 0.44 ns.
            torch.sum(exp_sV.mul_(z_sV), -1, out=dot_n[part])
        unshifted_n = max_n - shift_n  # exactly 0 for shifted rows
        logsumexp = LogSumExp(max_n, (sum_n * torch.exp(-unshifted_n)).log())
        return logsumexp, (unshifted_n - dot_n / sum_n) + logsumexp.log_sum_n

    def add_(
        self, mean: RunningMean, rows: RawRows, logsumexp: LogSumExp, share_n: Tensor | None
    ) -> None:
        if not mean.is_log and _exp_is_safe(logsumexp.max_n):
            units = _units(logsumexp, share_n, mean.unit_n)
            if units is not None:
                return self._add_exp_(mean, rows, *units, is_first=share_n is None)
        mean_nV, unit_n = mean.values_nV, mean.unit_n
        if unit_n is not None:
            mean_nV.mul_(unit_n[:, None])
            mean.unit_n = None
        norm_n = logsumexp.log_sum_n if mean.is_log else torch.exp(-logsumexp.log_sum_n)
        factor_n = norm_n if mean.is_log or share_n is None else norm_n * share_n
        for part in strips(rows):
            z_sV, mean_sV = self._logits(rows, part, "z"), mean_nV[part]
            out_sV = mean_sV if share_n is None else self._strip(mean_sV, "exp")
            torch.sub(z_sV, logsumexp.max_n[part, None], out=out_sV)
            if mean.is_log:
                floor_(out_sV.sub_(factor_n[part, None]))
                if share_n is not None:
                    mean_sV.lerp_(out_sV, share_n[part, None])
            elif share_n is None:
                out_sV.exp_().mul_(factor_n[part, None])
            else:
                mean_sV.mul_((1.0 - share_n)[part, None])
                mean_sV.addcmul_(out_sV.exp_(), factor_n[part, None])

    def _add_exp_(
        self, mean: RunningMean, rows: RawRows, unit_n: Tensor, factor_n: Tensor, *, is_first: bool
    ) -> None:
        # mean <- mean + factor exp z. Its share is in the unit, so rescaling needs no sweep.
        is_last = mean.num_remaining == 0
        for part in strips(rows):
            z_sV, mean_sV = self._logits(rows, part, "z"), mean.values_nV[part]
            if is_first:
                torch.exp(z_sV, out=mean_sV)
            else:
                exp_sV = torch.exp(z_sV, out=self._strip(mean_sV, "exp"))
                mean_sV.addcmul_(exp_sV, factor_n[part, None])
            if is_last:
                mean_sV.mul_(unit_n[part, None])
        mean.unit_n = None if is_last else unit_n

    def softmax_(self, rows: RawRows, logsumexp: LogSumExp, factor_n: Tensor) -> None:
        factor_n = factor_n * torch.exp(-logsumexp.log_sum_n)
        for part in strips(rows):
            z_sV = self._logits(rows, part, "z")
            out_sV = self._strip(z_sV, "exp")
            torch.sub(z_sV, logsumexp.max_n[part, None], out=out_sV).exp_()
            self._store(rows, part, z_sV, out_sV.mul_(factor_n[part, None]))

    def distill_(
        self, rows: RawRows, target: DenseTarget | None, kd_n: Tensor, ce_n: Tensor
    ) -> tuple[LogSumExp, Tensor]:
        max_n, log_sum_n, kl_n = rows.empty_columns(3)
        temperature = 1.0 if target is None else target.temperature
        for part in strips(rows):
            z_sV, raw_sV = self._logits(rows, part, "z"), rows.values_nV[part]
            shifted_sV = self._strip(z_sV, "shifted")
            # Without a cast, scale or cap the values are the logits: no copy, fully in-place.
            is_raw = z_sV.data_ptr() == raw_sV.data_ptr()
            exp_sV = raw_sV if is_raw else self._strip(z_sV, "exp")
            max_s = torch.amax(z_sV, -1, out=max_n[part])
            torch.sub(z_sV, max_s[:, None], out=shifted_sV)
            sum_s1 = torch.exp(shifted_sV, out=exp_sV).sum(-1, keepdim=True)
            torch.log(sum_s1[:, 0], out=log_sum_n[part])
            ce_s1, kd_s1 = ce_n[part, None], kd_n[part, None]
            if target is None:
                kl_n[part] = 0.0
                exp_sV.mul_(ce_s1 / sum_s1)
            else:
                prob_sV, logp_sV = self._target(target, part)
                mass_s1 = prob_sV.sum(-1, keepdim=True)
                if temperature == 1.0:
                    kd_sum_s1 = sum_s1
                    exp_sV.mul_((ce_s1 + kd_s1 * mass_s1) / sum_s1)
                else:
                    soft_sV = torch.exp(shifted_sV.div_(temperature), out=self._strip(z_sV, "soft"))
                    kd_sum_s1 = soft_sV.sum(-1, keepdim=True)
                    exp_sV.mul_(ce_s1 / sum_s1)
                    exp_sV.addcmul_(soft_sV, kd_s1 * mass_s1 / (kd_sum_s1 * temperature))
                exp_sV.addcmul_(prob_sV, kd_s1, value=-1.0 / temperature)
                dot_s = logp_sV.sub_(shifted_sV).mul_(prob_sV).sum(-1)
                kl_n[part] = dot_s + (mass_s1 * kd_sum_s1.log())[:, 0]
            self._store(rows, part, z_sV, exp_sV)
        return LogSumExp(max_n, log_sum_n), kl_n

    def _target(self, target: DenseTarget, part: slice) -> tuple[Tensor, Tensor]:
        """Return P and log P of a strip of the target, (s, V) each. log P may be overwritten."""
        if target.kind == "prob":
            values_sV = target.rows.values_nV[part]
            logp_sV, tiny = self._strip(values_sV, "logp"), torch.finfo(values_sV.dtype).tiny
            return values_sV, torch.clamp(values_sV, min=tiny, out=logp_sV).log_()
        z_sV = self._logits(target.rows, part, "logp")
        logp_sV = self._strip(z_sV, "logp")
        if target.logsumexp is None:
            logp_sV.copy_(z_sV)
        else:
            torch.sub(z_sV, target.logsumexp.max_n[part, None], out=logp_sV)
            logp_sV.sub_(target.logsumexp.log_sum_n[part, None])
            floor_(logp_sV)
        return torch.exp(logp_sV, out=self._strip(logp_sV, "prob")), logp_sV

    def _store(self, rows: RawRows, part: slice, z_sV: Tensor, grad_sV: Tensor) -> None:
        """x <- (gradient at z) dz/dx."""
        if rows.softcap is not None:
            slope_sV = z_sV.div_(rows.softcap).square_().neg_().add_(1.0)
            grad_sV.mul_(slope_sV)
        if rows.scale != 1.0:
            grad_sV.mul_(rows.scale)
        raw_sV = rows.values_nV[part]
        if raw_sV.data_ptr() != grad_sV.data_ptr():
            raw_sV.copy_(grad_sV)

    def _logits(self, rows: RawRows, part: slice, name: str) -> Tensor:
        """Return the logits of a strip, without a copy if they equal the raw values."""
        raw_sV = rows.values_nV[part]
        if raw_sV.dtype == rows.dtype and rows.scale == 1.0 and rows.softcap is None:
            return raw_sV
        out_sV = self._scratch.matrix(name, raw_sV.shape, raw_sV.new_empty(0, dtype=rows.dtype))
        return to_logits(RawRows(raw_sV, rows.scale, rows.softcap), out_sV)

    def _strip(self, like_sV: Tensor, name: str) -> Tensor:
        return self._scratch.matrix(name, like_sV.shape, like_sV)


def strips(rows: RawRows) -> Iterator[slice]:
    """Yield slices of a few rows, one after the other."""
    num_rows, vocab_size = rows.values_nV.shape
    is_cpu = rows.values_nV.device.type == "cpu"
    budget = CPU_STRIP_BYTES * torch.get_num_threads() if is_cpu else GPU_STRIP_BYTES
    size = max(1, budget // (vocab_size * rows.dtype.itemsize))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _exp_is_safe(max_n: Tensor) -> bool:
    """Whether exp z cannot overflow, and underflows only where exp max z dominates."""
    # Always false on a GPU: reading the values would synchronize with the device.
    is_cpu = max_n.device.type == "cpu"
    return is_cpu and all(MIN_SAFE_MAX <= value <= MAX_SAFE_MAX for value in max_n.tolist())


def _units(
    logsumexp: LogSumExp, share_n: Tensor | None, unit_n: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return the pool's new unit u' and the factor f of exp z, or None if either leaves its dtype.

    u' (pool + f exp z) = (1 - share) u pool + share P.
    """
    inverse_n = torch.exp(-logsumexp.max_n) * torch.exp(-logsumexp.log_sum_n)
    if share_n is None:
        return inverse_n, inverse_n
    new_n = (1.0 - share_n) if unit_n is None else (1.0 - share_n) * unit_n
    factor_n = share_n * inverse_n / new_n
    # The unit underflows if earlier members have hardly any share left. The factor grows as the
    # member's logits fall, and can overflow even with a normal unit: maximum 46 before -32 did.
    if not bool(((new_n >= MIN_UNIT) & factor_n.isfinite()).all()):
        return None
    return new_n, factor_n
