"""Block driver against plain autograd on full logits."""

import pytest
import torch
from collegium.losses.chunked import add_product_, block_losses, default_block_size
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference_losses
from collegium.losses.divergences import ForwardKL
from collegium.types import Head
from refusals import refused

N, V, D = 19, 23, 5
WEIGHTS = {"kd": 0.7, "ce": 0.3}


class Problem:
    def __init__(self, *, dtype=torch.float64, bias=True, scale=1.0, softcap=None):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = draw(N, D).requires_grad_()
        self.weight = draw(V, D).requires_grad_()
        self.bias = draw(V).requires_grad_() if bias else None
        self.target = draw(N, V).float().to(torch.promote_types(dtype, torch.float32))
        self.target = self.target.log_softmax(-1)
        self.labels = torch.randint(V, (N,), generator=generator)
        self.scale, self.softcap = scale, softcap

    @property
    def head(self):
        return Head(self.weight, self.bias, self.scale, self.softcap)

    @property
    def inputs(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def row_losses(self, logits, block):
        logq = logits.log_softmax(-1)
        ce = -logq.gather(1, self.labels[block, None]).squeeze(1)
        return {"kd": ForwardKL()(self.target[block], logq), "ce": ce}

    def sums(self, **options):
        return block_losses(self.hidden, self.head, self.row_losses, WEIGHTS, **options)

    def plain_terms(self):
        z = reference_losses.logits(self.hidden, self.weight, self.bias, self.scale, self.softcap)
        return {name: x.sum() for name, x in self.row_losses(z, slice(None)).items()}

    def plain(self):
        return sum(WEIGHTS[name] * value for name, value in self.plain_terms().items())


# Cohere scales its logits, Gemma 2 caps them.
HEADS = [{}, {"bias": False}, {"scale": 0.25}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 5.0}]


@pytest.mark.parametrize("block_size", [1, 3, 7, 16, N, None])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_equals_plain_autograd(head, block_size):
    problem = Problem(**head)
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


def test_each_block_is_evaluated_once_in_order():
    problem, seen = Problem(), []

    def row_losses(logits, block):
        seen.append((block.start, block.stop))
        assert logits.shape == (block.stop - block.start, V)
        return problem.row_losses(logits, block)

    block_losses(problem.hidden, problem.head, row_losses, WEIGHTS, block_size=8).total.backward()
    assert seen == [(0, 8), (8, 16), (16, 19)]


def test_gradcheck():
    problem = Problem(scale=0.5, softcap=4.0)

    def total(hidden, weight, bias):
        head = Head(weight, bias, problem.scale, problem.softcap)
        return block_losses(hidden, head, problem.row_losses, WEIGHTS, block_size=4).total

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
    with refused(RuntimeError, "block_losses"):
        total.backward()


