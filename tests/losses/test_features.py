"""Layer maps, adapters and feature terms against reference formulas."""

import copy

import pydantic
import pytest
import torch
from torch import nn

import reference_losses
from collegium.distributions import Answer, DenseRows, HiddenRows
from collegium.errors import RecipeError, TrainingError
from collegium.losses.features import FeatureLoss, cka_distance
from collegium.losses.pairing import FeatureOptions, feature_map
from collegium.types import Head, Rows
from refusals import refused

N = 6
STUDENT = {"embed": 4, "layer_0": 4, "layer_1": 4, "final_prenorm": 4, "final_postnorm": 4}
# A dot in the name of a teacher, which nn.ModuleDict would reject.
TEACHERS = {
    "big.v1": {"embed": 7, **{f"layer_{i}": 7 for i in range(6)}, "final_postnorm": 7},
    "small": {"embed": 3, "layer_0": 3, "layer_1": 3, "layer_2": 3, "final_postnorm": 3},
}


def taps(count: int) -> list[str]:
    return ["embed", *(f"layer_{i}" for i in range(count)), "final_prenorm", "final_postnorm"]


def features_of(widths, seed, *, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return {
        tap: torch.randn(N, width, generator=generator).requires_grad_(grad)
        for tap, width in widths.items()
    }


def teacher_rows(dtype=torch.float32):
    return [
        Answer(
            name,
            DenseRows(torch.zeros(N, 2)),
            {tap: x.to(dtype) for tap, x in features_of(widths, i + 1).items()},
        )
        for i, (name, widths) in enumerate(TEACHERS.items())
    ]


ROWS = Rows(*[torch.arange(N)] * 4)


def values_of(terms, features, answers):
    """Terms of a student with these hidden states."""
    head = Head(torch.zeros(2, 1))
    return terms(HiddenRows(torch.zeros(N, 1), head, features), answers, ROWS)


def build(seed=0, **options):
    return FeatureLoss(FeatureOptions(**options), STUDENT, TEACHERS, seed=seed)


@pytest.mark.parametrize(
    ("options", "ours", "theirs", "expected"),
    [
        ({}, 4, 12, [(3, 11)]),
        ({"num_layers": 2}, 4, 12, [(1, 5), (3, 11)]),
        ({"num_layers": 4}, 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ({"num_layers": 3}, 4, 7, [(1, 2), (2, 4), (3, 6)]),
        ({"num_layers": 2}, 2, 2, [(0, 0), (1, 1)]),
        ({"layers": "last", "num_layers": 9}, 4, 12, [(3, 11)]),
    ],
)
def test_feature_map(options, ours, theirs, expected):
    pairs = feature_map(FeatureOptions(**options), taps(ours), taps(theirs))
    assert pairs == [(f"layer_{i}", f"layer_{j}") for i, j in expected]


def test_explicit_pairs():
    options = FeatureOptions(layers={"final_postnorm": "layer_3", "embed": "embed"})
    assert feature_map(options, taps(2), taps(5)) == [
        ("final_postnorm", "layer_3"),
        ("embed", "embed"),
    ]


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"layers": {"layer_2": "layer_0"}}, "features.layers"),
        ({"layers": {"layer_0": "layer_9"}}, "features.layers"),
        ({"num_layers": 3}, "features.num_layers"),
    ],
    ids=["student", "teacher", "too-many"],
)
def test_impossible_maps(options, where):
    with refused(RecipeError, where):
        feature_map(FeatureOptions(**options), taps(2), taps(3))


def test_invalid_options():
    with refused(RecipeError, "features.teacher_weights"):
        build(teacher_weights={"smal": 1.0})
    for invalid in (
        {"num_layers": 0},
        {"weight": -1.0},
        {"loss": "l1"},
        {"teacher_weights": {"a": -1.0}},
    ):
        with pytest.raises(pydantic.ValidationError):
            FeatureOptions(**invalid)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_equals_the_formula(loss):
    terms = build(loss=loss, num_layers=2)
    student, teachers = features_of(STUDENT, 0), teacher_rows()
    values = values_of(terms, student, teachers)
    assert list(values) == ["feature/big.v1", "feature/small"]
    formula = reference_losses.feature_mse if loss == "mse" else reference_losses.feature_cosine
    pairs = [("layer_0", "layer_2"), ("layer_1", "layer_5")]
    expected = sum(
        formula(
            student[ours].double(), teachers[0].features[theirs].double(), adapter.weight.double()
        )
        for (ours, theirs), adapter in zip(pairs, terms.adapters[0], strict=True)
    )
    assert terms.pairs["big.v1"] == pairs
    torch.testing.assert_close(
        values["feature/big.v1"].double(), expected / 2, rtol=1e-4, atol=1e-5
    )


