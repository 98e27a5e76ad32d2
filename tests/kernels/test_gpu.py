"""Triton kernels on a GPU with the vocabulary sizes of real models, against float64."""

import pytest
import torch

from collegium.distributions import Answer, HiddenRows
from collegium.fusion.fitted import Fixed
from collegium.fusion.fuse import Fusion
from collegium.kernels.backends import kernels_for
from collegium.kernels.rows import DenseTarget, RawRows, RunningMean, add_product_
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Head, Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
N = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 262_144])
def test_two_teachers_and_a_student(vocab_size, dtype):
    device = torch.device("cuda")
    kernels = kernels_for("auto", device)
    assert type(kernels).__name__ == "TritonKernels"
    generator = torch.Generator(device).manual_seed(0)
    values = [3 * torch.randn(N, vocab_size, device=device, generator=generator) for _ in range(3)]
    first, second, student = (RawRows(value.to(dtype)) for value in values)
    share_n = torch.rand(N, device=device, generator=generator)
    logp = [rows.values_nV.double().log_softmax(-1) for rows in (first, second, student)]
    pool_nV = torch.empty(N, vocab_size, device=device)
    for rows, truth, share in ((first, logp[0], None), (second, logp[1], share_n)):
        logsumexp, entropy_n = kernels.read(rows)
        expected_n = -(truth.exp() * truth).sum(-1)
        torch.testing.assert_close(entropy_n.double(), expected_n, rtol=1e-5, atol=1e-5)
        kernels.add_(RunningMean(pool_nV), rows, logsumexp, share)
    p = (1 - share_n)[:, None] * logp[0].exp() + share_n[:, None] * logp[1].exp()
    torch.testing.assert_close(pool_nV.double(), p, rtol=1e-4, atol=1e-9)
    ones_n = torch.ones(N, device=device)
    target = DenseTarget(RawRows(pool_nV), "prob")
    _, kl_n = kernels.distill_(student, target, 0.9 * ones_n, 0.1 * ones_n)
    kl = (p * (p.log() - logp[2])).sum(-1)
    torch.testing.assert_close(kl_n.double(), kl, rtol=1e-5, atol=1e-5)
    expected = logp[2].exp() - 0.9 * p
    cosine = torch.cosine_similarity(student.values_nV.double(), expected, dim=-1)
    assert (cosine > 0.9999).all()


def test_half_products_are_added_in_float32_without_a_temporary():
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    draw = [torch.randn(*s, device=device, generator=generator) for s in ((N, 128_256), (N, 1024))]
    left_nR, right_nC = (x.bfloat16() for x in draw)
    sum_RC = torch.ones(128_256, 1024, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    add_product_(sum_RC, left_nR.T, right_nC)
    growth = torch.cuda.max_memory_allocated() - before
    # A temporary in bfloat16 would take half of the sum; cuBLAS has a workspace of some megabytes.
    assert growth < sum_RC.nbytes / 4
    exact = 1 + left_nR.T.double() @ right_nC.double()
    torch.testing.assert_close(sum_RC.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 262_144])
def test_objective_in_bfloat16(vocab_size):
    device, width = torch.device("cuda"), 64
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape, std=1.0):
        value = std * torch.randn(*shape, device=device, generator=generator)
        return value.bfloat16()

    heads = [(draw(N, width), draw(vocab_size, width, std=0.3)) for _ in range(3)]
    number = torch.arange(N, device=device)
    rows = Rows(number, 31 * number, number // 8, number // 8)
    fusion = Fusion(weighting=Fixed(weights={"t0": 0.3, "t1": 0.7}))
    teachers = [
        Answer(f"t{k}", HiddenRows(hidden, Head(weight)))
        for k, (hidden, weight) in enumerate(heads[:2])
    ]
    student = [x.requires_grad_() for x in heads[2]]
    objective = Objective(ObjectiveOptions(block_size=6), fusion)
    states = HiddenRows(student[0], Head(student[1]))
    total = row_losses(objective, states, teachers, rows).total / N
    grads = torch.autograd.grad(total, student)
    logp = [(x.double() @ w.double().T).log_softmax(-1) for x, w in heads[:2]]
    p = 0.3 * logp[0].exp() + 0.7 * logp[1].exp()
    logits = (heads[2][0].double() @ heads[2][1].double().T).detach().requires_grad_()
    logq = logits.log_softmax(-1)
    kl = (p * (p.log() - logq)).sum(-1)
    ce = -logq.gather(1, rows.labels[:, None])[:, 0]
    expected = (0.9 * kl + 0.1 * ce).mean()
    (dlogits,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)
    exact = (dlogits @ student[1].double(), dlogits.T @ student[0].double())
    for ours, theirs in zip(grads, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 3e-3 * theirs.norm()
