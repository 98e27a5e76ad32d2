"""Loss engine from hidden states of K teachers to gradients, against float64 formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import reference_losses
from collegium.distributions import Answer, HiddenRows, NamedRows
from collegium.fusion.fitted import Fixed
from collegium.fusion.fuse import Fusion
from collegium.fusion.options import to_recipe
from collegium.fusion.rules import Entropy, PrefixLikelihood
from collegium.kernels.compiled import find_compiler
from collegium.kernels.plain import TorchKernels
from collegium.kernels.rows import RawRows
from collegium.losses.divergences import DIVERGENCES
from collegium.losses.terms import BlockLosses
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Head, Rows
from kernel_cases import HAS_TRITON, device_of

# torch.compile itself uses deprecated functions of torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
# PAD: heads are often padded. Qwen 2.5 has 151,936 rows for 151,665 tokens.
N, V, D, PAD = 13, 29, 6, 3
NAMES = ["a", "b", "c"]
WEIGHTINGS = [
    Entropy(tau=0.5),
    Fixed(weights={"a": 0.2, "b": 0.5, "c": 0.3}),
    PrefixLikelihood(eta=0.4, decay=0.8),
]
DOCUMENTS = [0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3]
PARTS = {"kd": 1.0, "both": 0.7, "ce": 0.0}
BOUND = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}
BACKENDS: list[Any] = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton")),
    pytest.param(
        "compiled",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"),
        ],
    ),
]


@pytest.fixture(autouse=True)
def _aligned_rows(request: Any, monkeypatch: Any) -> None:
    """For Triton, use buffers with gaps between the rows and rows longer than a tile."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "triton":
        monkeypatch.setattr(
            "collegium.kernels.rows.row_alignment", lambda like: 32 // like.element_size()
        )
        monkeypatch.setattr("collegium.kernels.triton_rows.MAX_TILE", 16)


