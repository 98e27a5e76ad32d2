"""Divergences against a float64 reference and in the edge cases of logarithms."""

import math

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_losses
from collegium.losses.divergences import (
    DIVERGENCES,
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)

NAMES = sorted(DIVERGENCES)


def pair(rows: int = 5, vocab: int = 11, *, sharpness: float = 2.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    z = sharpness * torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)
    return z[0].log_softmax(-1), z[1].log_softmax(-1)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_formula(name):
    logp, logq = pair()
    expected = reference_losses.DIVERGENCES[name](logp.exp(), logq.exp())
    torch.testing.assert_close(DIVERGENCES[name]()(logp, logq), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("skew", [0.01, 0.3, 0.9])
def test_skew_is_the_share_in_the_mixture(skew):
    logp, logq = pair()
    p, q = logp.exp(), logq.exp()
    torch.testing.assert_close(
        SkewedForwardKL(skew=skew)(logp, logq), reference_losses.skewed_forward_kl(p, q, skew)
    )
    torch.testing.assert_close(
        SkewedReverseKL(skew=skew)(logp, logq), reference_losses.skewed_reverse_kl(p, q, skew)
    )


@pytest.mark.parametrize("skew", [0.0, 1.0, -0.1, math.nan])
def test_degenerate_skews_raise(skew):
    with pytest.raises(pydantic.ValidationError):
        SkewedForwardKL(skew=skew)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9])
def test_beta_is_the_share_in_the_mixture(beta):
    logp, logq = pair()
    expected = reference_losses.jensen_shannon(logp.exp(), logq.exp(), beta)
    torch.testing.assert_close(JensenShannon(beta=beta)(logp, logq), expected)


def test_generalized_jensen_shannon_approaches_the_kl_divergences():
    logp, logq = pair(sharpness=1.0)
    for beta, limit in ((1e-6, ForwardKL()), (1 - 1e-6, ReverseKL())):
        scaled = JensenShannon(beta=beta)(logp, logq) / min(beta, 1 - beta)
        torch.testing.assert_close(scaled, limit(logp, logq), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 1.0, math.nan])
def test_degenerate_betas_raise(beta):
    with pytest.raises(pydantic.ValidationError):
        JensenShannon(beta=beta)


@pytest.mark.parametrize("head", [0.1, 0.5, 0.95])
def test_adaptive_kl_weighs_by_the_gaps_of_head_and_tail(head):
    logp, logq = pair(40)
    value = AdaptiveKL(head=head)(logp, logq)
    torch.testing.assert_close(value, reference_losses.adaptive_kl(logp.exp(), logq.exp(), head))


def test_adaptive_kl_of_a_gap_on_one_side_is_one_kl():
    """Half of the mass is the first token: where only it, or only the others, are wrong."""
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    right_head = torch.tensor([[0.5, 0.1, 0.4]], dtype=torch.float64).log()
    torch.testing.assert_close(AdaptiveKL()(p.log(), right_head), ReverseKL()(p.log(), right_head))
    both_wrong = torch.tensor([[0.3, 0.4, 0.3]], dtype=torch.float64).log()
    expected = (ForwardKL()(p.log(), both_wrong) + ReverseKL()(p.log(), both_wrong)) / 2
    torch.testing.assert_close(AdaptiveKL()(p.log(), both_wrong), expected)
    everything = AdaptiveKL(head=1 - 1e-12)(p.log(), both_wrong)
    torch.testing.assert_close(everything, ForwardKL()(p.log(), both_wrong))


def test_the_weights_of_adaptive_kl_have_no_gradient():
    logp, logq = pair()
    z = logq.clone().requires_grad_()
    AdaptiveKL()(logp, z.log_softmax(-1)).sum().backward()
    p, q = logp.exp(), logq.exp()
    reverse, forward = ReverseKL()(logp, logq)[:, None], ForwardKL()(logp, logq)[:, None]
    share = (AdaptiveKL()(logp, logq)[:, None] - reverse) / (forward - reverse)
    expected = share * (q - p) + (1 - share) * q * (logq - logp - reverse)
    torch.testing.assert_close(z.grad, expected)


