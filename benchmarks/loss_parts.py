"""CPU time of the parts of the loss, and of the alternatives in `docs/design/loss-engine.md`.

    python benchmarks/loss_parts.py --save runs/benchmarks/loss_parts.md      # about 2 minutes

In nanoseconds per element of an (n, V) array, as medians over rounds. The variants of a table are
interleaved. Run nothing else on the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from collegium.distributions import Answer, HiddenRows
from collegium.fusion.fuse import Fusion
from collegium.kernels import plain
from collegium.kernels.backends import kernels_for
from collegium.kernels.compiled import find_compiler
from collegium.kernels.rows import DenseTarget, RawRows, RowKernels, RunningMean
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Head, Rows

# V and D of SmolLM2-135M.
VOCAB, WIDTH, ROWS = 49_152, 576, 512
Variants = Mapping[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    tables = [
        table("Operations, ns per element", operations(), ROWS * VOCAB, options.rounds),
        table("Dot product of two strips", dot_products(), 4 * VOCAB, 20 * options.rounds),
        *(
            table(f"`{name}` by rows of a strip", variants, ROWS * VOCAB, options.rounds)
            for name, variants in strips().items()
        ),
        *(
            table(f"`{name}` by backend", variants, ROWS * VOCAB, options.rounds)
            for name, variants in backends().items()
        ),
        table("Full loss, K = 2, by megabytes of a block", blocks(), ROWS * VOCAB, options.rounds),
    ]
    origin = (
        f"n = {ROWS}, V = {VOCAB:,}, D = {WIDTH}, float32; {time.strftime('%Y-%m-%d')}, "
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; medians of {options.rounds}"
    )
    text = "\n\n".join([origin, *tables]) + "\n"
    print(text)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(text, encoding="utf-8")


def table(title: str, variants: Variants, num_elements: int, rounds: int) -> str:
    """Time the variants in alternating order and format a Markdown table."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            variants[name]()
            if number:  # the first round is a warm-up
                seconds[name].append(time.perf_counter() - started)
    lines = [f"| {title} | ns |", "|---|---:|"]
    for name, times in seconds.items():
        lines.append(f"| {name} | {1e9 * statistics.median(times) / num_elements:.2f} |")
    return "\n".join(lines)


def operations() -> Variants:
    """Return a head's matrix product, and sweeps over memory and over a cached row."""
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH)
    x, out = torch.randn(ROWS, VOCAB), torch.empty(ROWS, VOCAB)
    small, small_out = torch.rand(1, VOCAB), torch.empty(1, VOCAB)

    def in_cache(operation: Callable[..., object]) -> Callable[[], object]:
        return lambda: [operation(small, out=small_out) for _ in range(ROWS)]

    return {
        "matrix product of the head": lambda: torch.mm(hidden, weight.T, out=out),
        "sum, from memory": x.sum,
        "copy, from and to memory": lambda: out.copy_(x),
        "exp of a cached row": in_cache(torch.exp),
        "log of a cached row": in_cache(torch.log),
    }


def dot_products() -> Variants:
    """Return ways to compute row-wise dot products of two cached strips."""
    # Last measured: 0.44, 6.7 and 0.28 ns per element.
    left, right, out = torch.randn(4, VOCAB), torch.randn(4, VOCAB), torch.empty(4, VOCAB)
    return {
        "vecdot": lambda: torch.linalg.vecdot(left, right),
        "batched product": lambda: torch.bmm(left[:, None], right[:, :, None]),
        "multiply into a strip, then sum": lambda: torch.mul(left, right, out=out).sum(-1),
    }


def kernel_steps(kernels: RowKernels) -> dict[str, Callable[[], object]]:
    """Return each operation of a backend on one block."""
    # `distill_` overwrites its logits, so it works on a copy. The copy is part of its time.
    logits, scratch = torch.randn(ROWS, VOCAB) * 3, torch.empty(ROWS, VOCAB)
    pool = torch.full((ROWS, VOCAB), 1.0 / VOCAB)
    share, rows = torch.full((ROWS,), 0.5), RawRows(logits)
    logsumexp, _ = kernels.read(rows)
    # Each call starts from the same unit: repeated calls would halve it until it underflows.
    first = RunningMean(torch.empty_like(pool), num_remaining=1)
    kernels.add_(first, rows, logsumexp, None)
    target, ones = DenseTarget(RawRows(pool), "prob"), torch.ones(ROWS)

    def distill() -> None:
        scratch.copy_(logits)
        kernels.distill_(RawRows(scratch), target, ones, ones)

    return {
        "read": lambda: kernels.read(rows),
        "add_, not the last member": lambda: kernels.add_(replace(first), rows, logsumexp, share),
        "add_, the last member": lambda: kernels.add_(RunningMean(pool), rows, logsumexp, share),
        "distill_, with a copy": distill,
    }


def strips() -> dict[str, Variants]:
    """Return the operations of the plain kernels with strips of 1 to 16 rows per thread."""
    variants: dict[str, dict[str, Callable[[], object]]] = {}
    steps = kernel_steps(plain.TorchKernels())
    for rows in (1, 2, 4, 8, 16):
        for name, step in steps.items():
            variants.setdefault(name, {})[f"{rows}"] = with_strips(rows, step)
    return {name: steps for name, steps in variants.items()}


def with_strips(rows: int, step: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with strip_bytes(rows * VOCAB * 4):
            step()

    return run


@contextmanager
def strip_bytes(value: int):
    before = plain.CPU_STRIP_BYTES
    plain.CPU_STRIP_BYTES = value
    try:
        yield
    finally:
        plain.CPU_STRIP_BYTES = before


def backends() -> dict[str, Variants]:
    """Return each operation by backend, with the compiled one if there is a compiler."""
    names = ["torch", "compiled"] if find_compiler() else ["torch"]
    steps = {name: kernel_steps(kernels_for(name, torch.device("cpu"))) for name in names}
    return {step: {name: steps[name][step] for name in names} for step in steps["torch"]}


def blocks() -> Variants:
    """Return forward and backward passes of the objective on two teachers by block memory."""
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCAB, WIDTH) * 0.1).requires_grad_()
    answers = [
        Answer(f"t{k}", HiddenRows(torch.randn(ROWS, WIDTH), Head(torch.randn(VOCAB, WIDTH) * 0.1)))
        for k in range(2)
    ]
    index = torch.arange(ROWS)
    rows = Rows(index, torch.randint(VOCAB, (ROWS,)), index // 128, index // 128)

    def step(megabytes: int) -> Callable[[], object]:
        objective = Objective(ObjectiveOptions(block_megabytes=megabytes), Fusion())

        def run() -> None:
            student = HiddenRows(hidden, Head(weight))
            row_losses(objective, student, answers, rows).total.backward()
            hidden.grad = weight.grad = None

        return run

    # Last measured: 85, 53, 47 and 45 ns per logit with 8, 32, 64 and 256 MB. Each block reads and
    # writes the whole gradient of the head.
    return {f"{megabytes}": step(megabytes) for megabytes in (8, 32, 64, 128, 256)}


if __name__ == "__main__":
    main()
