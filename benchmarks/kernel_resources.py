"""Registers, spills and occupancy of the Triton kernels, compiled without a GPU.

    python benchmarks/kernel_resources.py           # sm_80, sm_90 and sm_100, about a minute
    python benchmarks/kernel_resources.py --capabilities 90 --dtypes bfloat16

Each kernel is compiled as `TritonKernels` calls it, for every kind of target. The resource usage is
read from the machine code. A multiprocessor has 65,536 registers and room for 64 warps. Registers
are allocated per thread in multiples of 8.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read at the import of Triton

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from collegium.kernels.rows import ROW_BYTES, DenseTarget, LogSumExp, RawRows, RunningMean
from collegium.kernels.triton_rows import TritonKernels

REGISTERS, WARPS, PROGRAMS = 65_536, 64, 32
"""Limits of one multiprocessor."""
# Output of `cuobjdump -res-usage`, and loads in PTX such as `ld.global.v4.b32`.
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
LOAD = re.compile(r"ld\.global(?:\.v(\d))?\.b(\d+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "float64"])
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--save", type=Path, default=Path("runs/benchmarks/kernel_resources.md"))
    options = parser.parse_args()
    lines = [
        f"V = {options.vocab:,}; {time.strftime('%Y-%m-%d')}, Triton {triton.__version__}, "
        f"torch {torch.__version__}",
        "",
        "| device | dtype | kernel | warps | registers | bytes spilled | resident warps | "
        "widest load |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for capability in options.capabilities:
        for dtype in options.dtypes:
            with compiled_for(capability) as kernels:
                call_all(aligned(options.vocab, getattr(torch, dtype)))
            lines += [f"| sm_{capability} | {dtype} | {row(*kernel)} |" for kernel in kernels]
    text = "\n".join(lines) + "\n"
    print(text)
    options.save.parent.mkdir(parents=True, exist_ok=True)
    options.save.write_text(text, encoding="utf-8")


class Device:
    """Stub of a Triton driver with the methods that compilation needs."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by device index.
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def compiled_for(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Compile kernels instead of launching them, and collect them by name."""
    kernels: list[tuple[str, Any]] = []
    run = JITFunction.run

    # The interpreter accepts anything that Python runs; compilation finds the rest.
    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kinds = {0: "labels only", 1: "logits", 2: "log P", 3: "P"}
        variant = [kinds[kwargs["kind"]]] if "kind" in kwargs else []
        variant += [name for name in ("has_share", "is_log") if kwargs.get(name)]
        if kwargs.get("temperature", 1.0) != 1.0:
            variant.append("T")
        if kwargs["head"][1]:
            variant.append("capped")
        name = self.__name__.strip("_").removesuffix("_kernel")
        kernel = run(self, *args, warmup=True, **kwargs)
        kernels.append((f"{name} ({', '.join(variant)})" if variant else name, kernel))

    JITFunction.run = compile_only
    driver.set_active(Device(capability))  # pyright: ignore[reportArgumentType]
    try:
        yield kernels
    finally:
        JITFunction.run = run


def aligned(vocab_size: int, dtype: torch.dtype) -> RawRows:
    """Return one row with the alignment that a `Workspace` gives it on a GPU."""
    unit = ROW_BYTES // dtype.itemsize
    values_nV = torch.zeros(1, -(-vocab_size // unit) * unit, dtype=dtype)
    return RawRows(values_nV[:, :vocab_size])


def call_all(rows: RawRows) -> None:
    """Call every kernel with every constant that changes its code."""
    kernels, (num_rows, vocab_size) = TritonKernels(), rows.values_nV.shape
    ones_n = torch.ones(num_rows, dtype=rows.dtype)
    logsumexp = LogSumExp(ones_n, ones_n)
    pool_nV = aligned(vocab_size, rows.dtype).values_nV
    capped = RawRows(rows.values_nV, 1.0, 30.0)
    for raw in (rows, capped):
        kernels.read(raw)
        for is_log in (False, True):
            kernels.add_(RunningMean(pool_nV, is_log), raw, logsumexp, None)
            kernels.add_(RunningMean(pool_nV, is_log), raw, logsumexp, ones_n)
        kernels.softmax_(raw, logsumexp, ones_n)
        kernels.distill_(raw, None, ones_n, ones_n)
        # A temperature is a constant of the code, and only 1 saves the second sum.
        for temperature in (1.0, 2.0):
            for target in (
                DenseTarget(raw, "logits", logsumexp, temperature),
                DenseTarget(RawRows(pool_nV), "logp", None, temperature),
                DenseTarget(RawRows(pool_nV), "prob", None, temperature),
            ):
                kernels.distill_(raw, target, ones_n, ones_n)


def row(name: str, kernel: Any) -> str:
    """Format the kernel's columns of the table."""
    registers, spilled = usage(kernel)
    warps = kernel.metadata.num_warps
    allocated = -(-registers // 8) * 8 * 32 * warps
    programs = min(REGISTERS // allocated, WARPS // warps, PROGRAMS)
    return (
        f"{name} | {warps} | {registers} | {spilled} | {programs * warps} | {widest_load(kernel)}"
    )


def usage(kernel: Any) -> tuple[int, int]:
    """Return the registers and the spilled bytes per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path  # pyright: ignore[reportAttributeAccessIssue]
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    match = USAGE.search(done.stdout)
    assert match is not None, done.stdout
    registers, stack, _, local = (int(number) for number in match.groups())
    return registers, stack + local


def widest_load(kernel: Any) -> int:
    """Return the bytes of a thread's widest load. 16 is the maximum, 2 is a single bfloat16."""
    return max(int(n or 1) * int(bits) // 8 for n, bits in LOAD.findall(kernel.asm["ptx"]))


if __name__ == "__main__":
    main()
