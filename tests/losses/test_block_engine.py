"""Blocks through the student's head, closed forms and autograd, against plain autograd."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference_losses
from collegium.distributions import Answer, DenseRows, HiddenRows
from collegium.fusion.fuse import Fusion
from collegium.kernels.rows import Workspace, add_product_
from collegium.losses.divergences import DIVERGENCES
from collegium.losses.engine import BlockEngine, default_block_size
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Head, Rows
from fusion_cases import CountedRows
from refusals import refused

N, V, D = 19, 23, 5
KD_RATIO = 0.7
WEIGHTS = {"kd": KD_RATIO, "ce": 1 - KD_RATIO}


class Problem:
    """A student, and a target that is one teacher's logits."""

    def __init__(
        self, *, dtype=torch.float64, bias=True, scale=1.0, softcap=None, name="forward_kl"
    ):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = draw(N, D).requires_grad_()
        self.weight = draw(V, D).requires_grad_()
        self.bias = draw(V).requires_grad_() if bias else None
        self.target = draw(N, V).float().to(torch.promote_types(dtype, torch.float32))
        self.labels = torch.randint(V, (N,), generator=generator)
        self.scale, self.softcap = scale, softcap
        self.name = name

    @property
    def head(self):
        return Head(self.weight, self.bias, self.scale, self.softcap)

    @property
    def inputs(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def sums(self, *, hidden=None, head=None, target=None, measure=False, **options):
        divergence = DIVERGENCES[self.name]()
        options = ObjectiveOptions(
            kd_ratio=KD_RATIO, divergence=divergence, backend="torch", **options
        )
        hidden = self.hidden if hidden is None else hidden
        target = DenseRows(self.target[: len(hidden)]) if target is None else target
        return row_losses(
            Objective(options, Fusion()),
            HiddenRows(hidden, head or self.head),
            [Answer("t", target)],
            rows_of(self.labels[: len(hidden)]),
            measure=measure,
        )

    def terms(self, logits):
        q = logits.softmax(-1)
        ce = -q.log()[torch.arange(N), self.labels]
        kd = reference_losses.DIVERGENCES[self.name](self.target.softmax(-1), q)
        return {"kd": kd.sum(), "ce": ce.sum()}

    def plain_terms(self):
        return self.terms(
            reference_losses.logits(self.hidden, self.weight, self.bias, self.scale, self.softcap)
        )

    def plain(self):
        return weighted(self.plain_terms())


def weighted(terms):
    return sum(WEIGHTS[name] * value for name, value in terms.items())


def rows_of(labels):
    number = torch.arange(len(labels))
    return Rows(number, labels, number // 4, number // 4)


# Cohere scales its logits, Gemma 2 caps them.
HEADS = [{}, {"bias": False}, {"scale": 0.25}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 5.0}]


@pytest.mark.parametrize("block_size", [1, 3, 7, 16, N, None])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_plain_autograd(name, head, block_size):
    problem = Problem(name=name, **head)
    sums = problem.sums(block_size=block_size)
    plain = problem.plain()
    torch.testing.assert_close(sums.total, plain, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(1.7 * sums.total, problem.inputs)
    theirs = torch.autograd.grad(1.7 * plain, problem.inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name, value in problem.plain_terms().items():
        torch.testing.assert_close(sums.terms[name], value.detach(), rtol=1e-12, atol=1e-12)
        assert not sums.terms[name].requires_grad
    assert sums.grad_norms == {}


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_each_block_is_evaluated_once_in_order(name):
    problem = Problem(name=name)
    target = CountedRows(problem.target)
    problem.sums(target=target, block_size=8).total.backward()
    assert target.blocks == [(0, 8), (8, 16), (16, 19)]


@pytest.mark.parametrize("name", ["forward_kl", "alpha_beta"])
def test_gradcheck(name):
    problem = Problem(scale=0.5, softcap=4.0, name=name)

    def total(hidden, weight, bias):
        head = Head(weight, bias, problem.scale, problem.softcap)
        return problem.sums(hidden=hidden, head=head, block_size=4).total

    assert torch.autograd.gradcheck(total, problem.inputs)


def test_second_derivatives_raise():
    problem = Problem()
    (grad,) = torch.autograd.grad(problem.sums().total ** 2, problem.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_retained_graph_allows_a_second_backward():
    problem = Problem()
    total = problem.sums().total
    first = torch.autograd.grad(2 * total, problem.inputs, retain_graph=True)
    again = torch.autograd.grad(total, problem.inputs)
    for doubled, grad in zip(first, again, strict=True):
        torch.testing.assert_close(doubled, 2 * grad)
    # A backward pass without retain_graph scales the gradients in-place and drops them.
    with refused(RuntimeError, "BlockEngine: "):
        total.backward()


def test_default_blocks_have_equal_sizes(monkeypatch):
    monkeypatch.setattr("collegium.losses.engine.MAX_BLOCK", 8)
    problem = Problem()
    target = CountedRows(problem.target)
    problem.sums(target=target)
    # Not 8, 8, 3: each block reads and writes the whole gradient of the head.
    assert target.blocks == [(0, 7), (7, 14), (14, 19)]


@pytest.mark.parametrize("frozen", [(1,), (0,), (2,), (1, 2), (0, 1)])
def test_frozen_inputs_get_no_gradient(frozen):
    problem = Problem()
    for i in frozen:
        problem.inputs[i].requires_grad_(False)
    trained = [x for x in problem.inputs if x.requires_grad]
    ours = torch.autograd.grad(problem.sums(block_size=4).total, trained)
    theirs = torch.autograd.grad(problem.plain(), trained)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    problem.sums(block_size=4).total.backward()
    assert [x.grad is None for x in problem.inputs] == [not x.requires_grad for x in problem.inputs]


def test_tied_head_with_padding_rows_gets_both_gradients():
    """The weight is a view of the embedding table that also produces the hidden states."""
    problem = Problem(bias=False)
    table = torch.randn(V + 3, D, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(N)

    def total(engine: bool):
        hidden, head = table[ids] * 2, Head(table[:V])
        if engine:
            return problem.sums(hidden=hidden, head=head, block_size=6).total
        return weighted(problem.terms(hidden @ table[:V].T))

    ours = torch.autograd.grad(total(True), table)[0]
    theirs = torch.autograd.grad(total(False), table)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (ours[V:] == 0).all()


@pytest.mark.parametrize("name", ["forward_kl", "skewed_reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_with_float32_losses(dtype, name):
    problem = Problem(dtype=dtype, name=name)
    sums = problem.sums(block_size=6)
    assert sums.total.dtype == torch.float32
    wide = Problem(name=name)
    for ours, theirs in zip(problem.inputs, wide.inputs, strict=True):
        theirs.data = ours.detach().double()
    wide.target = problem.target.double()
    torch.testing.assert_close(sums.total.double(), wide.plain(), rtol=1e-2, atol=0)
    grads = torch.autograd.grad(sums.total, problem.inputs)
    truth = torch.autograd.grad(wide.plain(), wide.inputs)
    for a, b in zip(grads, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 1e-2 * b.norm()


def engine_of(hidden, weight, block_size):
    return BlockEngine(hidden, Head(weight), workspace=Workspace(), block_size=block_size)


def test_sums_of_half_gradients_do_not_overflow():
    """In float16 the sum over rows may exceed 65504 although the mean does not."""
    hidden = torch.full((4, 1), 100.0, dtype=torch.float16)
    weight = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    engine = engine_of(hidden, weight, 1)
    for block in engine:
        engine.project(block)
        engine.accumulate(block, torch.tensor([[500.0, 0.0]], dtype=torch.float16))
    (engine.attach(torch.zeros(())) / 4).backward()
    assert weight.grad is not None
    assert weight.grad[0].item() == pytest.approx(50_000, rel=1e-3)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_forms_no_gradient(context, name):
    problem = Problem(name=name)
    with context():
        assert not BlockEngine(
            problem.hidden, problem.head, workspace=Workspace(), block_size=4
        ).is_trained
        sums = problem.sums(measure=True)
    assert not sums.total.requires_grad
    torch.testing.assert_close(sums.total, problem.plain().detach())


def test_zero_rows_keep_a_graph():
    problem = Problem()
    sums = problem.sums(hidden=problem.hidden[:0], measure=True)
    assert sums.total.item() == 0
    sums.total.backward()
    for x in problem.inputs:
        assert x.grad is not None
        assert (x.grad == 0).all()
    assert sums.terms == {"kd": 0, "ce": 0}
    assert sums.grad_norms == {"kd": 0, "ce": 0}


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("block_size", [4, N])
def test_measured_norms_match_each_weighted_term(block_size, name):
    problem = Problem(softcap=3.0, name=name)
    plain_total = problem.sums(block_size=block_size).total
    sums = problem.sums(block_size=block_size, measure=True)
    assert sums.total == plain_total
    for name, value in problem.plain_terms().items():
        (grad,) = torch.autograd.grad(WEIGHTS[name] * value, problem.hidden, retain_graph=True)
        torch.testing.assert_close(sums.grad_norms[name], grad.norm(), rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(sums.total, problem.hidden)[0]
    expected = torch.autograd.grad(problem.plain(), problem.hidden)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "skewed_forward_kl"])
def test_a_term_at_its_optimum_has_no_gradient(name):
    problem = Problem(name=name, bias=False)
    problem.target = (problem.hidden @ problem.weight.T).detach()
    sums = problem.sums(measure=True)
    assert sums.grad_norms["kd"] < 1e-12 < sums.grad_norms["ce"]


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.num_bytes = max([self.num_bytes, *sizes])
        return out


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_no_tensor_has_rows_times_vocabulary_elements(name):
    problem = Problem(dtype=torch.float32, name=name)

    class Constant(CountedRows):
        def logits(self, block):
            return torch.zeros(block.stop - block.start, V)

    def largest(block_size):
        with LargestTensor() as watch:
            sums = problem.sums(
                target=Constant(problem.target), block_size=block_size, measure=True
            )
            sums.total.backward()
        return watch.num_bytes

    assert largest(N) == 4 * N * V
    assert largest(8) == 4 * 8 * V


def test_default_block_size_fits_the_memory_budget():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    # Vocabularies of SmolLM2, Qwen 2.5 and Gemma 3.
    for vocab_size, num_bytes in [(49_152, 8), (151_936, 6), (262_144, None), (49_152, 16)]:
        for device, megabytes in [(cpu, 256), (gpu, 1024)]:
            size = default_block_size(vocab_size, device, bytes_per_logit=num_bytes)
            row = vocab_size * (num_bytes or 32)
            assert size * row <= megabytes * 2**20
            if device is gpu or num_bytes:
                assert (size + 1) * row > megabytes * 2**20
    assert default_block_size(4096, cpu) == 488
    assert default_block_size(10, cpu) == 4096
    assert default_block_size(49_152, cpu, bytes_per_logit=8, megabytes=64) == 170
    assert default_block_size(2_000_000, cpu, bytes_per_logit=8, megabytes=1) == 1


@pytest.fixture
def wide_products(monkeypatch):
    """Register CUDA's mixed-dtype `addmm` on a CPU and record the shapes of its outputs."""
    seen = []

    def addmm(total, left, right, out_dtype, *, beta=1, alpha=1, out):
        assert total is out or total.data_ptr() == out.data_ptr()
        assert left.dtype == right.dtype
        assert out.dtype == out_dtype == torch.float32
        seen.append(out.shape)
        out = out.mul_(beta) if beta else out.zero_()
        return out.add_(alpha * (left.float() @ right.float()))

    # PyTorch implements this overload for CUDA only.
    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CPU")
    for module in ("kernels.rows", "losses.engine"):
        monkeypatch.setattr(f"collegium.{module}.multiplies_half", lambda device: True)
    yield seen
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_added_in_float32(wide_products, dtype):
    problem, truth = Problem(dtype=dtype), Problem(dtype=torch.float64)
    with torch.no_grad():
        for ours, exact in zip(problem.inputs, truth.inputs, strict=True):
            exact.copy_(ours)
        truth.target = problem.target.double()
    problem.sums(block_size=8).total.backward()
    truth.plain().backward()
    # Per block: the student's logits, the gradient of the hidden states, then of the head.
    assert wide_products == [x for n in (8, 8, 3) for x in ((n, V), (n, D), (V, D))]
    for ours, exact in zip(problem.inputs, truth.inputs, strict=True):
        assert ours.grad.dtype == dtype
        cosine = torch.cosine_similarity(ours.grad.double().flatten(), exact.grad.flatten(), 0)
        assert cosine > 0.9999


def test_float64_sums_of_half_products_use_two_operations(wide_products):
    sums, left, right = torch.ones(3, 2).double(), torch.ones(3, 4).half(), torch.ones(4, 2).half()
    add_product_(sums, left, right)
    assert wide_products == []
    assert torch.equal(sums, torch.full((3, 2), 5.0, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 40, 5), (3, 5, 40), (3, 1, 1), (3, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0, 1])
def test_half_products_in_pieces_are_those_of_the_whole(monkeypatch, shape, dtype, beta):
    monkeypatch.setattr("collegium.kernels.rows.CAST_ELEMENTS", 16)
    rows, length, columns = shape
    left, right = torch.randn(rows, length).to(dtype), torch.randn(length, columns).to(dtype)
    sums = torch.randn(rows, columns) if beta else torch.full((rows, columns), torch.nan)
    exact = left.double() @ right.double() + (sums.double() if beta else 0.0)
    add_product_(sums, left, right, beta=beta)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-5)


def test_native_products_leave_the_precision_of_others(monkeypatch):
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    seen = []
    addmm = torch.addmm
    monkeypatch.setattr(
        "collegium.kernels.rows.torch.addmm",
        lambda *a, **k: seen.append(settings.fp32_precision) or addmm(*a, **k),
    )
    left, right = torch.randn(3, 4).bfloat16(), torch.randn(4, 2).bfloat16()
    add_product_(torch.zeros(3, 2), left, right)
    assert seen == ["bf16"]
    assert settings.fp32_precision == before
    with pytest.raises(RuntimeError):
        add_product_(torch.zeros(3, 2), left, right[:3])
    assert settings.fp32_precision == before
    add_product_(torch.zeros(3, 2), left.half(), right.half())  # not exact in bfloat16
    add_product_(torch.zeros(3, 2), left.float(), right.float())
    assert seen[2:] == [before] * 2


@pytest.mark.parametrize("has_wide_products", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("std", [1.0, 4.0])
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("float32", "bfloat16")], ids="-".join)
def test_half_heads_close_to_each_other_have_exact_gradients(
    request, dtypes, std, name, has_wide_products
):
    if has_wide_products:
        request.getfixturevalue("wide_products")
    student_dtype, teacher_dtype = (getattr(torch, dtype) for dtype in dtypes)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    width, vocab_size = 64, 1000
    hidden, weight = draw(24, width), std * width**-0.5 * draw(vocab_size, width)
    theirs = [hidden.to(teacher_dtype), weight.to(teacher_dtype)]
    hidden = hidden + 0.05 * draw(*hidden.shape)
    weight = weight + 0.05 * std * width**-0.5 * draw(*weight.shape)
    ours = [x.to(student_dtype).requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    logp = (theirs[0].double() @ theirs[1].double().T).log_softmax(-1)
    divergence = DIVERGENCES[name]()
    divergence(logp, (exact[0] @ exact[1].T).log_softmax(-1)).sum().backward()
    options = ObjectiveOptions(kd_ratio=1.0, block_size=10, divergence=divergence)
    number = torch.arange(24)
    answer = Answer("t", HiddenRows(theirs[0], Head(theirs[1])))
    student = HiddenRows(ours[0], Head(ours[1]))
    rows = Rows(number, number, number, number)
    row_losses(Objective(options, Fusion()), student, [answer], rows).total.backward()
    for x, expected in zip(ours, exact, strict=True):
        error = (x.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error < (3e-3 if student_dtype == torch.bfloat16 else 1e-4)
