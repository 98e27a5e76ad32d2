"""Which kernels a run uses, decided once."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal, cast

import torch

from collegium.errors import RecipeError
from collegium.kernels.plain import TorchKernels
from collegium.kernels.rows import RowKernels

Backend = Literal["auto", "torch", "compiled", "triton"]


def kernels_for(backend: Backend, device: torch.device) -> RowKernels:
    """The kernels that `backend` means on `device`; `auto` is `triton` on CUDA where it is installed, else `torch`.

    Raises:
        RecipeError: they cannot run here.
    """
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and find_spec("triton") else "torch"
    require_backend(backend, device.type)
    return _build(backend)


def require_backend(backend: Backend, device_type: str | None = None) -> None:
    """Refuse a backend that cannot run here, on a device of this type where it is known.

    Raises:
        RecipeError: no compiler, no Triton, or another kind of device.
    """
    where = f"objective.backend: got {backend}"
    if backend == "compiled":
        from collegium.kernels.compiled import find_compiler

        if device_type not in (None, "cpu"):
            raise RecipeError(f"{where} on {device_type}; must be on a CPU; use auto")
        if find_compiler() is None:
            raise RecipeError(f"{where}; must find a C++ compiler; install g++ or use torch")
    if backend == "triton":
        if find_spec("triton") is None:
            raise RecipeError(f"{where}; must find Triton; install triton or use torch")
        if device_type not in (None, "cuda") and not _is_interpreted():
            raise RecipeError(f"{where} on {device_type}; must be on CUDA; use auto")


def _is_interpreted() -> bool:
    import triton  # pyright: ignore[reportMissingImports]

    return bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _build(name: str) -> RowKernels:
    # Late: the first needs a compiler, the second a package that a CPU has no use for.
    if name == "compiled":
        from collegium.kernels.compiled import CompiledKernels

        return CompiledKernels()
    if name == "triton":
        from collegium.kernels.triton_rows import TritonKernels

        return cast(RowKernels, TritonKernels())
    return TorchKernels()
