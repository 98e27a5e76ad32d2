"""Which kernels a run uses, decided once."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from collegium.kernels.plain import TorchKernels
from collegium.kernels.rows import RowKernels

Backend = Literal["auto", "torch"]


@cache
def _build(name: str) -> RowKernels:
    return TorchKernels()


def kernels_for(backend: Backend, device: torch.device) -> RowKernels:
    """The kernels that `backend` means on `device`."""
    return _build("torch" if backend == "auto" else backend)
