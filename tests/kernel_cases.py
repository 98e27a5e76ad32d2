"""Rows, backends and tolerances, as the kernel tests use them."""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.kernels.backends import kernels_for
from collegium.kernels.rows import RawRows, RowKernels

BACKENDS = ["torch"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
HEADS: list[dict[str, float]] = [{}, {"scale": 0.25}, {"scale": 3.0, "softcap": 5.0}]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def kernels_of(backend) -> RowKernels:
    return kernels_for(backend, torch.device("cpu"))


def raw_rows(
    num_rows: int, vocab_size: int, dtype: torch.dtype, *, seed: int = 0, **head: float
) -> tuple[RawRows, Tensor]:
    """Rows of a head's product, and labels."""
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    return RawRows(values.to(dtype), **head), labels


def truth_of(rows: RawRows, *, with_raw: bool = False):
    """The logits in float64, with a graph to the raw values where these are asked for."""
    raw = rows.values_nV.double().clone().requires_grad_(with_raw)
    z = rows.scale * raw
    z = z if rows.softcap is None else rows.softcap * torch.tanh(z / rows.softcap)
    return (z, raw) if with_raw else z


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal within the rounding of `dtype`, relative to the largest value."""
    expected = expected.detach()
    bound = TOLERANCE[dtype] * max(1e-3, float(expected.abs().max()))
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= bound
