"""An objective as a list of terms: both forms, several divergences, domains, stages, resuming."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from transformers import TrainerCallback

import reference_losses
from collegium.cache.options import Samples, TopK, capabilities_of
from collegium.config.yaml import decode, read_yaml
from collegium.distributions import LIVE, Answer, DenseRows, NamedRows
from collegium.errors import DataError, Interrupted, RecipeError, TrainingError
from collegium.fusion.conflict import TargetCorrection, TruthFallback
from collegium.fusion.fuse import FinishedTarget, Fusion
from collegium.fusion.requirements import check, check_teachers
from collegium.losses.divergences import DIVERGENCES, ReverseKL, SkewedForwardKL
from collegium.losses.pairing import FeatureOptions
from collegium.losses.row_terms import CrossEntropyTerm, DivergenceTerm, RouterTerm
from collegium.losses.schedule import Linear, ScheduleStage, Stages
from collegium.models.forward import tap_names, tap_width
from collegium.storage.records import read_log
from collegium.train.objective import InertTermCheck, Objective, state_losses
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Rows, domain_number
from refusals import refused
from train.test_objective import MIX, WIDTHS, D, N, Step, V, assert_same
from train.test_resume import FakeStop
from training_runs import Windows, small_model, trainer


def built(options: ObjectiveOptions, fusion: Fusion | None = MIX) -> Objective:
    widths = {name: {"layer_0": width} for name, width in WIDTHS.items()}
    states = [one.double() for one in state_losses(options, {"layer_0": D}, widths)]
    return Objective(options, fusion, states=states)


def listed(*terms: Any, block_size: int = 5) -> ObjectiveOptions:
    return ObjectiveOptions(terms=list(terms), block_size=block_size)


def with_domains(rows: Rows, *names: str) -> Rows:
    """Rows whose documents have these domains in turn."""
    numbers = torch.tensor([domain_number(name) for name in names])
    return dataclasses.replace(rows, domains=numbers[rows.documents % len(names)])


def outputs(part: Objective, step: Step) -> list[torch.Tensor]:
    loss = row_losses(part, *step.parts(), measure=True)
    parts = [*loss.terms.values(), *loss.grad_norms.values()]
    return [loss.total.detach(), *step.grads(loss.total), *parts]


@pytest.mark.parametrize("conflict", [None, TruthFallback(), TargetCorrection()])
@pytest.mark.parametrize("divergence", ["forward_kl", "skewed_reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_forms_are_one(temperature, divergence, conflict):
    fusion = MIX if conflict is None else Fusion(weighting=MIX.weighting, conflict=conflict)
    features = FeatureOptions(weight=0.5, teacher_weights={"b": 0.3})
    kind = DIVERGENCES[divergence]()
    short = ObjectiveOptions(
        kd_ratio=0.7, temperature=temperature, divergence=kind, features=features, block_size=5
    )
    terms = listed(
        DivergenceTerm(weight=0.7, temperature=temperature, divergence=kind),
        CrossEntropyTerm(weight=1 - 0.7),
        features,
    )
    first, second = built(short, fusion), built(terms, fusion)
    for _ in range(2):
        for a, b in zip(outputs(first, Step()), outputs(second, Step()), strict=True):
            assert torch.equal(a, b)
        first.end_step()
        second.end_step()
    assert first.states[0].weights() == second.states[0].weights()


SETS: dict[str, list[tuple[str, float, float, str | None]]] = {
    # divergence, temperature, weight, domain
    "two": [("skewed_forward_kl", 1.0, 0.5, None), ("reverse_kl", 1.0, 0.5, None)],
    "temperatures": [("forward_kl", 1.0, 0.4, None), ("forward_kl", 3.0, 0.2, None)],
    "alike": [("forward_kl", 2.0, 0.4, None), ("jensen_shannon", 2.0, 0.7, None)],
    "three": [
        ("total_variation", 0.5, 0.1, None),
        ("alpha_beta", 1.0, 0.3, "b"),
        ("reverse_kl", 2.0, 0.5, None),
    ],
    "contrastive": [("skewed_forward_kl", 1.0, 0.8, "a"), ("skewed_reverse_kl", 1.0, 0.6, "b")],
    "limited": [("forward_kl", 1.0, 0.8, "a")],
    "limited and soft": [("forward_kl", 3.0, 0.8, "b")],
}
CE: dict[str, list[tuple[float, str | None]]] = {
    "ce": [(0.3, None)],
    "none": [],
    "two ce": [(0.3, "a"), (0.7, None)],
}


@pytest.mark.parametrize("block_size", [4, N])
@pytest.mark.parametrize("labeled", sorted(CE))
@pytest.mark.parametrize("name", sorted(SETS))
def test_several_divergences_equal_the_formula(name, labeled, block_size):
    step = Step(head_scale=0.7, softcap=5.0)
    student, answers, rows = step.parts()
    rows = with_domains(rows, "a", "b")
    part = built(listed(*terms_of(name, labeled), block_size=block_size))
    loss = row_losses(part, student, answers, rows, measure=True)
    values, total = truth_of(step, step.fused(), rows, name, labeled)
    torch.testing.assert_close(loss.total, total, rtol=1e-10, atol=1e-10)
    assert_same(step.grads(loss.total), step.grads(total), 1e-10)
    assert list(loss.terms) == list(values)
    for term, (weight, value) in values.items():
        torch.testing.assert_close(loss.terms[term], value.detach(), rtol=1e-10, atol=1e-10)
        assert loss.weights[term] == pytest.approx(weight)
        (grad,) = torch.autograd.grad(weight * value, step.hidden, retain_graph=True)
        torch.testing.assert_close(loss.grad_norms[term], grad.norm(), rtol=1e-8, atol=1e-10)


def terms_of(name: str, labeled: str) -> list[Any]:
    kds = [
        DivergenceTerm(
            divergence=DIVERGENCES[kind](),
            temperature=temperature,
            weight=weight,
            domains=None if domain is None else [domain],
        )
        for kind, temperature, weight, domain in SETS[name]
    ]
    ces = [CrossEntropyTerm(weight=w, domains=d and [d]) for w, d in CE[labeled]]
    return [*kds, *ces]


def truth_of(step: Step, p: torch.Tensor, rows: Rows, name: str, labeled: str) -> tuple[Any, Any]:
    """Weight and sum over the rows of each term by name, and the loss."""
    values: dict[str, tuple[float, torch.Tensor]] = {}
    z = step.logits()
    for number, (kind, temperature, weight, domain) in enumerate(SETS[name]):
        soft = p ** (1 / temperature)
        soft = soft / soft.sum(-1, keepdim=True)
        value_N = reference_losses.DIVERGENCES[kind](soft, (z / temperature).softmax(-1))
        key = "kd" if number == 0 else f"kd_{number + 1}"
        values[key] = weight * temperature**2, (value_N * is_in(rows, domain)).sum()
    ce_N = -z.log_softmax(-1)[torch.arange(N), step.labels]
    for number, (weight, domain) in enumerate(CE[labeled]):
        key = "ce" if number == 0 else f"ce_{number + 1}"
        values[key] = weight, (ce_N * is_in(rows, domain)).sum()
    return values, sum(weight * value for weight, value in values.values())


def is_in(rows: Rows, domain: str | None) -> torch.Tensor:
    assert rows.domains is not None
    every_N = torch.ones(N, dtype=torch.bool)
    return every_N if domain is None else rows.domains == domain_number(domain)


@pytest.mark.parametrize("k", [V, 4])
@pytest.mark.parametrize("name", ["two", "contrastive", "limited"])
def test_several_divergences_on_a_named_target(name, k):
    """On all tokens as on a live target; on the top k as the formula on k + 1 entries."""
    step = Step()
    student, _, rows = step.parts()
    rows = with_domains(rows, "a", "b")
    part = built(listed(*terms_of(name, "ce")))
    p = step.teacher_logits["a"].softmax(-1)
    top = p.topk(k)
    starts, tail = torch.arange(N + 1) * k, (1 - top.values.sum(-1)).clamp(min=0).log()
    named = NamedRows(
        starts, top.indices.flatten(), top.values.log().flatten(), tail if k < V else None, V
    )
    loss = row_losses(part, student, [], rows, target=FinishedTarget(named))
    q = step.logits().softmax(-1)
    kept = q.gather(1, top.indices)
    support = [
        torch.cat([x, 1 - x.sum(-1, keepdim=True)], 1) if k < V else x for x in (top.values, kept)
    ]
    total = 0.3 * -q.log()[torch.arange(N), step.labels].sum()
    for kind, _, weight, domain in SETS[name]:
        value_N = reference_losses.DIVERGENCES[kind](*support)
        total = total + weight * (value_N * is_in(rows, domain)).sum()
    torch.testing.assert_close(loss.total, total, rtol=1e-8, atol=1e-8)
    assert_same(step.grads(loss.total), step.grads(total), 1e-7)


def test_a_domain_without_rows_is_not_an_inert_term():
    step, watch = Step(), InertTermCheck(1)
    student, answers, rows = step.parts()
    terms = (CrossEntropyTerm(weight=0.5), DivergenceTerm(domains=["c"]))
    part = built(listed(*terms))
    loss = row_losses(part, student, answers, with_domains(rows, "a"), measure=True)
    assert loss.terms["kd"] == 0
    assert set(loss.grad_norms) == {"ce"}
    watch(loss)
    with refused(DataError, "objective.terms: "):
        row_losses(part, student, answers, rows)


class Unread(DenseRows):
    """Logits that must not be read."""

    def logits(self, block: slice) -> torch.Tensor:
        raise AssertionError("read")


def stages(*pairs: tuple[float, float | None]) -> Stages:
    return Stages(stages=[ScheduleStage(factor=f, until=until) for f, until in pairs])


def test_a_term_without_weight_at_a_step_costs_nothing():
    """First only features, then cross-entropy, then the divergence."""
    part = built(
        listed(
            DivergenceTerm(schedule=stages((0, 20), (1, None))),
            CrossEntropyTerm(weight=0.2, schedule=stages((0, 10), (1, None))),
            FeatureOptions(schedule=stages((1, 10), (0, None)), teachers=["a"]),
        )
    )
    step = Step()
    student, answers, rows = step.parts()
    part.start_step(9, 30)
    unread = [Answer(a.name, Unread(torch.zeros(N, V)), a.features) for a in answers]
    loss = row_losses(part, student, unread, rows, measure=True)
    assert set(loss.terms) == set(loss.grad_norms) == {"feature/a"}
    assert loss.weights == {"kd": 0.0, "ce": 0.0, "feature/a": 1.0}
    hidden, tap, weight = torch.autograd.grad(
        loss.total, [step.hidden, step.tap, step.weight], allow_unused=True
    )
    assert hidden is weight is None
    assert tap.abs().max() > 0
    assert part.needs_teachers
    assert part.student_taps == part.teacher_taps("a") == ["layer_0"]
    part.start_step(10, 30)
    assert not part.needs_teachers
    assert part.student_taps == part.teacher_taps("a") == []
    loss = row_losses(part, student, [], rows)
    truth = torch.nn.functional.cross_entropy(step.logits(), step.labels, reduction="sum")
    torch.testing.assert_close(loss.total, 0.2 * truth)
    assert loss.weights == {"kd": 0.0, "ce": 0.2, "feature/a": 0.0}
    part.start_step(20, 30)
    assert part.needs_teachers
    assert part.student_taps == []
    assert set(row_losses(part, student, answers, rows).terms) == {"kd", "ce"}


def test_a_step_without_a_term_is_refused():
    part = built(listed(CrossEntropyTerm(schedule=stages((1, 10), (0, None)))))
    part.start_step(9, 20)
    with refused(TrainingError, "objective.terms: "):
        part.start_step(10, 20)
    ended = built(listed(CrossEntropyTerm(schedule=stages((1, 10), (0, None)))))
    ended.start_step(10, 10)  # an evaluation after the last step


@pytest.mark.parametrize(
    "terms",
    [
        "{kd_ratio: 0.9, terms: [ce]}",
        "{features: {}, terms: [ce]}",
        "{terms: []}",
        "{terms: [{name: router}, {name: router}]}",
        "{terms: [{name: divergnce}]}",
        "{terms: [{name: divergence, temperature: 0}]}",
        "{terms: [{name: ce, schedule: {name: stages, stages: [{factor: 1, until: 3}]}}]}",
        "{terms: [{name: ce, schedule: {name: linear, initial: 1, final: 0, start: 5, end: 3}}]}",
        "{terms: [{name: relations, num_heads: 0}]}",
        "{terms: [{name: attention, wieght: 1}]}",
        "{terms: [{name: ce, domains: []}]}",
    ],
)
def test_wrong_terms(terms: str) -> None:
    with refused(RecipeError, "objective.yaml:1: "):
        decode(ObjectiveOptions, read_yaml(terms, "objective.yaml"))


def test_a_short_form_is_resolved_and_a_list_is_not():
    assert ObjectiveOptions() == ObjectiveOptions(kd_ratio=0.9, temperature=1.0)
    options = listed(DivergenceTerm(), DivergenceTerm(), CrossEntropyTerm(), RouterTerm())
    assert options.kd_ratio is None
    assert [one.name for one in options.placed_terms()] == ["kd", "kd_2", "ce", "router"]
    assert [one.name for one in options.labels_only().placed_terms()] == ["ce"]
    assert options.labels_only().block_size == 5
    assert built(options).router_factor == 1.0
    assert built(listed(CrossEntropyTerm())).router_factor == 1.0
    assert built(listed(CrossEntropyTerm(), RouterTerm(weight=0.0))).router_factor == 0.0


@pytest.mark.parametrize(
    ("conflict", "terms"),
    [
        (TruthFallback(), [DivergenceTerm(domains=["a"])]),
        (TargetCorrection(), [DivergenceTerm(), DivergenceTerm(temperature=2.0)]),
    ],
)
def test_terms_that_a_conflict_policy_excludes(conflict, terms):
    with refused(RecipeError, "objective.terms."):
        built(listed(*terms), Fusion(weighting=MIX.weighting, conflict=conflict))


def test_the_truth_has_the_weight_of_all_divergences():
    fusion = Fusion(weighting=MIX.weighting, conflict=TruthFallback())
    one = built(listed(DivergenceTerm(weight=0.6, divergence=ReverseKL())), fusion)
    halves = [DivergenceTerm(weight=w, divergence=ReverseKL()) for w in (0.2, 0.4)]
    two = built(listed(*halves), fusion)
    whole, parts = (row_losses(part, *Step().parts()) for part in (one, two))
    torch.testing.assert_close(parts.total, whole.total)
    assert parts.weights["truth"] == pytest.approx(whole.weights["truth"])


DRAWS, TOP_K = (
    capabilities_of("per_teacher", targets, (), has_features=True)
    for targets in (Samples(), TopK())
)


@pytest.mark.parametrize("kind", ["attention", "relations"])
def test_a_cache_cannot_serve_attention(kind: str) -> None:
    text = f"{{terms: [divergence, {{name: {kind}}}]}}"
    options = decode(ObjectiveOptions, read_yaml(text, "objective.yaml"))
    for source in (DRAWS, TOP_K):
        with refused(RecipeError, "objective.terms.1: "):
            check(options.requirements(), [source])
    check(options.requirements(), [LIVE])
    others = ObjectiveOptions(terms=[DivergenceTerm(), FeatureOptions()])
    check(others.requirements(), [DRAWS])
    mixed = ObjectiveOptions(terms=[DivergenceTerm(divergence=SkewedForwardKL())])
    with refused(RecipeError, "objective.terms.0.divergence: "):
        check(mixed.requirements(), [DRAWS])


ALL = """
terms:
  - {name: divergence, weight: 0.5, divergence: skewed_forward_kl,
     schedule: {name: linear, initial: 0, final: 1, start: 2, end: 6}}
  - {name: divergence, weight: 0.5, divergence: reverse_kl, temperature: 2}
  - {name: ce, weight: 0.1}
  - {name: features, teachers: [teacher_0], schedule: {name: stages, stages: [
     {factor: 1, until: 0.5}, {factor: 0}]}}
  - {name: embeddings}
  - {name: attention, num_layers: 2, schedule: {name: stages, stages: [
     {factor: 1, until: 4}, {factor: 0}]}}
  - {name: attention, loss: kl, layers: last}
  - {name: relations, dynamic_scale: false}
