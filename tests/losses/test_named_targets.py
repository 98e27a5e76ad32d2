"""Losses on named targets against the dense formula in float64, in value and gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from collegium.distributions import NamedRows
from collegium.losses.divergences import ForwardKL
from collegium.losses.terms import TAIL_FLOOR
from named_terms import named_terms

N, V = 11, 23


def _draw(seed: int = 0, *, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(N, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (N,), generator=generator)
    return logits.requires_grad_(), labels


def _sampled(seed: int = 1) -> NamedRows:
    """Draw ragged rows of one to five tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1 + int(torch.randint(5, (), generator=generator)) for _ in range(N)]
    ids = [torch.randperm(V, generator=generator)[:size] for size in sizes]
    prob = [torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 for size in sizes]
    logp = [(p / p.sum()).log() for p in prob]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    return NamedRows(starts, torch.cat(ids), torch.cat(logp), None, V)


def _top_k(k: int, seed: int = 2) -> tuple[NamedRows, torch.Tensor]:
    """Draw a top-k target with its tail, and the dense distribution that it truncates."""
    generator = torch.Generator().manual_seed(seed)
    logp = torch.randn(N, V, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    top = logp.topk(k)
    tail = logp.scatter(1, top.indices, -torch.inf).logsumexp(1)
    starts = torch.arange(N + 1) * k
    return NamedRows(starts, top.indices.flatten(), top.values.flatten(), tail, V), logp


def _gradient(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), logits)[0]


def test_draws_match_the_dense_formula_in_value_and_gradient() -> None:
    logits, labels = _draw()
    target = _sampled()
    ce, kl = named_terms(logits, labels, target)
    dense = ForwardKL()(target.logits(slice(0, N)), logits.log_softmax(-1))
    expected_ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(kl, dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ce, expected_ce, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_gradient(kl, logits), _gradient(dense, logits))
    prob = target.logits(slice(0, N)).exp()
    kl = named_terms(logits, labels, target)[1]
    torch.testing.assert_close(_gradient(kl, logits), logits.softmax(-1).detach() - prob)


def test_a_target_of_another_mass_pulls_by_its_mass() -> None:
    logits, labels = _draw()
    target = _sampled()
    part = replace(target, logp=target.logp + math.log(0.6))
    kl = named_terms(logits, labels, part)[1]
    prob = part.logits(slice(0, N)).exp()
    logq = logits.log_softmax(-1)
    expected = (torch.special.xlogy(prob, prob) - prob * logq).sum(-1)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_gradient(kl, logits), 0.6 * logq.exp().detach() - prob)


@pytest.mark.parametrize("k", [1, 5, V - 1, V])
def test_top_k_is_the_kl_over_kept_tokens_and_a_tail_bucket(k: int) -> None:
    logits, labels = _draw()
    target, logp = _top_k(k)
    _, kl = named_terms(logits, labels, target)
    order = logp.argsort(dim=1, descending=True)
    p, q = logp.exp().gather(1, order), logits.softmax(-1).gather(1, order)
    p = torch.cat([p[:, :k], p[:, k:].sum(1, keepdim=True)], 1)
    q = torch.cat([q[:, :k], q[:, k:].sum(1, keepdim=True)], 1)
    expected = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q))[:, : k + (k < V)].sum(1)
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(_gradient(kl, logits), _gradient(expected, logits))


def test_self_distillation_from_top_k_has_zero_loss_and_gradient() -> None:
    # A truncated KL without a tail has a gradient even here (verl-project/verl#7856).
    target, logp = _top_k(4)
    logits = logp.clone().requires_grad_()
    _, kl = named_terms(logits, torch.zeros(N, dtype=torch.int64), target)
    assert kl.abs().max() < 1e-12
    assert _gradient(kl, logits).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_student_without_tail_mass_has_a_finite_gradient(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, V, dtype=dtype)
    # The mass of the other tokens, 22 exp(-60), rounds to 0 in 1 - q.
    logits[0, 0] = 60.0
    logits.requires_grad_()
    starts, ids = torch.tensor([0, 1]), torch.tensor([0])
    target = NamedRows(starts, ids, torch.tensor([math.log(0.9)]), torch.tensor([math.log(0.1)]), V)
    _, kl = named_terms(logits, torch.zeros(1, dtype=torch.int64), target)
    assert torch.isfinite(kl).all()
    assert kl.item() == pytest.approx(
        0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - math.log(TAIL_FLOOR)), rel=1e-3
    )
    assert torch.isfinite(_gradient(kl, logits)).all()


def test_tail_below_the_floor_still_has_a_gradient() -> None:
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, 0] = 18.0  # tail mass 3e-7
    logits.requires_grad_()
    starts, ids = torch.tensor([0, 1]), torch.tensor([0])
    target = NamedRows(starts, ids, torch.tensor([math.log(0.9)]), torch.tensor([math.log(0.1)]), V)
    _, kl = named_terms(logits, torch.zeros(1, dtype=torch.int64), target)
    gradient = _gradient(kl, logits)
    assert gradient[0, 0] > 0.01
    assert (gradient[0, 1:] < 0).all()


def test_empty_tail_is_finite() -> None:
    logits, labels = _draw()
    target, _ = _top_k(V)
    target = NamedRows(target.starts, target.ids, target.logp, torch.full((N,), -torch.inf), V)
    _, kl = named_terms(logits, labels, target)
    assert torch.isfinite(kl).all()
    assert torch.isfinite(_gradient(kl, logits)).all()


def test_blocks_of_a_target_match_the_whole() -> None:
    logits, labels = _draw()
    for target in (_sampled(), _top_k(3)[0]):
        whole = named_terms(logits, labels, target)[1]
        parts = [
            named_terms(logits[b], labels[b], target.block(b))[1]
            for b in (slice(0, 4), slice(4, 5), slice(5, N))
        ]
        torch.testing.assert_close(torch.cat(parts), whole)


def test_gradient_of_draws_is_unbiased() -> None:
    """The mean over many draws is the dense gradient within five standard errors."""
    from cache_cases import Samples, row_keys
    from collegium.cache.codecs.targets import SCALARS, TargetCodec

    num_repeats, draws = 4000, 10
    _, logp = _top_k(1)
    logits, _ = _draw()
    q = logits.softmax(-1).detach()[0]

    keys = row_keys(5, np.arange(num_repeats).astype(np.uint64), np.zeros(num_repeats))
    scalars = {name: torch.zeros(num_repeats) for name in SCALARS}
    codec = TargetCodec("fused", Samples(draws=draws), V)
    target = codec.decode(codec.encode(logp[:1].repeat(num_repeats, 1), keys, scalars))
    student = logits[:1].detach().repeat(num_repeats, 1).requires_grad_()
    _, kl = named_terms(student, torch.zeros(num_repeats, dtype=torch.int64), target)
    gradient = _gradient(kl, student)
    p = logp[0].exp()
    # Standard error of a multinomial frequency.
    error = (p * (1 - p) / draws / num_repeats).sqrt()
    assert ((gradient.mean(0) - (q - p)).abs() < 5 * error + 1e-6).all()
