"""Triton kernels compile for GPUs that are not present, with few registers and wide loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_cases import HAS_TRITON

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("vocab_size", [128_256, 50_257])
def test_kernels_compile_without_a_gpu(vocab_size: int, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--capabilities", "90", "--dtypes", "bfloat16"]
    command += ["--vocab", str(vocab_size), "--save", tmp_path / "table.md"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        line.strip("| ").split(" | ")
        for line in (tmp_path / "table.md").read_text().splitlines()
        if line.startswith("| sm_90 ")
    ]
    # Two heads x (read, four kinds of pooling, softmax, labels, three targets at two temperatures).
    assert len({row[2] for row in rows}) == len(rows) == 2 * (1 + 4 + 1 + 1 + 6)
    for _, _, name, warps, registers, spilled, resident, widest_load in rows:
        assert (int(warps), int(widest_load)) == (16, 16), name
        assert 16 <= int(registers) <= 64, name
        assert int(spilled) <= 16, name  # a handful of registers in a rare variant
        assert int(resident) >= 32, name
