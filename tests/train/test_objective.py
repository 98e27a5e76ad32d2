"""Objective against a naive reference: sum, gradient, and invariances."""

import dataclasses
import math
import re

import pydantic
import pytest
import torch

import reference_losses
from collegium.cache.options import Samples, TopK, capabilities_of
from collegium.distributions import Answer, DenseRows, HiddenRows, NamedRows
from collegium.errors import RecipeError, TrainingError
from collegium.fusion.conflict import TargetCorrection, TruthFallback
from collegium.fusion.fitted import Fixed
from collegium.fusion.fuse import FinishedTarget, Fusion
from collegium.fusion.requirements import check
from collegium.fusion.rules import Uniform
from collegium.losses.divergences import DIVERGENCES, JensenShannon, ReverseKL
from collegium.losses.features import FeatureLoss
from collegium.losses.pairing import FeatureOptions
from collegium.train.objective import InertTermCheck, Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Head, LossSum, Rows
from refusals import refused

N, V, D = 13, 17, 4
WIDTHS = {"a": 6, "b": 3}
MIX = Fusion(weighting=Fixed(weights={"a": 0.3, "b": 0.7}))


class Step:
    """A student and two teachers on N rows, in float64."""

    def __init__(self, *, head_scale=1.0, softcap=None, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = draw(N, D).requires_grad_()
        self.tap = draw(N, D).requires_grad_()
        self.weight = draw(V, D).requires_grad_()
        self.head_scale, self.softcap = head_scale, softcap
        self.teacher_logits = {name: 2 * draw(N, V) for name in WIDTHS}
        self.teacher_taps = {name: draw(N, width) for name, width in WIDTHS.items()}
        self.labels = torch.randint(V, (N,), generator=generator)

    def student(self, block=slice(None)):
        head = Head(self.weight, None, self.head_scale, self.softcap)
        return HiddenRows(self.hidden[block], head, {"layer_0": self.tap[block]})

    def teachers(self, block=slice(None)):
        return [
            Answer(
                name,
                DenseRows(self.teacher_logits[name][block]),
                {"layer_0": self.teacher_taps[name][block]},
            )
            for name in WIDTHS
        ]

    def rows(self, block=slice(None)):
        number = torch.arange(N)[block]
        return Rows(number, self.labels[block], number // 4, number // 4)

    def parts(self, block=slice(None)):
        return self.student(block), self.teachers(block), self.rows(block)

    def logits(self):
        return reference_losses.logits(
            self.hidden, self.weight, None, self.head_scale, self.softcap
        )

    def fused(self):
        p = {name: z.softmax(-1) for name, z in self.teacher_logits.items()}
        return 0.3 * p["a"] + 0.7 * p["b"]

    def grads(self, total, *more):
        return torch.autograd.grad(total, [self.hidden, self.weight, *more], retain_graph=True)


def objective(fusion: Fusion | None = MIX, *, features: FeatureOptions | None = None, **options):
    states = []
    if features is not None:
        teachers = {name: {"layer_0": width} for name, width in WIDTHS.items()}
        states = [FeatureLoss(features, {"layer_0": D}, teachers).double()]
    return Objective(ObjectiveOptions(features=features, **options), fusion, states=states)


def assert_same(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kd_ratio", [0.4, 1.0])
def test_equals_the_formula(divergence, temperature, kd_ratio):
    step = Step(head_scale=0.7, softcap=5.0)
    part = objective(
        kd_ratio=kd_ratio,
        temperature=temperature,
        divergence=DIVERGENCES[divergence](),
        block_size=5,
    )
    loss = row_losses(part, *step.parts())
    truth = reference_losses.objective(
        step.logits(),
        step.fused(),
        step.labels,
        kd_ratio=kd_ratio,
        temperature=temperature,
        divergence=divergence,
    )
    torch.testing.assert_close(loss.total, truth, rtol=1e-10, atol=1e-10)
    assert_same(step.grads(loss.total), step.grads(truth), 1e-10)
    assert loss.num_rows == N
    expected = {"kd": kd_ratio * temperature**2, "ce": 1 - kd_ratio}
    assert loss.weights == {name: weight for name, weight in expected.items() if weight > 0}
    assert set(loss.terms) == set(loss.weights)
    summed = sum(loss.weights[name] * value for name, value in loss.terms.items())
    torch.testing.assert_close(summed, loss.total.detach())


def test_the_temperature_keeps_the_size_of_the_gradient():
    """T^2 cancels the 1/T of both sides at high T, where the loss is half the squared distance."""
    norms = []
    for temperature in (50.0, 100.0):
        step = Step()
        loss = row_losses(objective(kd_ratio=1.0, temperature=temperature), *step.parts())
        norms.append(step.grads(loss.total)[0].norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert norms[0] > 0.01


@pytest.mark.parametrize("block_size", [1, 3, 7, 16, N])
@pytest.mark.parametrize("divergence", [JensenShannon(), ReverseKL()])
def test_blocks_change_nothing(block_size, divergence):
    step = Step()
    options = {"kd_ratio": 0.6, "temperature": 2.0, "divergence": divergence}
    whole = row_losses(objective(**options), *step.parts())
    blocks = row_losses(objective(block_size=block_size, **options), *step.parts())
    torch.testing.assert_close(blocks.total, whole.total, rtol=1e-12, atol=1e-12)
    assert_same(step.grads(blocks.total), step.grads(whole.total))
    torch.testing.assert_close(blocks.teacher_weights_KN, whole.teacher_weights_KN)


def test_fusion_weights_are_kept():
    loss = row_losses(objective(block_size=5), *Step().parts())
    assert loss.teacher_weights_KN is not None
    expected = torch.tensor([[0.3], [0.7]], dtype=torch.float64).expand(2, N)
    torch.testing.assert_close(loss.teacher_weights_KN, expected)
    assert not loss.teacher_weights_KN.requires_grad


@pytest.mark.parametrize("cuts", [(4, 13), (1, 2, 8, 13), (0, 13)])
def test_micro_batches_change_nothing(cuts):
    """Two optimizer steps, so that the second runs with scales measured in the first."""
    step = Step()
    whole = objective(kd_ratio=0.6, features=FeatureOptions(weight=0.5))
    split = objective(kd_ratio=0.6, features=FeatureOptions(weight=0.5))
    for _ in range(2):
        a = row_losses(whole, *step.parts()).total
        ends = zip((0, *cuts), cuts, strict=False)
        b = sum(row_losses(split, *step.parts(slice(start, end))).total for start, end in ends)
        grads_a = step.grads(a, step.tap, *whole.parameters())
        grads_b = step.grads(b, step.tap, *split.parameters())
        assert_same(grads_a, grads_b, 1e-11)
        whole.end_step()
        split.end_step()
        assert whole.states[0].weights() == pytest.approx(split.states[0].weights(), rel=1e-12)
        assert whole.states[0].weights()["feature/a"] != 0.5


def test_gradient_norms_do_not_depend_on_the_block_size():
    step = Step()
    norms = [
        row_losses(objective(kd_ratio=0.6, block_size=size), *step.parts(), measure=True).grad_norms
        for size in (1, 3, 100)
    ]
    for one in norms[:2]:
        assert one.keys() == {"kd", "ce"}
        for name, norm in one.items():
            torch.testing.assert_close(norm, norms[2][name])


def test_a_scale_holds_until_the_step_ends():
    step = Step()
    part = objective(features=FeatureOptions(weight=0.5))
    first = row_losses(part, *step.parts())
    assert row_losses(part, *step.parts()).weights == first.weights
    assert first.weights["feature/a"] == 0.5
    part.end_step()
    after = row_losses(part, *step.parts())
    ratio = 0.9 * first.terms["kd"] / first.terms["feature/a"]
    assert after.weights["feature/a"] == pytest.approx(0.5 * ratio.item())
    # Each feature term is now worth half of the distribution loss.
    share = after.weights["feature/a"] * after.terms["feature/a"]
    assert share.item() == pytest.approx(0.5 * 0.9 * after.terms["kd"].item())


def test_evaluation_does_not_move_the_scale():
    part = objective(features=FeatureOptions())
    with torch.no_grad():
        loss = row_losses(part, *Step().parts(), measure=True)
    part.end_step()
    assert not loss.total.requires_grad
    assert row_losses(part, *Step().parts()).weights["feature/a"] == 1.0


def test_features_without_kd_are_scaled_by_the_cross_entropy():
    part = objective(None, kd_ratio=0.0, features=FeatureOptions())
    assert part.needs_teachers
    first = row_losses(part, *Step().parts())
    assert set(first.terms) == {"ce", "feature/a", "feature/b"}
    part.end_step()
    ratio = first.terms["ce"] / first.terms["feature/b"]
    assert row_losses(part, *Step().parts()).weights["feature/b"] == pytest.approx(ratio.item())


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_equal_to_its_teacher_is_at_rest(divergence, temperature):
    step = Step()
    step.teacher_logits = dict.fromkeys(WIDTHS, step.logits().detach())
    part = objective(
        kd_ratio=1.0, temperature=temperature, divergence=DIVERGENCES[divergence](), block_size=4
    )
    loss = row_losses(part, *step.parts())
    assert loss.total.abs().item() < 1e-12
    if divergence == "total_variation":
        return  # the minimum is a kink: its gradient is the sign of rounding errors
    for grad in step.grads(loss.total):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


def test_clones_of_one_teacher_are_that_teacher():
    step = Step()
    student, (teacher, _), rows = step.parts()
    clones = [Answer(f"c{i}", teacher.distribution) for i in range(3)]
    part = objective(Fusion(weighting=Uniform()), temperature=2.0)
    one, many = (row_losses(part, student, answers, rows) for answers in ([teacher], clones))
    torch.testing.assert_close(many.total, one.total, rtol=1e-12, atol=0)
    assert_same(step.grads(many.total), step.grads(one.total))


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 20.0])
def test_gradients_stay_finite(divergence, temperature):
    """Sharp float32 logits, and tokens ruled out by the teachers."""
    step = Step()
    step.teacher_logits = {name: (10 * z).float() for name, z in step.teacher_logits.items()}
    for z in step.teacher_logits.values():
        z[:, 3] = -math.inf
        z[2, 5:] = -math.inf
    step.hidden = (5 * step.hidden.detach()).float().requires_grad_()
    step.weight = step.weight.detach().float().requires_grad_()
    part = objective(temperature=temperature, divergence=DIVERGENCES[divergence](), block_size=4)
    loss = row_losses(part, *step.parts())
    assert loss.total.isfinite()
    assert loss.total.dtype == torch.float32
    assert all(grad.isfinite().all() for grad in step.grads(loss.total))


def test_positions_outside_the_rows_do_not_exist():
    """NaN in the states of untrained positions reaches neither the loss nor any gradient."""
    step, index = Step(), torch.arange(0, 2 * N, 2)
    everything = torch.full((2 * N, D), math.nan, dtype=torch.float64)
    everything[index] = step.hidden.detach()
    everything.requires_grad_()
    part = objective(block_size=4)
    student, teachers, rows = step.parts()
    expected = row_losses(part, student, teachers, rows).total
    student = HiddenRows(everything[index], student.head)
    loss = row_losses(part, student, teachers, rows).total
    assert loss == expected
    loss.backward()
    assert everything.grad is not None
    assert everything.grad.isfinite().all()
    assert (everything.grad[1::2] == 0).all()


def test_labels_only():
    step = Step()
    student, _, rows = step.parts()
    truth = torch.nn.functional.cross_entropy(step.logits(), step.labels, reduction="sum")
    for part in (objective(None), objective(None, kd_ratio=1.0), objective(MIX, kd_ratio=0.0)):
        assert not part.needs_teachers
        loss = row_losses(part, student, [], rows)
        torch.testing.assert_close(loss.total, truth)
        assert loss.weights == {"ce": 1.0}
        assert loss.teacher_weights_KN is None
        assert part.student_taps == part.teacher_taps("a") == []
        part.end_step()


class Unread(DenseRows):
    """Logits that must not be read."""

    def logits(self, block: slice) -> torch.Tensor:
        raise AssertionError("read")


def test_a_term_without_weight_is_not_computed():
    step = Step()
    student, _, rows = step.parts()
    answers = [Answer("a", Unread(torch.zeros(N, V)))]
    loss = row_losses(objective(kd_ratio=0.0), student, answers, rows)
    assert set(loss.terms) == {"ce"}
    wrong_labels = Rows(
        rows.index, torch.full_like(rows.labels, V + 5), rows.documents, rows.samples
    )
    part = objective(Fusion(weighting=Uniform()), kd_ratio=1.0)
    answers = [Answer("a", DenseRows(step.teacher_logits["a"]))]
    assert set(row_losses(part, student, answers, rows).terms) == {"kd"}
    with pytest.raises(RuntimeError):
        row_losses(objective(None), student, [], wrong_labels)


def test_no_rows():
    step = Step()
    loss = row_losses(objective(features=FeatureOptions()), *step.parts(slice(0, 0)), measure=True)
    assert loss.total.item() == 0
    assert loss.num_rows == 0
    for grad in step.grads(loss.total):
        assert (grad == 0).all()


def test_taps_are_those_of_the_feature_terms():
    part = objective(features=FeatureOptions(teacher_weights={"b": 0.0}))
    assert part.needs_teachers
    assert part.student_taps == ["layer_0"]
    assert part.teacher_taps("a") == ["layer_0"]
    assert part.teacher_taps("b") == []
    assert len(list(part.parameters())) == 1
    off = objective(None, kd_ratio=0.0, features=FeatureOptions(weight=0.0))
    assert not off.needs_teachers
    assert set(row_losses(off, *Step().parts()).terms) == {"ce"}


def test_feature_terms_add_up():
    step = Step()
    part = objective(kd_ratio=0.6, features=FeatureOptions(weight=0.5, teacher_weights={"b": 3.0}))
    loss, plain = (
        row_losses(part, *step.parts()),
        row_losses(objective(kd_ratio=0.6), *step.parts()),
    )
    values = {
        name: reference_losses.feature_mse(step.tap, step.teacher_taps[name], group[0].weight).sum()
        for name, group in zip(WIDTHS, part.states[0].adapters, strict=True)
    }
    torch.testing.assert_close(
        loss.total, plain.total + 0.5 * values["a"] + 1.5 * values["b"], rtol=1e-4, atol=1e-4
    )
    assert loss.weights["feature/b"] == 1.5
    assert not loss.terms["feature/a"].requires_grad


def test_measured_norms():
    step = Step()
    part = objective(kd_ratio=0.6, temperature=2.0, features=FeatureOptions(weight=0.5))
    loss, plain = row_losses(part, *step.parts(), measure=True), row_losses(part, *step.parts())
    assert plain.grad_norms == {}
    assert loss.total == plain.total
    assert set(loss.grad_norms) == {"kd", "ce", "feature/a", "feature/b"}
    kd = row_losses(objective(kd_ratio=1.0, temperature=2.0), *step.parts()).total * 0.6
    torch.testing.assert_close(loss.grad_norms["kd"], step.grads(kd)[0].norm())
    only_b = objective(
        None, kd_ratio=0.0, features=FeatureOptions(weight=0.5, teacher_weights={"a": 0.0})
    )
    only_b.states[0].adapters[0].load_state_dict(part.states[0].adapters[1].state_dict())
    (grad,) = torch.autograd.grad(row_losses(only_b, *step.parts()).total, step.tap)
    torch.testing.assert_close(loss.grad_norms["feature/b"], grad.norm())
    step.tap = step.tap.detach()
    frozen = row_losses(part, *step.parts(), measure=True).grad_norms
    assert frozen["feature/b"] == 0
    assert frozen["kd"] == loss.grad_norms["kd"]


def test_teachers_need_a_fusion():
    with refused(RecipeError, "fusion: "):
        row_losses(objective(None), *Step().parts())


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_no_temperature_of_zero(temperature):
    message = re.escape("must be > 0; for hard labels use kd_ratio: 0")
    with pytest.raises(pydantic.ValidationError, match=message):
        ObjectiveOptions(temperature=temperature)


@pytest.mark.parametrize(
    "wrong", [{"kd_ratio": 1.1}, {"kd_ratio": -0.1}, {"block_size": 0}, {"beta": 1}]
)
def test_wrong_options(wrong):
    with pytest.raises(pydantic.ValidationError):
        ObjectiveOptions(**wrong)


def measured(num_rows=5, **norms: float) -> LossSum:
    return LossSum(
        total=torch.zeros(()),
        terms={name: torch.ones(()) for name in norms},
        weights={name: 0.0 if name == "off" else 0.5 for name in norms},
        grad_norms={name: torch.tensor(norm) for name, norm in norms.items()},
        rows=Rows(*[torch.arange(num_rows)] * 4),
    )


def test_an_inert_term_is_named():
    check = InertTermCheck()
    check(measured(kd=0.0, ce=1.0, off=0.0))
    check(measured(0, kd=0.0, ce=0.0))
    check(measured())
    check(measured(kd=0.0, ce=0.0, off=0.0))
    with refused(TrainingError, "term `kd`: "):
        check(measured(kd=0.0, ce=0.0, off=0.0))


def test_terms_that_move_once_are_alive():
    check = InertTermCheck()
    for norm in (0.0, 1e-30, 0.0, 0.0, 0.0, 0.0):
        check(measured(kd=norm, ce=math.nan))


CONTRADICTION = Fusion(weighting=MIX.weighting, conflict=TruthFallback(power=2.0))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd_ratio", [0.4, 1.0])
@pytest.mark.parametrize("block_size", [4, N])
def test_truth_fallback_moves_weight_from_the_teachers_to_the_label(
    kd_ratio, temperature, block_size
):
    """L = sum_n lambda_n T^2 D_n + (1 - lambda_n) CE_n, lambda_n = lambda (1 - c_n)^2."""
    step = Step()
    options = {"kd_ratio": kd_ratio, "temperature": temperature, "block_size": block_size}
    loss = row_losses(objective(CONTRADICTION, **options), *step.parts())
    p = {name: z.softmax(-1) for name, z in step.teacher_logits.items()}
    entropy = {name: torch.special.entr(q).sum(-1) for name, q in p.items()}
    jsd_N = torch.special.entr(step.fused()).sum(-1) - 0.3 * entropy["a"] - 0.7 * entropy["b"]
    conflict_N = jsd_N / -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    lambda_N = kd_ratio * (1 - conflict_N) ** 2
    target_NV = (step.fused().log() / temperature).log_softmax(-1)
    student_NV = (step.logits() / temperature).log_softmax(-1)
    kd_N = (target_NV.exp() * (target_NV - student_NV)).sum(-1)
    ce_N = torch.nn.functional.cross_entropy(step.logits(), step.labels, reduction="none")
    truth = (lambda_N * temperature**2 * kd_N + (1 - lambda_N) * ce_N).sum()
    torch.testing.assert_close(loss.total, truth, rtol=1e-10, atol=1e-10)
    assert_same(step.grads(loss.total), step.grads(truth), 1e-10)
    assert loss.weights["truth"] == kd_ratio
    torch.testing.assert_close(loss.conflict["disagreement"], conflict_N)
    torch.testing.assert_close(loss.conflict["applied"], 1 - (1 - conflict_N) ** 2)


def test_clones_never_fall_back_to_the_truth():
    step = Step()
    step.teacher_logits["b"] = step.teacher_logits["a"]
    loss, plain = (row_losses(objective(fusion), *step.parts()) for fusion in (CONTRADICTION, MIX))
    torch.testing.assert_close(loss.total, plain.total)
    assert loss.terms["truth"].abs() < 1e-9
    assert loss.conflict["applied"].max() < 1e-12
    assert plain.conflict == {}


def test_labels_only_have_no_conflict():
    loss = row_losses(objective(CONTRADICTION, kd_ratio=0.0), *Step().parts())
    assert set(loss.terms) == {"ce"}
    assert loss.conflict == {}


def test_a_target_correction_reaches_the_student():
    step = Step()
    fusion = Fusion(weighting=MIX.weighting, conflict=TargetCorrection(margin=0.3))
    loss = row_losses(objective(fusion, kd_ratio=1.0, block_size=5), *step.parts())
    p_NV = step.fused()
    at = torch.arange(N)
    gap_N = p_NV.amax(-1) - p_NV[at, step.labels]
    m_N = torch.where(gap_N > 0, (gap_N + 0.3) / (1 + gap_N), 0.0)
    target_NV = (1 - m_N)[:, None] * p_NV
    target_NV[at, step.labels] += m_N
    truth = (target_NV * (target_NV.log() - step.logits().log_softmax(-1))).sum()
    torch.testing.assert_close(loss.total, truth, rtol=1e-10, atol=1e-10)
    assert_same(step.grads(loss.total), step.grads(truth), 1e-10)
    torch.testing.assert_close(loss.conflict["applied"], (gap_N > 0).double())
    assert set(loss.terms) == {"kd"}


def test_teachers_that_agree_are_not_an_inert_term():
    step = Step()
    step.teacher_logits["b"] = step.teacher_logits["a"]
    part, watch = objective(CONTRADICTION), InertTermCheck(1)
    loss = row_losses(part, *step.parts(), measure=True)
    watch(dataclasses.replace(loss, grad_norms={**loss.grad_norms, "truth": torch.zeros(())}))


def _finished(step: Step, *, k: int | None = None) -> FinishedTarget:
    """Return teacher `a` as a finished target, either complete or as its top k with the tail."""
    logp = step.teacher_logits["a"].log_softmax(-1)
    top = logp.topk(V if k is None else k)
    starts = torch.arange(N + 1) * top.values.shape[1]
    tail = None if k is None else logp.scatter(1, top.indices, -torch.inf).logsumexp(1)
    return FinishedTarget(NamedRows(starts, top.indices.flatten(), top.values.flatten(), tail, V))


@pytest.mark.parametrize(
    "divergence", sorted(n for n, option in DIVERGENCES.items() if not option.needs_all_tokens)
)
@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_a_finished_target_gives_the_loss_and_gradient_of_the_live_one(
    block_size: int, divergence: str
) -> None:
    results = []
    for is_finished in (False, True):
        step = Step()
        part = objective(
            Fusion(weighting=Uniform()),
            kd_ratio=0.7,
            block_size=block_size,
            divergence=DIVERGENCES[divergence](),
        )
        student, teachers, rows = step.parts()
        target = _finished(step) if is_finished else None
        answers = [] if is_finished else teachers[:1]
        loss = row_losses(part, student, answers, rows, target=target, measure=True)
        loss.total.backward()
        results.append((loss, step))
    (live, live_step), (finished, finished_step) = results
    torch.testing.assert_close(finished.total, live.total)
    for name in ("kd", "ce"):
        torch.testing.assert_close(finished.terms[name], live.terms[name])
        torch.testing.assert_close(finished.grad_norms[name], live.grad_norms[name])
    torch.testing.assert_close(finished_step.hidden.grad, live_step.hidden.grad)
    torch.testing.assert_close(finished_step.weight.grad, live_step.weight.grad)
    assert finished.teacher_weights_KN is None


@pytest.mark.parametrize("kd_ratio", [0.0, 1.0])
def test_a_finished_target_without_one_of_the_terms(kd_ratio: float) -> None:
    step = Step()
    student, _, rows = step.parts()
    part = objective(Fusion(weighting=Uniform()), kd_ratio=kd_ratio)
    loss = row_losses(part, student, [], rows, target=_finished(step, k=3))
    assert set(loss.terms) == ({"kd"} if kd_ratio else {"ce"})


DRAWS, TOP_K = (capabilities_of("fused", targets, ()) for targets in (Samples(), TopK()))


@pytest.mark.parametrize(
    ("source", "options", "path"),
    [
        (DRAWS, ObjectiveOptions(divergence=ReverseKL()), "objective.divergence: got ReverseKL"),
        (DRAWS, ObjectiveOptions(divergence=JensenShannon()), "objective.divergence: got Jensen"),
        (DRAWS, ObjectiveOptions(temperature=2.0), "objective.temperature: got 2"),
        (TOP_K, ObjectiveOptions(temperature=2.0), "objective.temperature: got 2"),
        (DRAWS, ObjectiveOptions(features=FeatureOptions()), "objective.features: "),
        (TOP_K, ObjectiveOptions(features=FeatureOptions()), "objective.features: "),
    ],
)
def test_a_cache_refuses_unsupported_options(source, options, path) -> None:
    with refused(RecipeError, path):
        check(options.requirements(), [source])
    for supported in (ReverseKL(), JensenShannon()):
        check(ObjectiveOptions(divergence=supported).requirements(), [TOP_K])
