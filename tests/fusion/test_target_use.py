"""Targets in the form in which an objective reads them: softened, and far below e^-87."""

from __future__ import annotations

import pytest
import torch

import reference
from collegium.distributions import HiddenRows
from collegium.fusion.conflict import TargetCorrection
from collegium.fusion.fitted import Route
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.rules import ConfidenceAware, MinCE, Uniform
from collegium.losses.divergences import DIVERGENCES
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Head
from fusion_cases import NAMES, make_rows, make_teachers

N, V = 5, 300


def loss_and_gradient(logits_KNV, fusion=None, *, student_NV=None, **options):
    """The summed divergence of a student with these logits, and its gradient at them."""
    generator = torch.Generator().manual_seed(5)
    student_NV = torch.randn(N, V, generator=generator) if student_NV is None else student_NV
    student_NV = student_NV.to(logits_KNV.dtype, copy=True).requires_grad_()
    vocab_size = student_NV.shape[1]
    head = Head(torch.eye(vocab_size, dtype=logits_KNV.dtype))
    objective = Objective(
        ObjectiveOptions(kd_ratio=1.0, block_size=2, **options),
        fusion or Fusion(weighting=Uniform()),
    )
    rows = make_rows(torch.arange(len(student_NV)) % vocab_size, [0] * len(student_NV))
    loss = row_losses(objective, HiddenRows(student_NV, head), make_teachers(logits_KNV), rows)
    return loss.total.detach(), torch.autograd.grad(loss.total, student_NV)[0]


@pytest.mark.parametrize("num_teachers", [2, 3])
@pytest.mark.parametrize("std", [3.0, 20.0, 40.0, 200.0])
@pytest.mark.parametrize(
    ("divergence", "temperature"),
    [*((name, 1.0) for name in DIVERGENCES), ("forward_kl", 2.0), ("forward_kl", 8.0)],
)
def test_identical_teachers_are_one(divergence, temperature, std, num_teachers):
    generator = torch.Generator().manual_seed(3)
    logits_NV = std * torch.randn(N, V, generator=generator)
    options = {"divergence": DIVERGENCES[divergence](), "temperature": temperature}
    one = loss_and_gradient(logits_NV[None], **options)
    several = loss_and_gradient(logits_NV.expand(num_teachers, N, V), **options)
    for value, expected in zip(several, one, strict=True):
        torch.testing.assert_close(
            value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize("pooled_temperature", [1.0, 4.0])
@pytest.mark.parametrize("std", [3.0, 60.0])
def test_float32_pool_equals_float64(std, pooled_temperature):
    logits_KNV = std * torch.randn(3, N, V, generator=torch.Generator().manual_seed(3))
    fusion = Fusion(weighting=Uniform(), pooled_temperature=pooled_temperature)
    rows = make_rows(torch.zeros(N, dtype=torch.long), [0] * N)
    logps = []
    for logits in (logits_KNV, logits_KNV.double()):
        target = fuse(fusion, make_teachers(logits), rows)
        logps.append(torch.cat([target.block(slice(at, at + 1)).logp() for at in range(N)]))
    torch.testing.assert_close(logps[0].double(), logps[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("is_routed", [False, True])
def test_correction_holds_at_the_temperature_of_the_objective(is_routed, temperature, divergence):
    logits_KNV = 2 * torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)).double()
    student_NV = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()
    margin = 0.2
    weighting = Route(default=NAMES[0]) if is_routed else Uniform()
    fusion = Fusion(weighting=weighting, conflict=TargetCorrection(margin=margin))
    value, _ = loss_and_gradient(
        logits_KNV,
        fusion,
        student_NV=student_NV,
        temperature=temperature,
        divergence=DIVERGENCES[divergence](),
    )
    members = logits_KNV[:1] if is_routed else logits_KNV
    expected = 0.0
    for t in range(4):
        logp = members[:, t].log_softmax(-1).logsumexp(0)
        softened = reference.log_softmax(logp.tolist(), temperature)
        target = torch.tensor(reference.corrected(softened, t, margin), dtype=torch.float64)
        others = [p for v, p in enumerate(target.exp()) if v != t]
        assert target[t].exp() >= max(others) + margin - 1e-9 or t == int(target.argmax())
        logq = (student_NV[t] / temperature).log_softmax(-1)
        p, q = (target, logq) if divergence == "forward_kl" else (logq, target)
        expected += temperature**2 * float((p.exp() * (p - q)).sum())
    assert float(value) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["fusellm_mince", "ca_mkd"])
def test_label_aware_baselines_train_on_the_target_of_their_papers(name):
    """Value and gradient of FuseLLM's MinCE and of CA-MKD by their formulas, row by row."""
    logits_KNV = 2 * torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(4)).double()
    student_NV = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()
    rule = MinCE() if name == "fusellm_mince" else ConfidenceAware()
    value, gradient_NV = loss_and_gradient(
        logits_KNV, Fusion(weighting=rule), student_NV=student_NV
    )
    probs_KNV = logits_KNV.softmax(-1)
    ce = [[-float(probs_KNV[k, n, n].log()) for n in range(4)] for k in range(3)]
    best = min(range(3), key=lambda k: sum(ce[k]))
    expected = 0.0
    for n in range(4):
        total = sum(torch.tensor(ce[k][n]).exp().item() for k in range(3))
        weights = [(1 - torch.tensor(ce[k][n]).exp().item() / total) / 2 for k in range(3)]
        if name == "fusellm_mince":
            weights = [float(k == best) for k in range(3)]
        target = sum(w * probs_KNV[k, n] for k, w in enumerate(weights))
        logq = student_NV[n].log_softmax(-1)
        expected += float((target * (target.log() - logq)).sum())
        torch.testing.assert_close(gradient_NV[n], logq.exp() - target, rtol=1e-6, atol=1e-7)
    assert float(value) == pytest.approx(expected, rel=1e-6)
