"""Cost and gain of float32 products under bfloat16 heads.

    python benchmarks/half_heads.py --save runs/benchmarks/half_heads.md      # about 2 minutes
    python benchmarks/half_heads.py --device cuda --rows 8192

Time of the whole loss and its gradients, with the products of heads kept in float32 and rounded to
bfloat16, interleaved, as medians over rounds; error of the gradients against float64 with teachers
close to the student. Run nothing else on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cached_training import machine
from collegium.distributions import Answer, HiddenRows
from collegium.fusion.fuse import Fusion
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Head, Rows

# V and D of SmolLM2-135M.
VOCAB, WIDTH = 49_152, 576
CLOSE = {"rows": 64, "width": 256, "vocab": 4096}
"""Small enough for float64."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--teachers", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device(options.device)
    lines = ["| K | rounded, ms | float32, ms | ratio |", "|---|---|---|---|"]
    for num_teachers in options.teachers:
        rounded, kept = times(num_teachers, options)
        ratio = statistics.median(b / a for a, b in zip(rounded, kept, strict=True))
        medians = [1e3 * statistics.median(seconds) for seconds in (rounded, kept)]
        lines.append(f"| {num_teachers} | {medians[0]:.0f} | {medians[1]:.0f} | {ratio:.2f} |")
    lines += ["", "| logits' std | rounded | float32 |", "|---|---|---|"]
    for std in (1.0, 4.0):
        with rounded_products():
            rounded = gradient_error(std)
        lines.append(f"| {std:.0f} | {rounded:.2%} | {gradient_error(std):.2%} |")
    origin = (
        f"n = {options.rows:,}, V = {VOCAB:,}, D = {WIDTH}, heads in bfloat16, medians of "
        f"{options.rounds} rounds; {date.today()}, {machine(options.device)}, "
        f"torch {torch.__version__}: `python {' '.join(sys.argv)}`"
    )
    text = "\n".join([*lines, "", origin, ""])
    print(text)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(text)


@contextmanager
def rounded_products() -> Iterator[None]:
    """Write every product of half-precision matrices in bfloat16 first, as plain modules do."""

    def add(sum_RC: Tensor, left_Rn: Tensor, right_nC: Tensor, *, beta: int = 1) -> None:
        product_RC = left_Rn.to(right_nC.dtype) @ right_nC
        if beta:
            sum_RC += product_RC
        else:
            sum_RC.copy_(product_RC)

    with (
        mock.patch("collegium.kernels.rows.add_product_", add),
        mock.patch("collegium.losses.engine.add_product_", add),
    ):
        yield


def times(num_teachers: int, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of the loss and its gradients with rounded products and with float32 products."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).bfloat16()

    head = Head((WIDTH**-0.5 * torch.randn(VOCAB, WIDTH)).bfloat16().requires_grad_())
    hidden = draw(options.rows, WIDTH).requires_grad_()
    answers = [
        Answer(
            f"t{k}", HiddenRows(draw(options.rows, WIDTH), Head(WIDTH**-0.5 * draw(VOCAB, WIDTH)))
        )
        for k in range(num_teachers)
    ]
    number = torch.arange(options.rows)
    rows = Rows(torch.randint(VOCAB, (options.rows,)), number, number, number)
    objective = Objective(ObjectiveOptions(), Fusion())

    def measure() -> float:
        hidden.grad = head.weight.grad = None
        start = time.perf_counter()
        row_losses(objective, HiddenRows(hidden, head), answers, rows).total.backward()
        if options.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    rounded, kept = [], []
    for turn in range(options.rounds + 1):
        with rounded_products():
            first = measure()
        second = measure()
        if turn > 0:
            rounded.append(first)
            kept.append(second)
    return rounded, kept


def gradient_error(std: float) -> float:
    """Largest relative error of a gradient of KL(teacher | student), against float64."""
    torch.manual_seed(0)
    draw = torch.randn

    n, width, vocab = CLOSE["rows"], CLOSE["width"], CLOSE["vocab"]
    hidden, weight = draw(n, width), std * width**-0.5 * draw(vocab, width)
    theirs = [hidden.bfloat16(), weight.bfloat16()]
    moved = hidden + 0.05 * draw(n, width), weight + 0.05 * std * width**-0.5 * draw(vocab, width)
    ours = [x.bfloat16().requires_grad_() for x in moved]
    exact = [x.detach().double().requires_grad_() for x in ours]
    logp = (theirs[0].double() @ theirs[1].double().T).log_softmax(-1)
    (logp.exp() * (logp - (exact[0] @ exact[1].T).log_softmax(-1))).sum().backward()
    number = torch.arange(n)
    answer = Answer("t", HiddenRows(theirs[0], Head(theirs[1])))
    rows = Rows(number, number, number, number)
    objective = Objective(ObjectiveOptions(kd_ratio=1.0), Fusion())
    row_losses(objective, HiddenRows(ours[0], Head(ours[1])), [answer], rows).total.backward()
    pairs: Any = zip(ours, exact, strict=True)
    errors = [(x.grad - y.grad).norm() / y.grad.norm() for x, y in pairs]
    return float(max(errors))


if __name__ == "__main__":
    main()
