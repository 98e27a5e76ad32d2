"""Every operation of every backend against the formula in float64."""

import math

import pytest
import torch

from collegium.kernels.plain import NEARLY_CERTAIN, TorchKernels
from collegium.kernels.rows import (
    DenseTarget,
    LogSumExp,
    RawRows,
    RunningMean,
    Workspace,
    head_product,
    row_alignment,
    spans,
)
from collegium.types import Head
from kernel_cases import BACKENDS, CASES, close, device_of, kernels_of, raw_rows, truth_of

# An odd V, so that rows with gaps and partial tiles occur.
N, V = 9, 37
# torch.compile itself uses deprecated functions of torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _on_its_device(request, monkeypatch):
    """Create tensors on the backend's device; a row is two full tiles and a partial one."""
    backend = (
        request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    )
    if backend == "triton":
        monkeypatch.setattr("collegium.kernels.triton_rows.MAX_TILE", 16)
    with device_of(backend or "torch"):
        yield


@pytest.mark.parametrize(("backend", "dtype", "head"), CASES)
def test_read_matches_float64(backend, dtype, head):
    rows, labels = raw_rows(N, V, dtype, **head)
    before = rows.values_nV.clone()
    logsumexp, entropy_n = kernels_of(backend).read(rows)
    logp = truth_of(rows).log_softmax(-1)
    assert torch.equal(rows.values_nV, before)
    close(logsumexp.total(), truth_of(rows).logsumexp(-1), rows.dtype)
    close(entropy_n, -(logp.exp() * logp).sum(-1), rows.dtype)
    label_logp_n = logsumexp.logp(rows.at_labels(labels)[0])
    close(label_logp_n, logp.gather(1, labels[:, None])[:, 0], rows.dtype)
    close(-logsumexp.log_sum_n, logp.amax(-1), rows.dtype)


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(("backend", "dtype", "head"), CASES)
def test_add_is_a_running_mean(backend, dtype, head, is_log):
    kernels = kernels_of(backend)
    one, _ = raw_rows(N, V, dtype, seed=1, **head)
    other, _ = raw_rows(N, V, dtype, seed=2, **head)
    share_n = torch.rand(N, dtype=one.dtype)
    share_n[0], share_n[1] = 0.0, 1.0
    pool_nV = torch.full((N, V), torch.nan, dtype=one.dtype)
    mean = RunningMean(pool_nV, is_log=is_log)
    kernels.add_(mean, one, kernels.read(one)[0], None)
    kernels.add_(mean, other, kernels.read(other)[0], share_n)
    members = [truth_of(x).log_softmax(-1) for x in (one, other)]
    first, second = members if is_log else [x.exp() for x in members]
    share = share_n.double()[:, None]
    close(pool_nV, (1 - share) * first + share * second, one.dtype)


@pytest.mark.parametrize(("backend", "dtype", "head"), CASES)
def test_softmax_is_scaled_by_row_factors(backend, dtype, head):
    rows, _ = raw_rows(N, V, dtype, **head)
    factor_n = torch.randn(N, dtype=rows.dtype)
    z, raw = truth_of(rows, with_raw=True)
    expected = factor_n.double()[:, None] * z.softmax(-1) * slope(z, raw)
    kernels = kernels_of(backend)
    kernels.softmax_(rows, kernels.read(rows)[0], factor_n)
    close(rows.values_nV, expected, dtype)