class Problem:
    """Student, teachers with padded heads and labels, on one device and in one dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device, **head: Any) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        self.hidden, self.table = draw(N, D), draw(V + PAD, D)
        self.bias = draw(V)
        self.trained = [x.requires_grad_() for x in (self.hidden, self.table, self.bias)]
        self.heads = [(draw(N, D), draw(V + PAD, D)) for _ in NAMES]
        self.labels = torch.randint(V, (N,), generator=generator).to(device)
        self.head = head

    def student(self) -> HiddenRows:
        return HiddenRows(self.hidden, Head(self.table[:V], self.bias, **self.head))

    def teachers(self) -> list[Answer]:
        return [
            Answer(name, HiddenRows(hidden, Head(table[:V], **self.head)))
            for name, (hidden, table) in zip(NAMES, self.heads, strict=True)
        ]

    def rows(self) -> Rows:
        numbers = torch.tensor(DOCUMENTS, device=self.labels.device)
        return Rows(torch.arange(N, device=numbers.device), self.labels, numbers, numbers)

    def loss(self, fusion: Fusion, **options: Any) -> Tensor:
        objective = Objective(ObjectiveOptions(**options), fusion)
        return row_losses(objective, self.student(), self.teachers(), self.rows()).total

    def grads(self, total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, self.trained, allow_unused=True))

    def truth(self, fusion: Fusion, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """Compute the same in float64 on a CPU, with full logits and plain autograd."""
        logps = []
        for hidden, table in self.heads:
            z = reference_losses.logits(wide(hidden), wide(table)[:V], **self.head)
            logps.append(z.log_softmax(-1).tolist())
        labels = self.labels.tolist()
        target, _ = reference.fuse(to_recipe(fusion), logps, labels, DOCUMENTS, NAMES)
        trained = [wide(x).requires_grad_() for x in self.trained]
        z = reference_losses.logits(trained[0], trained[1][:V], trained[2], **self.head)
        total = reference_losses.objective(
            z,
            torch.tensor(target, dtype=torch.float64).exp(),
            labels,
            kd_ratio=options.get("kd_ratio", 0.9),
            temperature=options.get("temperature", 1.0),
            divergence=options.get("name", "forward_kl"),
        )
        return total, list(torch.autograd.grad(total, trained))


def wide(x: Tensor) -> Tensor:
    return x.detach().cpu().double().clone()


def agree(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for ours, truth in zip(actual, expected, strict=True):
        ours = ours.detach().cpu().double()
        truth = truth.detach()
        assert (ours - truth).abs().max() <= BOUND[dtype] * max(1e-3, float(truth.abs().max())) * 3
        cosine = torch.nn.functional.cosine_similarity(ours.flatten(), truth.flatten(), dim=0)
        assert cosine > 0.9999


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("pool", ["linear", "log_linear"])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: type(w).__name__)
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_form_matches_float64(backend, dtype, weighting, pool, part):
    problem, kd_ratio = Problem(dtype, device_of(backend)), PARTS[part]
    fusion = Fusion(weighting=weighting, pool=pool)
    # 5 does not divide N, so the last block is smaller.
    total = problem.loss(fusion, kd_ratio=kd_ratio, backend=backend, block_size=5)
    truth, grads = problem.truth(fusion, kd_ratio=kd_ratio)
    torch.testing.assert_close(wide(total), truth.detach(), rtol=BOUND[dtype], atol=BOUND[dtype])
    agree(problem.grads(total), grads, dtype)


def named_target(problem: Problem, *, has_tail: bool) -> NamedRows:
    """Draw a target of one to five tokens per row, with the remaining mass as a tail or none."""
    generator = torch.Generator().manual_seed(3)
    sizes = [1 + t % 5 for t in range(N)]
    ids = torch.cat([torch.randperm(V, generator=generator)[:size] for size in sizes])
    parts = [torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 for size in sizes]
    kept = 0.7 if has_tail else 1.0
    logp = torch.cat([(kept * part / part.sum()).log() for part in parts])
    tail = torch.full((N,), 1 - kept, dtype=torch.float64).log() if has_tail else None
    starts = torch.tensor([0, *sizes]).cumsum(0)
    return NamedRows(starts, ids, logp.float(), None if tail is None else tail.float(), V).to(
        problem.labels.device
    )


NAMED_CASES = [
    *[("forward_kl", part, has_tail) for part in PARTS for has_tail in (False, True)],
    *[
        (name, "both", True)
        for name, option in DIVERGENCES.items()
        if not option.allows_draws and not option.needs_all_tokens
    ],
]


@pytest.mark.parametrize("head", [{}, {"scale": 2.0, "softcap": 3.0}], ids=["plain", "capped"])
@pytest.mark.parametrize(("name", "part", "has_tail"), NAMED_CASES)
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_named_targets(backend, dtype, name, part, has_tail, head):
    """On the named tokens and one tail, against autograd in float64."""
    problem, kd_ratio = Problem(dtype, device_of(backend), **head), PARTS[part]
    target = named_target(problem, has_tail=has_tail)
    options = ObjectiveOptions(
        kd_ratio=kd_ratio, backend=backend, block_size=5, divergence=DIVERGENCES[name]()
    )
    objective, answers = Objective(options, Fusion()), [Answer("cache", target)]
    loss = row_losses(objective, problem.student(), answers, problem.rows())
    with torch.inference_mode():
        evaluated = row_losses(objective, problem.student(), answers, problem.rows())
    assert evaluated.terms == loss.terms
    trained = [wide(x).requires_grad_() for x in problem.trained]
    z = reference_losses.logits(trained[0], trained[1][:V], trained[2], **head)
    truth = torch.zeros((), dtype=torch.float64)
    for t in range(N):
        logq = z[t].log_softmax(-1)
        entries = slice(int(target.starts[t]), int(target.starts[t + 1]))
        p, q = wide(target.logp[entries]).exp(), logq[target.ids[entries].cpu()].exp()
        if target.log_tail is not None:
            p = torch.cat([p, wide(target.log_tail[t : t + 1]).exp()])
            q = torch.cat([q, 1 - q.sum()[None]])
        kd = reference_losses.DIVERGENCES[name](p, q)
        truth = truth + kd_ratio * kd - (1 - kd_ratio) * logq[problem.labels[t]]
    grads = torch.autograd.grad(truth, trained)
    bound = max(BOUND[dtype], 1e-7)  # targets are float32
    torch.testing.assert_close(wide(loss.total), truth.detach(), rtol=bound, atol=bound)
    bound = dtype if dtype is not torch.float64 else torch.float32
    agree(problem.grads(loss.total), list(grads), bound)


@pytest.mark.parametrize("name", list(DIVERGENCES))
@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_every_divergence(backend, dtype, pool, name):
    if backend == "triton" and dtype is not torch.float32:
        pytest.skip("the arithmetic is covered by the kernel tests")
    problem, fusion = Problem(dtype, device_of(backend)), Fusion(pool=pool)
    divergence = DIVERGENCES[name]()
    total = problem.loss(fusion, divergence=divergence, backend=backend, block_size=6)
    truth, grads = problem.truth(fusion, name=name)
    torch.testing.assert_close(wide(total), truth.detach(), rtol=BOUND[dtype], atol=BOUND[dtype])
    agree(problem.grads(total), grads, dtype)


@pytest.mark.parametrize("head", [{"scale": 0.3}, {"softcap": 4.0}, {"scale": 2.0, "softcap": 3.0}])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_heads_and_temperatures(backend, temperature, head):
    problem = Problem(torch.float32, device_of(backend), **head)
    total = problem.loss(Fusion(), temperature=temperature, backend=backend)
    truth, grads = problem.truth(Fusion(), temperature=temperature)
    torch.testing.assert_close(wide(total), truth.detach(), rtol=1e-5, atol=1e-5)
    agree(problem.grads(total), grads, torch.float32)


@pytest.mark.parametrize("pool", ["linear", "log_linear"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_result_does_not_depend_on_block_size(pool, temperature):
    problem, fusion = Problem(torch.float64, torch.device("cpu")), Fusion(pool=pool)
    totals = [
        problem.loss(fusion, temperature=temperature, block_size=size) for size in (1, 4, N, None)
    ]
    grads = [problem.grads(total) for total in totals]
    for total, others in zip(totals[1:], grads[1:], strict=True):
        torch.testing.assert_close(total, totals[0], rtol=1e-12, atol=1e-12)
        for grad, expected in zip(others, grads[0], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    problem = Problem(torch.float64, torch.device("cpu"), softcap=5.0)

    def total(hidden, table, bias):
        student = HiddenRows(hidden, Head(table[:V], bias, softcap=5.0))
        options = ObjectiveOptions(block_size=4, temperature=1.5)
        objective = Objective(options, Fusion())
        return row_losses(objective, student, problem.teachers(), problem.rows()).total

    assert torch.autograd.gradcheck(total, problem.trained)


# A fused path with a wrong loss shows here first: huggingface/trl#5731 gave about 6 instead of 0.
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_self_distillation_has_zero_loss_and_gradient(backend, temperature):
    problem = Problem(torch.float32, device_of(backend))
    own = HiddenRows(problem.hidden.detach(), Head(problem.table.detach()[:V], problem.bias))
    own = dataclasses.replace(own, head=dataclasses.replace(own.head, bias=problem.bias.detach()))
    objective = Objective(
        ObjectiveOptions(kd_ratio=1.0, temperature=temperature, backend=backend), Fusion()
    )
    total = row_losses(objective, problem.student(), [Answer("a", own)], problem.rows()).total
    assert total.detach().abs() < 1e-4 * max(1.0, temperature**2)
    for grad in problem.grads(total):
        assert grad.abs().max() < 1e-4 * max(1.0, 1 / temperature, temperature)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 20.0])
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_extreme_temperatures_stay_finite(backend, temperature):
    problem = Problem(torch.float32, device_of(backend))
    # At T = 0.05 these logits exceed the range of exp in float32 many times over.
    with torch.no_grad():
        problem.heads[0][1][4] = 0.0
        problem.table.mul_(30.0)
    total = problem.loss(Fusion(), temperature=temperature, backend=backend)
    assert total.isfinite()
    assert all(grad.isfinite().all() for grad in problem.grads(total))


def test_lora_on_the_head_gets_gradients_through_a_frozen_head():
    """LoRA: W = W_0 + s B A, with W_0 frozen."""
    problem = Problem(torch.float64, torch.device("cpu"))
    base = problem.table.detach()[:V]
    a = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    b = torch.randn(V, 2, dtype=torch.float64, requires_grad=True)
    student = HiddenRows(problem.hidden, Head(base + 0.5 * (b @ a)))
    objective = Objective(ObjectiveOptions(), Fusion())
    ours = row_losses(objective, student, problem.teachers(), problem.rows())
    merged = (base + 0.5 * (b @ a)).detach().requires_grad_()
    whole = HiddenRows(problem.hidden, Head(merged))
    plain = row_losses(objective, whole, problem.teachers(), problem.rows())
    dmerged = torch.autograd.grad(plain.total, merged)[0]
    da, db = torch.autograd.grad(ours.total, (a, b))
    torch.testing.assert_close(da, 0.5 * b.detach().T @ dmerged)
    torch.testing.assert_close(db, 0.5 * dmerged @ a.detach().T)


def test_zero_rows_give_a_zero_loss_with_a_graph():
    problem = Problem(torch.float32, torch.device("cpu"))
    student = HiddenRows(problem.hidden[:0], Head(problem.table[:V]))
    teachers = [
        Answer(t.name, HiddenRows(t.distribution.hidden[:0], t.distribution.head))
        for t in problem.teachers()
    ]
    total = row_losses(
        Objective(ObjectiveOptions(), Fusion()), student, teachers, problem.rows().part(slice(0, 0))
    ).total
    assert total.item() == 0
    total.backward()
    assert (problem.table.grad == 0).all()


def test_block_buffers_do_not_depend_on_the_number_of_teachers():
    """The engine keeps two buffers of the size of a block: the pool and the logits."""
    problem = Problem(torch.float32, torch.device("cpu"))
    for names in (NAMES[:1], NAMES):
        objective = Objective(ObjectiveOptions(block_size=5), Fusion())
        teachers = [t for t in problem.teachers() if t.name in names]
        row_losses(objective, problem.student(), teachers, problem.rows())
        sizes = {k: b.numel() for k, b in objective.workspace._buffers.items()}
        assert sizes == {"pool": 4 * 5 * V, "logits": 4 * 5 * V}


def test_each_term_has_its_own_factor_per_row() -> None:
    """f_n CE_n, in value and gradient: of rows that a term leaves out, nothing is left."""
    generator = torch.Generator().manual_seed(0)
    logits_nV = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    labels_n, factor_n = torch.tensor([1, 5, 0, 8]), torch.tensor([0.0, 1.0, 0.25, 0.0])
    losses = BlockLosses(labels_n, None, TorchKernels(), {}, {"ce": factor_n.double()})
    z_nV = logits_nV.clone().requires_grad_()
    loss_n = torch.nn.functional.cross_entropy(z_nV, labels_n, reduction="none")
    (0.7 * factor_n * loss_n).sum().backward()
    terms, gradient_nV = losses.terms_(RawRows(logits_nV.clone()), {"ce": 0.7})
    assert torch.allclose(terms["ce"], factor_n * loss_n.detach())
    assert torch.allclose(gradient_nV, z_nV.grad)