def test_raw_mse_is_the_sum_of_squares_of_the_paper():
    terms = build(loss="raw_mse", layers="last")
    student, teachers = features_of(STUDENT, 0), teacher_rows()
    values = values_of(terms, student, teachers)
    ours, theirs = terms.pairs["small"][0]
    expected = reference_losses.feature_sum_of_squares(
        student[ours], teachers[1].features[theirs], terms.adapters[1][0].weight
    )
    torch.testing.assert_close(values["feature/small"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_cka_equals_the_formula(scale):
    terms = build(loss="cka", layers="last")
    assert not list(terms.parameters())
    student, teachers = features_of(STUDENT, 0, grad=True), teacher_rows()
    scaled = {tap: x * scale for tap, x in student.items()}
    values = values_of(terms, scaled, teachers)["feature/big.v1"]
    ours, theirs = terms.pairs["big.v1"][0]
    exact = student[ours].detach().double().requires_grad_()
    expected = 1 - reference_losses.linear_cka(exact, teachers[0].features[theirs].double())
    assert values.tolist() == pytest.approx([expected.item()] * N, rel=1e-5)
    values.sum().backward()
    (N * expected).backward()
    torch.testing.assert_close(student[ours].grad.double(), exact.grad, rtol=1e-3, atol=1e-6)


def test_cka_is_invariant_and_finite():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(30, 4, generator=generator), torch.randn(30, 6, generator=generator)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    value = cka_distance(x, y)[0].item()
    assert 0 < value < 1
    assert cka_distance(x + 7, 3 * y @ turn - 2)[0].item() == pytest.approx(value, abs=1e-5)
    assert cka_distance(y, y @ turn).abs().max() < 1e-5
    for rows in (0, 1, 5):
        constant = torch.ones(rows, 4, requires_grad=True)
        distance = cka_distance(constant, y[:rows])
        distance.sum().backward()
        assert distance.tolist() == [1.0] * rows
        assert (constant.grad == 0).all()


def test_a_shared_adapter_reduces_the_terms_to_the_mean_of_the_teachers():
    widths = {name: {"layer_0": 5} for name in ("a", "b", "c")}
    terms = FeatureLoss(
        FeatureOptions(loss="raw_mse", adapters="shared"), {"layer_0": 4}, widths, seed=1
    )
    assert len({id(adapter) for row in terms.adapters for adapter in row}) == 1
    student = features_of({"layer_0": 4}, 0, grad=True)
    answers = [
        Answer(name, DenseRows(torch.zeros(N, 2)), features_of({"layer_0": 5}, i + 1))
        for i, name in enumerate(widths)
    ]
    total = sum(value.sum() for value in values_of(terms, student, answers).values())
    (grad,) = torch.autograd.grad(total, student["layer_0"])
    mean = torch.stack([answer.features["layer_0"] for answer in answers]).mean(0)
    one = 3 * reference_losses.feature_sum_of_squares(
        student["layer_0"], mean, terms.adapters[0][0].weight
    )
    (expected,) = torch.autograd.grad(one.sum(), student["layer_0"])
    torch.testing.assert_close(grad, expected)


def test_teachers_of_other_widths_are_projected_to_the_narrowest():
    terms = build(loss="mse", adapters="shared", layers="last")
    assert [tuple(row[0].weight.shape) for row in terms.adapters] == [(3, 4), (3, 4)]
    (projection,), (none,) = terms._projections
    assert none is None
    torch.testing.assert_close(projection.T @ projection, torch.eye(3))
    student, teachers = features_of(STUDENT, 0), teacher_rows()
    values = values_of(terms, student, teachers)
    ours, theirs = terms.pairs["big.v1"][0]
    expected = reference_losses.feature_mse(
        student[ours], teachers[0].features[theirs] @ projection, terms.adapters[0][0].weight
    )
    torch.testing.assert_close(values["feature/big.v1"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(projection, build(adapters="shared", layers="last")._projections[0][0])


def test_terms_do_not_depend_on_the_scale_of_the_states():
    terms, student, teachers = build(), features_of(STUDENT, 0), teacher_rows()
    # Raw norms differ by orders of magnitude between model families.
    huge = [
        Answer(t.name, t.distribution, {k: 1000 * x for k, x in t.features.items()})
        for t in teachers
    ]
    small = {tap: 10 * x for tap, x in student.items()}
    for name, value in values_of(terms, student, teachers).items():
        torch.testing.assert_close(values_of(terms, small, huge)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1.0, 1e20])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_normalization_is_relative(loss, scale):
    terms = FeatureLoss(FeatureOptions(loss=loss), {"layer_0": 5}, {"small": {"layer_0": 5}})
    with torch.no_grad():
        terms.adapters[0][0].weight.copy_(torch.eye(5))
    state = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
    other = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
    results = []
    for ours, theirs in ((scale * state, scale * state), (scale * state, other), (state, other)):
        ours = ours.clone().requires_grad_()
        answers = [Answer("small", DenseRows(torch.zeros(N, 2)), {"layer_0": theirs})]
        value_N = values_of(terms, {"layer_0": ours}, answers)["feature/small"]
        results.append((value_N.detach(), torch.autograd.grad(value_N.sum(), ours)[0]))
    (of_itself, _), (value, gradient), (expected, expected_gradient) = results
    assert of_itself.abs().max() < 1e-6
    torch.testing.assert_close(value, expected)
    # The loss does not depend on the scale, so its gradient is inversely proportional to it.
    torch.testing.assert_close(scale * gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_a_zero_state_has_a_finite_gradient():
    terms, teachers = build(), teacher_rows()
    student = {tap: torch.zeros(N, width).requires_grad_() for tap, width in STUDENT.items()}
    sum(value.sum() for value in values_of(terms, student, teachers).values()).backward()
    assert student["layer_1"].grad.isfinite().all()


def test_one_adapter_per_teacher_and_pair():
    terms = build(num_layers=2)
    shapes = [[tuple(a.weight.shape) for a in group] for group in terms.adapters]
    assert shapes == [[(7, 4), (7, 4)], [(3, 4), (3, 4)]]
    assert len(list(terms.parameters())) == 4
    assert terms.student_taps == ["layer_0", "layer_1"]
    assert terms.teacher_taps("small") == ["layer_1", "layer_2"]
    assert terms.teacher_taps("unknown") == []


def test_initial_adapters_depend_only_on_the_seed():
    state = torch.get_rng_state()
    one = build(seed=3)
    # The global generator does not advance, and its state has no effect.
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    two, other = build(seed=3), build(seed=4)
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_a_teacher_with_weight_0_has_no_adapter():
    terms = build(weight=0.5, teacher_weights={"big.v1": 0.0, "small": 3.0})
    assert list(terms.pairs) == ["small"]
    assert terms.weights() == {"feature/small": 1.5}
    assert list(values_of(terms, features_of(STUDENT, 0), teacher_rows())) == ["feature/small"]
    assert list(values_of(terms, features_of(STUDENT, 0), teacher_rows()[1:])) == ["feature/small"]
    with refused(TrainingError, "feature/small"):
        values_of(terms, features_of(STUDENT, 0), teacher_rows()[:1])


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_gradients_reach_adapters_and_student_but_no_teacher(loss):
    terms = build(loss=loss, num_layers=2)
    student = features_of(STUDENT, 0, grad=True)
    teachers = [
        Answer(name, DenseRows(torch.zeros(N, 2)), features_of(widths, 5, grad=True))
        for name, widths in TEACHERS.items()
    ]
    before = [p.detach().clone() for p in terms.parameters()]
    optimizer = torch.optim.SGD(terms.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        total = sum(x.sum() for x in values_of(terms, student, teachers).values())
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0]
    # An adapter that is frozen by mistake goes unnoticed: roymiles/Simple-Recipe-Distillation#1.
    for p, old in zip(terms.parameters(), before, strict=True):
        assert not torch.equal(p, old)
    for tap, x in student.items():
        assert (x.grad is not None) == (tap in terms.student_taps)
    assert all(x.grad is None for t in teachers for x in t.features.values())


def test_half_precision_states_and_autocast():
    terms, student = build(), features_of(STUDENT, 0)
    truth = values_of(terms, student, teacher_rows())
    half = {tap: x.bfloat16() for tap, x in student.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = values_of(terms, student, teacher_rows())
        rounded = values_of(terms, half, teacher_rows(torch.bfloat16))
    for name, value in truth.items():
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(exact[name], value, rtol=0, atol=0)
        torch.testing.assert_close(rounded[name], value, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_zero_states_have_a_finite_gradient(loss):
    terms = build(loss=loss)
    student = {tap: torch.zeros(N, width, requires_grad=True) for tap, width in STUDENT.items()}
    sum(x.sum() for x in values_of(terms, student, teacher_rows()).values()).backward()
    assert student["layer_1"].grad is not None
    assert student["layer_1"].grad.isfinite().all()


def record(terms, reference, big, small):
    sums = {"feature/big.v1": torch.tensor(big), "feature/small": torch.tensor(small)}
    terms.record(torch.tensor(reference), sums)


def test_scale_is_the_loss_ratio_of_the_previous_step():
    terms = build(weight=0.1, teacher_weights={"small": 2.0})
    assert terms.weights() == pytest.approx({"feature/big.v1": 0.1, "feature/small": 0.2})
    record(terms, 6.0, 2.0, 20.0)
    record(terms, 2.0, 2.0, 20.0)
    assert terms.weights() == pytest.approx({"feature/big.v1": 0.1, "feature/small": 0.2})
    terms.end_step()
    assert terms.weights() == pytest.approx({"feature/big.v1": 0.2, "feature/small": 0.04})
    record(terms, 8.0, 1.0, 8.0)
    terms.end_step()
    assert terms.weights() == pytest.approx({"feature/big.v1": 0.8, "feature/small": 0.2})


def test_unusable_steps_keep_the_scale():
    terms = build()
    record(terms, 6.0, 2.0, 3.0)
    terms.end_step()
    kept = terms.weights()
    terms.end_step()
    # No rows, NaN, a distribution loss of 0, a feature loss of 0.
    for sums in [(0.0, 0.0, 0.0), (float("nan"), 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.0, 0.0)]:
        record(terms, *sums)
        terms.end_step()
        assert terms.weights() == kept


def test_scale_is_saved_and_can_be_disabled():
    terms = build()
    record(terms, 6.0, 2.0, 3.0)
    terms.end_step()
    other = build(seed=1)
    other.load_state_dict(copy.deepcopy(terms.state_dict()))
    assert other.weights() == terms.weights() != build().weights()
    off = build(dynamic_scale=False)
    record(off, 6.0, 2.0, 3.0)
    off.end_step()
    assert off.weights() == {"feature/big.v1": 1.0, "feature/small": 1.0}


def test_scale_sums_over_all_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(1.0))
    terms = build()
    record(terms, 6.0, 0.0, 3.0)
    terms.end_step()
    assert terms.weights() == pytest.approx({"feature/big.v1": 7.0, "feature/small": 7 / 4})


def test_adapters_are_plain_linear_maps():
    assert all(
        isinstance(a, nn.Linear) and a.bias is None for group in build().adapters for a in group
    )


def test_adapters_initially_preserve_the_size_of_their_inputs():
    terms = FeatureLoss(FeatureOptions(), {"layer_0": 256}, {"small": {"layer_0": 512}})
    state = torch.randn(50, 256, generator=torch.Generator().manual_seed(1))
    size = terms.adapters[0][0](state).detach().square().mean().sqrt()
    assert 0.9 < float(size) < 1.1