# On both sides of the range in which exp needs no shift. Maxima near 46 and then -32 once gave an
# infinite factor in float32, and so an infinite loss.
@pytest.mark.parametrize(
    "offsets", [(0, 0, 0, 0), (40, -38, 0, 0), (-35, 0, 300, 0), (-300, 2, 2, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("has_all", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pool_of_four_at_any_magnitude_of_logits(backend, dtype, offsets, has_all):
    kernels = kernels_of(backend)
    mean = RunningMean(torch.full((N, V), torch.nan, dtype=dtype))
    expected = torch.zeros(N, V).double()
    for number, offset in enumerate(offsets):
        rows, _ = raw_rows(N, V, torch.float64, seed=number)
        rows = RawRows((rows.values_nV + offset).to(dtype))
        share_n = torch.rand(N, dtype=dtype)
        share_n[0], share_n[1] = 0.0, 1.0 - 1e-6
        if has_all:  # earlier members have no share left, so the unit would be 0
            share_n[2] = 1.0 if number == 1 else 0.5
        share = 1.0 if number == 0 else share_n.double()[:, None]
        expected = (1.0 - share) * expected + share * truth_of(rows).softmax(-1)
        mean.num_remaining = 3 - number
        kernels.add_(mean, rows, kernels.read(rows)[0], None if number == 0 else share_n)
        unit_n = mean.unit_n
        mean_nV = mean.values_nV if unit_n is None else mean.values_nV * unit_n[:, None]
        close(mean_nV, expected, dtype)
    assert mean.unit_n is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_pool_whose_members_leave_hardly_any_share(backend):
    """Each member leaves 6e-8 to the earlier ones, so that P / u of the sixth would overflow."""
    kernels, mean = kernels_of(backend), RunningMean(torch.full((N, V), torch.nan))
    for number in range(7):
        rows, _ = raw_rows(N, V, torch.float32, seed=number)
        rows.values_nV.add_(45.0 - rows.values_nV.amax(1, keepdim=True))
        share_n = None if number == 0 else torch.full((N,), 1.0 - 2**-24)
        mean.num_remaining = 6 - number
        kernels.add_(mean, rows, kernels.read(rows)[0], share_n)
    assert mean.unit_n is None
    close(mean.values_nV, truth_of(rows).softmax(-1), torch.float32)


# At -99, exp z is a denormal float32 number with a digit or two.
@pytest.mark.parametrize("offset", [-300.0, -99.0, -39.0, 0.0, 40.0, 300.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_ignore_a_constant_offset(backend, offset):
    rows, labels = raw_rows(N, V, torch.float32)
    truth = truth_of(rows)
    rows.values_nV[4:] += offset  # only some rows of a strip need a shift
    truth[4:] = rows.values_nV[4:].double()
    (logsumexp, entropy_n), logp = kernels_of(backend).read(rows), truth.log_softmax(-1)
    close(logsumexp.total(), truth.logsumexp(-1), torch.float32)
    close(entropy_n, -(logp.exp() * logp).sum(-1), torch.float32)
    label_logp_n = logsumexp.logp(rows.at_labels(labels)[0])
    close(label_logp_n, logp.gather(1, labels[:, None])[:, 0], torch.float32)


def slope(z, raw):
    return torch.autograd.grad(z.sum(), raw, retain_graph=True)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("kind", ["logits", "logp", "prob", None])
@pytest.mark.parametrize(("backend", "dtype", "head"), CASES)
def test_distill_matches_float64(backend, dtype, head, kind, temperature):
    teacher, _ = raw_rows(N, V, dtype, seed=3, **head)
    logsumexp, _ = kernels_of(backend).read(teacher)
    logp = truth_of(teacher).log_softmax(-1).detach()
    target = {
        "logits": DenseTarget(teacher, "logits", logsumexp, temperature),
        "logp": DenseTarget(RawRows(logp.to(teacher.dtype)), "logp", None, temperature),
        "prob": DenseTarget(RawRows(logp.exp().to(teacher.dtype)), "prob", None, temperature),
        None: None,
    }[kind]
    check_distill(backend, dtype, head, target, logp)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["logits", "logp", "prob"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_distill_to_a_target_whose_mass_is_not_1(backend, kind, temperature):
    """Draws at another temperature are unbiased, but the mass of a row need not be 1."""
    teacher, _ = raw_rows(N, V, torch.float32, seed=3)
    logp = truth_of(teacher).log_softmax(-1) + torch.linspace(-0.5, 0.5, N).double()[:, None]
    values_nV, zero_n = logp.float(), torch.zeros(N)
    target = DenseTarget(
        RawRows(values_nV.exp() if kind == "prob" else values_nV),
        kind,
        LogSumExp(zero_n, zero_n) if kind == "logits" else None,
        temperature,
        is_normalized=False,
    )
    torch.testing.assert_close(target.mass().double(), logp.exp().sum(-1), rtol=1e-5, atol=0)
    check_distill(backend, torch.float32, {}, target, logp)
    torch.testing.assert_close(target.as_logp_().rows.values_nV.double(), logp, rtol=1e-5, atol=0)


def check_distill(backend, dtype, head, target, logp):
    rows, _ = raw_rows(N, V, dtype, **head)
    temperature = 1.0 if target is None else target.temperature
    kd_n, ce_n = torch.rand(N, dtype=rows.dtype), torch.rand(N, dtype=rows.dtype)
    kd_n[0], ce_n[1] = 0.0, 0.0
    z, raw = truth_of(rows, with_raw=True)
    logq = (z / temperature).log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1) if target else torch.zeros(N).double()
    lse = z.logsumexp(-1)
    total = (kd_n.double() * kl + ce_n.double() * lse).sum()
    expected = torch.autograd.grad(total, raw)[0]
    logsumexp, kl_n = kernels_of(backend).distill_(rows, target, kd_n, ce_n)
    close(logsumexp.total(), lse, rows.dtype)
    close(kl_n, kl, rows.dtype)
    close(rows.values_nV, expected, dtype)


@pytest.mark.parametrize("kind", ["logits", "prob"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_self_distillation_has_zero_loss_and_gradient(backend, kind):
    rows, _ = raw_rows(N, V, torch.float32)
    kernels = kernels_of(backend)
    teacher = RawRows(rows.values_nV.clone())
    logsumexp, _ = kernels.read(teacher)
    target = DenseTarget(teacher, "logits", logsumexp)
    if kind == "prob":
        target = DenseTarget(RawRows(teacher.values_nV.softmax(-1)), "prob")
    ones_n = torch.ones(N)
    _, kl_n = kernels.distill_(rows, target, ones_n, 0 * ones_n)
    assert kl_n.abs().max() < 1e-6
    assert rows.values_nV.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_tokens_and_huge_logits_stay_finite(backend, temperature, dtype):
    values = 300 * torch.randn(N, V, dtype=torch.float64)
    values[:, 3], values[2, 4:] = -torch.inf, -torch.inf
    rows, kernels = RawRows(values.to(dtype)), kernels_of(backend)
    logsumexp, entropy_n = kernels.read(rows)
    assert entropy_n.isfinite().all()
    assert logsumexp.logp(rows.at_labels(torch.full((N,), 3))[0]).isfinite().all()
    pool_nV = torch.empty_like(rows.values_nV)
    kernels.add_(RunningMean(pool_nV), rows, logsumexp, None)
    torch.testing.assert_close(pool_nV.sum(-1), torch.ones(N, dtype=dtype))
    target = DenseTarget(RawRows(pool_nV), "prob", None, temperature)
    student = RawRows(300 * torch.randn(N, V, dtype=dtype))
    ones_n = torch.ones(N, dtype=dtype)
    _, kl_n = kernels.distill_(student, target, ones_n, ones_n)
    assert kl_n.isfinite().all()
    assert student.values_nV.isfinite().all()
    by_logits = DenseTarget(rows, "logits", logsumexp, temperature)
    student = RawRows(300 * torch.randn(N, V, dtype=dtype))
    _, kl_n = kernels.distill_(student, by_logits, ones_n, ones_n)
    assert kl_n.isfinite().all()
    assert student.values_nV.isfinite().all()


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # from the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_row_does_not_affect_other_rows(backend):
    rows, _ = raw_rows(N, V, torch.float32)
    _, expected_n = kernels_of(backend).read(RawRows(rows.values_nV[1:].clone()))
    rows.values_nV[0] = torch.nan
    _, entropy_n = kernels_of(backend).read(rows)
    assert entropy_n[0].isnan()
    torch.testing.assert_close(entropy_n[1:], expected_n, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gaps_between_rows_are_not_written(backend):
    kernels, ones_n = kernels_of(backend), torch.ones(N)
    (rows, _), (pool, _) = raw_rows(N, V, torch.float32), raw_rows(N, V, torch.float32)
    teacher, _ = raw_rows(N, V, torch.float32, seed=1)
    logsumexp, _ = kernels.read(teacher)
    for share_n in (None, 0.5 * ones_n):
        kernels.add_(RunningMean(pool.values_nV), teacher, logsumexp, share_n)
    target = DenseTarget(pool, "prob")
    logsumexp, _ = kernels.distill_(rows, target, ones_n, ones_n)
    kernels.softmax_(teacher, logsumexp, ones_n)
    for values_nV in (rows.values_nV, pool.values_nV, teacher.values_nV):
        gap_nG = values_nV.as_strided((N, 3), values_nV.stride(), V)
        assert gap_nG.isnan().all()
        assert values_nV.isfinite().all()


@pytest.mark.parametrize("vocab_size", [16, 29])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_device_rows_are_aligned(monkeypatch, dtype, vocab_size):
    assert row_alignment(torch.empty(0, dtype=torch.uint8, device="meta")) % 128 == 0
    assert Workspace().matrix("logits", (N, V), torch.empty(0, dtype=dtype)).is_contiguous()
    monkeypatch.setattr(
        "collegium.kernels.rows.row_alignment", lambda like: 32 // like.element_size()
    )
    like = torch.empty(0, dtype=dtype)
    values_nV = Workspace().matrix("logits", (N, vocab_size), like)
    assert values_nV.shape == (N, vocab_size)
    row = values_nV.stride(0) * dtype.itemsize
    assert row % 32 == 0
    assert vocab_size * dtype.itemsize <= row < vocab_size * dtype.itemsize + 32


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("vocab_size", [5, 16, 29])
def test_device_products_have_aligned_sizes(monkeypatch, vocab_size, with_bias):
    weight = torch.randn(vocab_size, 4, dtype=torch.float64)
    assert spans(weight) == [slice(0, vocab_size)]
    monkeypatch.setattr(
        "collegium.kernels.rows.row_alignment", lambda like: 64 // like.element_size()
    )
    parts = spans(weight)
    assert [v for part in parts for v in range(vocab_size)[part]] == list(range(vocab_size))
    assert [(part.stop - part.start) % 8 for part in parts[:-1]] == [0] * (len(parts) - 1)
    assert len(parts) == {5: 1, 16: 1, 29: 2}[vocab_size]
    bias = torch.randn(vocab_size, dtype=torch.float64) if with_bias else None
    hidden = torch.randn(N, 4, dtype=torch.float64)
    rows = head_product(hidden, Head(weight, bias), Workspace())
    expected = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(rows.values_nV, expected, rtol=1e-12, atol=1e-12)


def test_result_does_not_depend_on_strip_size(monkeypatch):
    rows, _ = raw_rows(N, V, torch.float64, scale=0.5)
    _, whole_n = TorchKernels().read(rows)
    monkeypatch.setattr("collegium.kernels.plain.CPU_STRIP_BYTES", 8 * V * 2)
    _, parts_n = TorchKernels().read(rows)
    assert torch.equal(whole_n, parts_n)


# At 14 the sum of exp is 1 + 1e-6, of which float32 keeps one digit.
@pytest.mark.parametrize("gap", [3.0, 8.0, 14.0, 20.0, 60.0])
@pytest.mark.parametrize("offset", [0.0, 30.0, -200.0])
@pytest.mark.parametrize("num_best", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_of_nearly_certain_rows_is_precise(backend, num_best, offset, gap):
    rows, _ = raw_rows(N, V, torch.float32)
    rows.values_nV.mul_(0.1).add_(offset)
    top = rows.values_nV.amax(-1) + torch.linspace(gap, gap + 1, N)
    rows.values_nV[:, 5 : 5 + num_best] = top[:, None]
    _, entropy_n = kernels_of(backend).read(rows)
    # The same formula, without the digits that a sum of 1 and small terms loses in float64 too.
    gap_nV = truth_of(rows).detach()
    gap_nV = gap_nV - gap_nV.amax(-1, keepdim=True)
    rest_n = torch.where(gap_nV < 0, gap_nV.exp(), 0.0).sum(-1)
    expected = math.log(num_best) + torch.log1p(rest_n / num_best)
    expected -= (gap_nV.exp() * gap_nV).sum(-1) / (num_best + rest_n)
    # Other rows are differences of numbers as large as the largest logit, in float32.
    rounding_n = torch.where(expected < NEARLY_CERTAIN, 0.0, 2.5e-7 * top.abs().double())
    assert ((entropy_n.double() - expected).abs() <= 2e-5 * expected + rounding_n).all()