def test_default_blocks_have_equal_sizes(monkeypatch):
    monkeypatch.setattr("collegium.losses.chunked.MAX_BLOCK", 8)
    problem, seen = Problem(), []

    def row_losses(logits, block):
        seen.append(block.stop - block.start)
        return problem.row_losses(logits, block)

    block_losses(problem.hidden, problem.head, row_losses, WEIGHTS)
    # Not 8, 8, 3: each block reads and writes the whole gradient of the head.
    assert seen == [7, 7, 5]


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

    def total(driver: bool):
        hidden, head = table[ids] * 2, Head(table[:V])
        if driver:
            return block_losses(hidden, head, problem.row_losses, WEIGHTS, block_size=6).total
        terms = problem.row_losses(hidden @ table[:V].T, slice(None))
        return sum(WEIGHTS[name] * value.sum() for name, value in terms.items())

    ours = torch.autograd.grad(total(True), table)[0]
    theirs = torch.autograd.grad(total(False), table)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (ours[V:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_with_float32_losses(dtype):
    problem = Problem(dtype=dtype)
    sums = problem.sums(block_size=6)
    assert sums.total.dtype == torch.float32
    wide = Problem()
    for ours, theirs in zip(problem.inputs, wide.inputs, strict=True):
        theirs.data = ours.detach().double()
    wide.target = problem.target.double()
    torch.testing.assert_close(sums.total.double(), wide.plain(), rtol=1e-2, atol=0)
    grads = torch.autograd.grad(sums.total, problem.inputs)
    truth = torch.autograd.grad(wide.plain(), wide.inputs)
    for a, b in zip(grads, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_sums_of_half_gradients_do_not_overflow():
    """In float16 the sum over rows may exceed 65504 although the mean does not."""
    hidden = torch.full((4, 1), 100.0, dtype=torch.float16)
    weight = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    sums = block_losses(
        hidden, Head(weight), lambda z, block: {"x": 500 * z[:, 0]}, {"x": 1.0}, block_size=1
    )
    (sums.total / 4).backward()
    assert weight.grad is not None
    assert weight.grad[0].item() == pytest.approx(50_000, rel=1e-3)


def test_autocast_does_not_reach_the_losses():
    problem = Problem(dtype=torch.float32)
    expected = problem.sums(block_size=6)
    dtypes = set()

    def row_losses(logits, block):
        dtypes.add((logits @ logits.T).dtype)
        return problem.row_losses(logits, block)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = block_losses(problem.hidden, problem.head, row_losses, WEIGHTS, block_size=6)
    assert dtypes == {torch.float32}
    torch.testing.assert_close(sums.total, expected.total, rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_forms_no_gradient(context):
    problem = Problem()

    def row_losses(logits, block):
        assert not logits.requires_grad
        return problem.row_losses(logits, block)

    with context():
        sums = block_losses(problem.hidden, problem.head, row_losses, WEIGHTS, measure=True)
    assert not sums.total.requires_grad
    torch.testing.assert_close(sums.total, problem.plain().detach())


def test_zero_rows_keep_a_graph():
    problem = Problem()
    hidden = problem.hidden[:0]
    sums = block_losses(hidden, problem.head, problem.row_losses, WEIGHTS, measure=True)
    assert sums.total.item() == 0
    sums.total.backward()
    for x in problem.inputs:
        assert x.grad is not None
        assert (x.grad == 0).all()
    assert sums.terms == {"kd": 0, "ce": 0}
    assert sums.grad_norms == {"kd": 0, "ce": 0}


@pytest.mark.parametrize("block_size", [4, N])
def test_measured_norms_match_each_weighted_term(block_size):
    problem = Problem(softcap=3.0)
    plain_total = problem.sums(block_size=block_size).total
    sums = problem.sums(block_size=block_size, measure=True)
    assert sums.total == plain_total
    for name, value in problem.plain_terms().items():
        (grad,) = torch.autograd.grad(WEIGHTS[name] * value, problem.hidden, retain_graph=True)
        torch.testing.assert_close(sums.grad_norms[name], grad.norm(), rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(sums.total, problem.hidden)[0]
    expected = torch.autograd.grad(problem.plain(), problem.hidden)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_a_term_that_ignores_the_student_has_no_gradient():
    problem = Problem()

    def row_losses(logits, block):
        return {
            "dead": logits.detach()[:, 0],
            "dead_too": torch.ones(len(logits), requires_grad=True),
        }

    # "dead" has no graph at all; "dead_too" has one that does not reach the logits.
    weights = {"dead": 1.0, "dead_too": 1.0}
    sums = block_losses(problem.hidden, problem.head, row_losses, weights, measure=True)
    assert sums.grad_norms == {"dead": 0, "dead_too": 0}
    sums.total.backward()
    assert (problem.hidden.grad == 0).all()
    assert block_losses(problem.hidden, problem.head, lambda z, b: {}, {}).total == 0


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_no_tensor_has_rows_times_vocabulary_elements():
    rows, vocab, width = 40, 300, 4
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(vocab, (rows,))

    def row_losses(logits, block):
        target = torch.zeros(len(logits), vocab).log_softmax(-1)
        logq = logits.log_softmax(-1)
        ce = -logq.gather(1, labels[block, None]).squeeze(1)
        return {"kd": ForwardKL()(target, logq), "ce": ce}

    def largest(block_size):
        with LargestTensor() as watch:
            sums = block_losses(
                hidden, Head(weight), row_losses, WEIGHTS, block_size=block_size, measure=True
            )
            sums.total.backward()
        return watch.numel

    assert largest(rows) == rows * vocab
    assert largest(8) == 8 * vocab


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
        return out.mul_(beta).add_(alpha * (left.float() @ right.float()))

    # PyTorch implements this overload for CUDA only.
    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr("collegium.losses.chunked._adds_wide_products", lambda device: True)
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
    # Per block: the gradient of the hidden states, then of the head.
    assert wide_products == [(8, D), (V, D), (8, D), (V, D), (3, D), (V, D)]
    for ours, exact in zip(problem.inputs, truth.inputs, strict=True):
        assert ours.grad.dtype == dtype
        cosine = torch.cosine_similarity(ours.grad.double().flatten(), exact.grad.flatten(), 0)
        assert cosine > 0.9999


def test_float64_sums_of_half_products_use_two_operations(wide_products):
    sums, left, right = torch.ones(3, 2).double(), torch.ones(3, 4).half(), torch.ones(4, 2).half()
    add_product_(sums, left, right)
    assert wide_products == []
    assert torch.equal(sums, torch.full((3, 2), 5.0, dtype=torch.float64))