"""


def every_kind(text: str = ALL) -> Objective:
    options = decode(ObjectiveOptions, read_yaml(text, "objective.yaml"))
    model = small_model()
    widths = {tap: tap_width(model, tap) for tap in tap_names(model)}
    states = state_losses(options, widths, {"teacher_0": widths, "teacher_1": widths})
    return Objective(options, Fusion(), states=states)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_kinds_of_terms_train_and_resume_exactly(tmp_path: Path, accumulate: int) -> None:
    options = {"gradient_accumulation_steps": accumulate, "logging_steps": 1}
    whole = trainer(tmp_path / "a", objective=every_kind(), options=options)
    whole.train()
    log = read_log(tmp_path / "a" / "log.jsonl")
    assert log is not None
    weights = [row.term_weights for row in log]
    factors = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [row["kd"] for row in weights] == pytest.approx([0.5 * f for f in factors])
    assert [row["kd_2"] for row in weights] == [2.0] * 8
    assert [row["feature/teacher_0"] > 0 for row in weights] == [True] * 4 + [False] * 4
    assert [row["attention/teacher_1"] > 0 for row in weights] == [True] * 4 + [False] * 4
    names = {"kd", "kd_2", "ce", "feature/teacher_0"} | {
        f"{kind}/teacher_{k}"
        for kind in ("embedding", "attention", "attention_2", "relation")
        for k in range(2)
    }
    assert set(weights[0]) == set(weights[-1]) == names
    assert all(set(row.terms) == {n for n, w in row.term_weights.items() if w > 0} for row in log)
    assert {name for row in log for name, share in row.grad_shares.items() if share > 0} == names
    assert all(torch.isfinite(torch.tensor([*row.terms.values(), row.loss])).all() for row in log)

    broken = trainer(tmp_path / "b", objective=every_kind(), options=options)

    class StopAt5(FakeStop):
        step = 5

    broken.add_callback(StopAt5(broken))
    with refused(Interrupted, "SIGTERM: "):
        broken.train()
    rest = trainer(tmp_path / "b", objective=every_kind(), options=options)
    rest.train(resume_from_checkpoint=True)
    for ours, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    again = read_log(tmp_path / "b" / "log.jsonl")
    assert again is not None
    assert [row.term_weights for row in again] == weights
    other = trainer(
        tmp_path / "b", objective=every_kind(ALL.replace("start: 2", "start: 3")), options=options
    )
    with refused(TrainingError, "checkpoint-8: "):
        other.train(resume_from_checkpoint=True)


def test_a_trainer_builds_the_terms_of_live_teachers(tmp_path: Path) -> None:
    """With the same adapters as `state_losses`, and without them if some were given."""
    options = decode(ObjectiveOptions, read_yaml(ALL, "objective.yaml"))
    made = trainer(tmp_path, objective=Objective(options, Fusion()), seed=0)
    expected = every_kind()
    assert [one.name for one in made.step.objective.states] == [x.name for x in expected.states]
    for ours, theirs in zip(made.step.objective.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    given = trainer(tmp_path, objective=Objective(options, Fusion(), states=expected.states[:1]))
    assert len(given.step.objective.states) == 1


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    """Also for terms that are computed per document, and for a stage that ends."""
    students = []
    for batch, accumulate in ((6, 1), (2, 3)):
        made = trainer(
            tmp_path / str(batch),
            model=small_model().double(),
            teachers=[small_model(1).double(), small_model(2).double()],
            objective=every_kind().double(),
            options={
                "max_steps": 6,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulate,
                "optim": "sgd",
            },
        )
        made.train()
        students.append({name: value.clone() for name, value in made.model.state_dict().items()})
    for name, tensor in students[0].items():
        torch.testing.assert_close(students[1][name], tensor, rtol=1e-9, atol=1e-11)


def test_evaluation_has_the_weights_of_the_next_step(tmp_path: Path) -> None:
    seen: list[float] = []

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen.append(kwargs["metrics"]["eval_loss"])

    part = Objective(
        listed(CrossEntropyTerm(weight=1.0, schedule=stages((1, 2), (100, None)))), Fusion()
    )
    made = trainer(
        tmp_path,
        objective=part,
        options={"max_steps": 3, "learning_rate": 1e-9},
        eval_dataset=Windows(),
        callbacks=[Keep()],
    )
    made.evaluate()
    made.train()
    made.evaluate()
    assert seen[1] == pytest.approx(100 * seen[0], rel=1e-3)


def test_wrong_values_in_python():
    with pytest.raises(pydantic.ValidationError):
        ObjectiveOptions(terms=[])
    with pytest.raises(pydantic.ValidationError):
        DivergenceTerm(temperature=-1.0)
    with pytest.raises(pydantic.ValidationError):
        Linear(initial=1.0, final=0.0, start=1.0, end=0.5)


def test_only_the_teachers_that_a_term_reads_need_hidden_states() -> None:
    options = ObjectiveOptions(features=FeatureOptions(teachers=["a"]))
    without = capabilities_of("per_teacher", Samples(), ())
    check_teachers(options.requirements(), {"a": LIVE, "b": without})
    with refused(RecipeError, "objective.features: "):
        check_teachers(options.requirements(), {"a": without, "b": LIVE})
