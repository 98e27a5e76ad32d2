"""The Triton kernels on a device at the vocabularies of real models: bfloat16 in, against float64."""

import pytest
import torch

from collegium.kernels.backends import kernels_for
from collegium.kernels.rows import DenseTarget, RawRows

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
    assert kernels.name == "triton"
    generator = torch.Generator(device).manual_seed(0)
    values = [3 * torch.randn(N, vocab_size, device=device, generator=generator) for _ in range(3)]
    one, two, student = (RawRows(value.to(dtype)) for value in values)
    labels_n = torch.randint(vocab_size, (N,), device=device, generator=generator)
    share_n = torch.rand(N, device=device, generator=generator)
    logp = [rows.values_nV.double().log_softmax(-1) for rows in (one, two, student)]
    pool_nV = torch.empty(N, vocab_size, device=device)
    for rows, truth, share in ((one, logp[0], None), (two, logp[1], share_n)):
        reading = kernels.read(rows, labels_n)
        entropy_n = -(truth.exp() * truth).sum(-1)
        torch.testing.assert_close(reading.entropy_n.double(), entropy_n, rtol=1e-5, atol=1e-5)
        kernels.add_(pool_nV, rows, reading.log_sum, share, is_log=False)
    p = (1 - share_n)[:, None] * logp[0].exp() + share_n[:, None] * logp[1].exp()
    torch.testing.assert_close(pool_nV.double(), p, rtol=1e-4, atol=1e-9)
    one_n = torch.ones(N, device=device)
    target = DenseTarget(RawRows(pool_nV), "prob")
    _, kl_n = kernels.distill_(student, target, 0.9 * one_n, 0.1 * one_n, temperature=1.0)
    kl = (p * (p.log() - logp[2])).sum(-1)
    torch.testing.assert_close(kl_n.double(), kl, rtol=1e-5, atol=1e-5)
    expected = logp[2].exp() - 0.9 * p
    cosine = torch.cosine_similarity(student.values_nV.double(), expected, dim=-1)
    assert (cosine > 0.9999).all()
