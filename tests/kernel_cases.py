"""Backends, dtypes, heads and tolerances of the kernel tests."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from collegium.kernels.backends import Backend, kernels_for
from collegium.kernels.compiled import find_compiler
from collegium.kernels.rows import RawRows, RowKernels

HAS_TRITON, HAS_GPU = find_spec("triton") is not None, torch.cuda.is_available()
if HAS_TRITON and not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
BACKENDS: list[Any] = [
    "torch",
    pytest.param(
        "compiled",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"),
        ],
    ),
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton")),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
HEADS: list[dict[str, float]] = [{}, {"scale": 0.25}, {"scale": 3.0, "softcap": 5.0}]
CASES = [
    pytest.param(*backend.values, dtype, head, marks=backend.marks)
    for backend in (b if isinstance(b, type(pytest.param())) else pytest.param(b) for b in BACKENDS)
    for dtype in DTYPES
    for head in HEADS
    # Compilation takes seconds per variant.
    if backend.values != ("compiled",) or (dtype, head) in zip(DTYPES[1:], HEADS[::2], strict=True)
]
"""(backend, dtype, head)"""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def device_of(backend: Backend) -> torch.device:
    return torch.device("cuda" if backend == "triton" and HAS_GPU else "cpu")


def kernels_of(backend: Backend) -> RowKernels:
    return kernels_for(backend, device_of(backend))


def raw_rows(
    num_rows: int, vocab_size: int, dtype: torch.dtype, *, seed: int = 0, **head: float
) -> tuple[RawRows, Tensor]:
    """Draw rows with NaN in the gaps between them, and labels, on the default device."""
    generator, home = torch.Generator().manual_seed(seed), torch.get_default_device()
    values = torch.empty(num_rows, vocab_size, dtype=torch.float64, device="cpu")
    values.normal_(std=3.0, generator=generator)
    labels = torch.empty(num_rows, dtype=torch.int64, device="cpu")
    labels.random_(vocab_size, generator=generator)
    with_gaps = torch.full((num_rows, vocab_size + 3), torch.nan, device=home, dtype=dtype)
    with_gaps[:, :vocab_size] = values.to(home, dtype)
    return RawRows(with_gaps[:, :vocab_size], **head), labels.to(home)


def truth_of(rows: RawRows, *, with_raw: bool = False):
    """Return the logits in float64; `with_raw` adds the raw values, connected by a graph."""
    raw = rows.values_nV.double().clone().requires_grad_(with_raw)
    z = rows.scale * raw
    z = z if rows.softcap is None else rows.softcap * torch.tanh(z / rows.softcap)
    return (z, raw) if with_raw else z


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert equality within the rounding of `dtype`, relative to the largest value."""
    expected = expected.detach()
    bound = TOLERANCE[dtype] * max(1e-3, float(expected.abs().max()))
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= bound
