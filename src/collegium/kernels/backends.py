"""Selection of the kernel backend of a run."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal

from collegium.errors import RecipeError
from collegium.kernels.plain import TorchKernels
from collegium.kernels.rows import RowKernels
from collegium.options import torch

Backend = Literal["auto", "torch", "compiled", "triton"]


@cache
def kernels_for(backend: Backend, device: torch.device) -> RowKernels:
    """Return the kernels of a backend for a device.

    `auto` is `triton` on CUDA if Triton is installed, else `torch`.

    Raises:
        RecipeError: the backend cannot run here.
    """
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and find_spec("triton") else "torch"
    require_backend(backend, device.type)
    # Lazy imports: `compiled` needs a compiler, and Triton is not installed on CPU-only machines.
    if backend == "compiled":
        from collegium.kernels.compiled import CompiledKernels

        return CompiledKernels()
    if backend == "triton":
        from collegium.kernels.triton_rows import TritonKernels

        return TritonKernels()
    return TorchKernels()


def require_backend(backend: Backend, device_type: str | None = None) -> None:
    """Check that a backend can run here, and on `device_type` if it is given.

    Raises:
        RecipeError: no compiler, no Triton, or the wrong type of device.
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
        if device_type in (None, "cuda"):
            return
        import triton  # pyright: ignore[reportMissingImports]

        # The interpreter runs the same kernels on a CPU; the tests rely on it.
        if not triton.knobs.runtime.interpret:  # pyright: ignore[reportAttributeAccessIssue]
            raise RecipeError(f"{where} on {device_type}; must be on CUDA; use auto")
