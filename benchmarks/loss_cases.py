"""Implementations of a loss on K teachers that `benchmarks/loss.py` compares.

Shapes: N rows, V vocabulary, D width, K teachers, n rows of one block.
"""

# Peers are optional.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.distributions import Answer, HiddenRows
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import PrefixLikelihood
from collegium.fusion.weighting import RowStats
from collegium.kernels.backends import Backend
from collegium.losses.engine import default_block_size
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Head, Rows

KD_RATIO = 0.9
Step = Callable[[], float]
"""Runs one forward and backward pass, discards the gradients, returns the loss per row."""


@dataclass(frozen=True)
class Size:
    """Problem size, device and dtype of a case."""

    rows: int
    vocab: int
    width: int
    teachers: int
    device: str
    dtype: torch.dtype


class Inputs:
    """Random hidden states, heads and labels of a student and its teachers."""

    def __init__(self, size: Size) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, std: float) -> Tensor:
            value = torch.empty(shape).normal_(std=std, generator=generator)
            return value.to(size.device, size.dtype)

        # Logits with a standard deviation of 3 have entropies similar to those of real models.
        std = 3.0 / size.width**0.5
        self.hidden = draw(size.rows, size.width, std=1.0).requires_grad_()
        self.weight = draw(size.vocab, size.width, std=std).requires_grad_()
        self.teachers = [
            (draw(size.rows, size.width, std=1.0), draw(size.vocab, size.width, std=std))
            for _ in range(size.teachers)
        ]
        labels = torch.randint(size.vocab, (size.rows,), generator=generator).to(size.device)
        # Documents of 512 tokens: prefix-likelihood weights restart at each.
        index = torch.arange(size.rows, device=size.device)
        self.rows = Rows(index, labels, index // 512, index // 512)

    def backward(self, loss: Tensor) -> float:
        loss.backward()
        self.hidden.grad = self.weight.grad = None
        return float(loss.detach())


def ours(inputs: Inputs, size: Size, backend: Backend = "auto") -> Step:
    """Prefix-likelihood weights, linear pool, 0.9 forward KL + 0.1 CE, by this project."""
    objective = Objective(ObjectiveOptions(kd_ratio=KD_RATIO, backend=backend), Fusion())
    answers = [
        Answer(f"t{k}", HiddenRows(hidden, Head(weight)))
        for k, (hidden, weight) in enumerate(inputs.teachers)
    ]

    def step() -> float:
        student = HiddenRows(inputs.hidden, Head(inputs.weight))
        total = row_losses(objective, student, answers, inputs.rows).total
        return inputs.backward(total / size.rows)

    return step


def naive(inputs: Inputs, size: Size) -> Step:
    """Same as ours, with full logits in float32 and autograd."""
    rows = inputs.rows
    names = [f"t{k}" for k in range(size.teachers)]

    # Keeps log-probabilities only. With all teachers' logits too, K = 5 would take 6 GB, not 3.3.
    def target() -> Tensor:
        logps = [(hidden @ weight.T).float().log_softmax(-1) for hidden, weight in inputs.teachers]
        label_logp_KN = torch.stack([x.gather(1, rows.labels[:, None])[:, 0] for x in logps])
        stats = RowStats(label_logp_KN, label_logp_KN, label_logp_KN)
        score_KN = PrefixLikelihood().log_scores(stats, rows, names)
        weight_KN = score_KN.softmax(0).float()
        return sum(  # pyright: ignore[reportReturnType]
            w[:, None] * x.exp() for w, x in zip(weight_KN, logps, strict=True)
        )

    def step() -> float:
        with torch.no_grad():
            prob_NV = target()
        logq_NV = (inputs.hidden @ inputs.weight.T).float().log_softmax(-1)
        kl = torch.nn.functional.kl_div(logq_NV, prob_NV, reduction="sum")
        ce = torch.nn.functional.nll_loss(logq_NV, rows.labels, reduction="sum")
        return inputs.backward((KD_RATIO * kl + (1 - KD_RATIO) * ce) / size.rows)

    return step


def bound(inputs: Inputs, size: Size) -> Step:
    """Matrix products only: K teachers' heads, the student's, two backward products, in blocks."""
    # The block size of ours, whose buffers are the logits and a pool in the dtype of the losses.
    num_bytes = 2 * size.dtype.itemsize if size.teachers == 1 else size.dtype.itemsize + 4
    block = default_block_size(size.vocab, torch.device(size.device), bytes_per_logit=num_bytes)
    buffer_nV = torch.empty(block, size.vocab, device=size.device, dtype=size.dtype)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

    def step() -> float:
        dhidden_ND, dweight_VD = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, size.rows, block):
            part = slice(start, min(start + block, size.rows))
            out_nV = buffer_nV[: part.stop - part.start]
            for teacher_ND, head_VD in inputs.teachers:
                torch.mm(teacher_ND[part], head_VD.T, out=out_nV)
            torch.mm(hidden[part], weight.T, out=out_nV)
            torch.mm(out_nV, weight, out=dhidden_ND[part])
            dweight_VD.addmm_(out_nV.T, hidden[part])
        return float("nan")

    return step


def liger(inputs: Inputs, size: Size) -> Step:
    """Liger-Kernel's chunked JSD at beta 0 (forward KL) plus CE, one teacher, no weights."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    # The defaults are 0.5 and 0.5, which TRL once trained with unnoticed (huggingface/trl#5731).
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - KD_RATIO, weight_soft_loss=KD_RATIO, beta=0.0
    )
    hidden, weight = inputs.teachers[0]
    return lambda: inputs.backward(
        loss(inputs.hidden, inputs.weight, hidden, weight, inputs.rows.labels)
    )


def trl(inputs: Inputs, size: Size) -> Step:
    """Generalized JSD of TRL's GKD trainer at beta 0 on full logits: forward KL, no CE."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    hidden, weight = inputs.teachers[0]

    def step() -> float:
        with torch.no_grad():
            teacher_NV = (hidden @ weight.T)[None]
        student_NV = (inputs.hidden @ inputs.weight.T)[None]
        labels_NV = inputs.rows.labels[None]
        return inputs.backward(
            GKDTrainer.generalized_jsd_loss(student_NV, teacher_NV, labels_NV, beta=0.0)
        )

    return step


def torchtune(inputs: Inputs, size: Size) -> Step:
    """torchtune's forward KL in 8 chunks, without the entropy of the teacher, no CE."""
    from torchtune.modules.loss.kd_losses import ForwardKLWithChunkedOutputLoss

    loss, (hidden, weight) = ForwardKLWithChunkedOutputLoss(8), inputs.teachers[0]

    def step() -> float:
        with torch.no_grad():
            teacher = [(part @ weight.T)[None] for part in hidden.chunk(8)]
        student = [(part @ inputs.weight.T)[None] for part in inputs.hidden.chunk(8)]
        return inputs.backward(loss(student, teacher, inputs.rows.labels[None]))

    return step


CASES: dict[str, Callable[[Inputs, Size], Step]] = {
    "ours": ours,
    "naive": naive,
    "bound": bound,
    "liger": liger,
    "trl": trl,
    "torchtune": torchtune,
    "compiled": lambda inputs, size: ours(inputs, size, "compiled"),
}
PEERS = {"liger": "liger-kernel", "trl": "trl", "torchtune": "torchtune"}
"""Cases from other packages, by package name. They support one teacher only."""