def test_logit_mse_ignores_the_offset_of_the_logits():
    logp, logq = pair()
    offset = torch.arange(5.0, dtype=torch.float64)[:, None]
    value = LogitMSE()(logp, logq)
    torch.testing.assert_close(LogitMSE()(logp + offset, logq - 3 * offset), value)


def test_logit_mse_is_the_limit_of_the_kl_at_high_temperature():
    logp, logq = pair()
    for divergence in (ForwardKL(), ReverseKL()):
        t = 1e3
        softened = divergence((logp / t).log_softmax(-1), (logq / t).log_softmax(-1))
        torch.testing.assert_close(2 * t**2 * softened, LogitMSE()(logp, logq), rtol=0.02, atol=0)


# The weights of adaptive KL are constants to the gradient, which has a test of its own.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "adaptive_kl"])
def test_gradcheck(name):
    logp, logq = pair(3, 5)
    divergence = DIVERGENCES[name]()
    assert torch.autograd.gradcheck(
        lambda a, b: divergence(a.log_softmax(-1), b.log_softmax(-1)),
        (logp.requires_grad_(), logq.requires_grad_()),
    )


# A fused path of TRL's GKD once added 0.5 CE unnoticed. Student = teacher made it visible: the loss
# was about 6 instead of 0 (huggingface/trl#5731).
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_self_distillation_is_zero_with_zero_gradient(name, dtype):
    z = (5 * torch.randn(6, 50)).to(dtype).requires_grad_()
    value = DIVERGENCES[name]()(z.detach().log_softmax(-1), z.log_softmax(-1))
    # Alpha-beta divides the difference of two sums by a b = 0.14.
    tolerance = (1e-6 if dtype == torch.float32 else 1e-14) * (7 if name == "alpha_beta" else 1)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=tolerance)
    value.sum().backward()
    torch.testing.assert_close(z.grad, torch.zeros_like(z), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 20.0])
def test_finite_in_float32_at_any_temperature(name, temperature):
    target = (20 * torch.randn(4, 64)) / temperature
    z = (20 * torch.randn(4, 64)).requires_grad_()
    value = DIVERGENCES[name]()(target.log_softmax(-1), (z / temperature).log_softmax(-1))
    value.sum().backward()
    assert value.isfinite().all()
    assert (value > -1e-4).all()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_excluded_by_the_target(name):
    logp, logq = pair(4, 9)
    logp[:, ::2] = -math.inf
    logp = logp.log_softmax(-1)
    logq.requires_grad_()
    value = DIVERGENCES[name]()(logp, logq.log_softmax(-1))
    value.sum().backward()
    assert value.isfinite().all()
    assert logq.grad is not None
    assert logq.grad.isfinite().all()
    # These are infinite here; LOG_FLOOR bounds them.
    if name not in ("reverse_kl", "adaptive_kl", "logit_mse"):
        expected = reference_losses.DIVERGENCES[name](logp.exp(), logq.detach().exp())
        torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-12)


def test_reverse_kl_moves_mass_off_excluded_tokens():
    logp = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    value = ReverseKL()(logp, z.log_softmax(-1))
    value.sum().backward()
    assert value.item() == pytest.approx(1e4 / 3, rel=1e-3)
    assert z.grad is not None
    assert z.grad[0, 2] > 0 > z.grad[0, 0]


@given(st.integers(0, 10**6), st.floats(0.1, 8))
@settings(max_examples=30, deadline=None)
def test_bounds(seed, sharpness):
    logp, logq = pair(3, 7, sharpness=sharpness, seed=seed)
    for divergence in DIVERGENCES.values():
        assert (divergence()(logp, logq) >= -1e-12).all()
    both_ways = JensenShannon()(logp, logq), JensenShannon()(logq, logp)
    torch.testing.assert_close(*both_ways)
    assert (both_ways[0] <= math.log(2)).all()
    assert (SkewedForwardKL(skew=0.2)(logp, logq) <= -math.log(0.2)).all()


def test_disjoint_supports_reach_ln_2():
    eye = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).log()
    value = JensenShannon()(eye[:1], torch.tensor([[-1000.0, 0.0]], dtype=torch.float64))
    assert value.item() == pytest.approx(math.log(2))
