"""Where the time of the loss goes on a CPU: the operations that it is made of, and the choices that `docs/design/loss-engine.md` names.

    python benchmarks/loss_parts.py --save runs/benchmarks/loss_parts.md      # about 2 minutes

Nanoseconds per element of an (n, V) array; variants of one question take turns, medians over rounds. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from collegium.fusion.pooling import Fusion
from collegium.kernels import plain
from collegium.kernels.backends import kernels_for
from collegium.kernels.compiled import find_compiler
from collegium.kernels.rows import DenseTarget, RawRows, RowKernels
from collegium.train.objective import Objective, ObjectiveOptions
from collegium.types import Head, HiddenRows, Rows, TeacherRows

VOCAB, WIDTH, ROWS = 49_152, 576, 512
Variants = Mapping[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    tables = [
        table("Operations, ns per element", operations(), ROWS * VOCAB, options.rounds),
        table("Dot product of two strips", dot_products(), 4 * VOCAB, 20 * options.rounds),
        *(
            table(f"`{name}` by rows of a strip", found, ROWS * VOCAB, options.rounds)
            for name, found in strips().items()
        ),
        *(
            table(f"`{name}` by backend", found, ROWS * VOCAB, options.rounds)
            for name, found in backends().items()
        ),
        table("Whole loss, K = 2, by megabytes of a block", blocks(), ROWS * VOCAB, options.rounds),
    ]
    origin = (
        f"n = {ROWS}, V = {VOCAB:,}, D = {WIDTH}, float32; {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} "
        f"cores, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.rounds}"
    )
    text = "\n\n".join([origin, *tables]) + "\n"
    print(text)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(text, encoding="utf-8")


def table(title: str, variants: Variants, num_elements: int, rounds: int) -> str:
    """Let the variants take turns; Markdown."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            variants[name]()
            if number:
                seconds[name].append(time.perf_counter() - started)
    lines = [f"| {title} | ns |", "|---|---:|"]
    for name, found in seconds.items():
        lines.append(f"| {name} | {1e9 * statistics.median(found) / num_elements:.2f} |")
    return "\n".join(lines)


def operations() -> Variants:
    """The product of a head, and sweeps over memory and over what lies in a cache."""
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH)
    x, out = torch.randn(ROWS, VOCAB), torch.empty(ROWS, VOCAB)
    small, small_out = torch.rand(1, VOCAB), torch.empty(1, VOCAB)

    def in_cache(operation: Callable[..., object]) -> Callable[[], object]:
        return lambda: [operation(small, out=small_out) for _ in range(ROWS)]

    return {
        "product of the head": lambda: torch.mm(hidden, weight.T, out=out),
        "sum, from memory": x.sum,
        "copy, from and to memory": lambda: out.copy_(x),
        "exp of one row, in the cache": in_cache(torch.exp),
        "log of one row, in the cache": in_cache(torch.log),
    }


def dot_products() -> Variants:
    """Row by row of two strips in the cache."""
    left, right, out = torch.randn(4, VOCAB), torch.randn(4, VOCAB), torch.empty(4, VOCAB)
    return {
        "vecdot": lambda: torch.linalg.vecdot(left, right),
        "batched product": lambda: torch.bmm(left[:, None], right[:, :, None]),
        "multiply into a strip, then sum": lambda: torch.mul(left, right, out=out).sum(-1),
    }


def kernel_steps(kernels: RowKernels) -> dict[str, Callable[[], object]]:
    """Each operation of a backend on the rows of one block, the logits made anew where they are used up."""
    logits, used = torch.randn(ROWS, VOCAB) * 3, torch.empty(ROWS, VOCAB)
    pool = torch.full((ROWS, VOCAB), 1.0 / VOCAB)
    labels, share = torch.randint(VOCAB, (ROWS,)), torch.full((ROWS,), 0.5)
    rows = RawRows(logits)
    log_sum = kernels.read(rows, labels).logsumexp
    sums = torch.empty_like(pool)
    unit = kernels.add_(sums, rows, log_sum, None, is_log=False, is_last=False)
    more = {"unit_n": unit, "is_last": False}
    target, one = DenseTarget(RawRows(pool), "prob"), torch.ones(ROWS)

    def distill() -> None:
        used.copy_(logits)
        kernels.distill_(RawRows(used), target, one, one, temperature=1.0)

    return {
        "read": lambda: kernels.read(rows, labels),
        "add_, more to come": lambda: kernels.add_(
            sums, rows, log_sum, share, is_log=False, **more
        ),
        "add_, the last": lambda: kernels.add_(pool, rows, log_sum, share, is_log=False),
        "distill_, with a copy": distill,
    }


def strips() -> dict[str, Variants]:
    """The plain kernels with strips of 1 to 16 rows per thread."""
    found: dict[str, dict[str, Callable[[], object]]] = {}
    steps = kernel_steps(plain.TorchKernels())
    for rows in (1, 2, 4, 8, 16):
        for name, step in steps.items():
            found.setdefault(name, {})[f"{rows}"] = with_strips(rows, step)
    return {name: variants for name, variants in found.items()}


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
    """Strips beside what `torch.compile` makes of the same formulas."""
    names = ["torch", "compiled"] if find_compiler() else ["torch"]
    steps = {name: kernel_steps(kernels_for(name, torch.device("cpu"))) for name in names}
    return {what: {name: steps[name][what] for name in names} for what in steps["torch"]}


def blocks() -> Variants:
    """Forward and backward of the objective on two teachers."""
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCAB, WIDTH) * 0.1).requires_grad_()
    teachers = [
        TeacherRows(f"t{k}", HiddenRows(torch.randn(ROWS, WIDTH), Head(torch.randn(VOCAB, WIDTH) * 0.1)))
        for k in range(2)
    ]  # fmt: skip
    index = torch.arange(ROWS)
    rows = Rows(index, torch.randint(VOCAB, (ROWS,)), index // 128, index // 128)

    def step(megabytes: int) -> Callable[[], object]:
        objective = Objective(ObjectiveOptions(block_megabytes=megabytes), Fusion())

        def run() -> None:
            objective(HiddenRows(hidden, Head(weight)), teachers, rows).total.backward()
            hidden.grad = weight.grad = None

        return run

    return {f"{megabytes}": step(megabytes) for megabytes in (8, 32, 64, 128, 256)}


if __name__ == "__main__":
    main()
