"""Under `route` each teacher scores only its own rows, and the student's gradient is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import training_runs
from collegium.data.collate import Collator
from collegium.data.encode import Encoded
from collegium.data.windows import PackedDataset
from collegium.distributions import Answer, HiddenRows
from collegium.fusion.fitted import Route
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.routing import score_teachers
from collegium.fusion.rules import BestSingle
from collegium.losses.features import FeatureLoss
from collegium.losses.pairing import FeatureOptions
from collegium.models.forward import forward_rows, tap_names, tap_width
from collegium.teachers.local import LocalTeacher
from collegium.train.nan_diagnosis import first_bad_rows
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Batch, LossSum, Rows, teacher_number

V = 60
LENGTHS = (9, 6, 17, 5, 12, 3, 20)
DOMAINS = ["code", "prose", "code", "verse", "prose", "code", "verse"]
NAMED = [None, "a", None, None, None, "b", "a"]
ROUTE = Route(default="a", domains={"prose": "b"})
EXPECTED = ["a", "a", "a", "a", "b", "b", "a"]
"""The teacher of each document."""


class CountedTeacher(LocalTeacher):
    """A teacher that counts the rows and windows of each call."""

    calls: list[tuple[int, int]]

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        self.calls.append((len(rows), len(batch.input_ids)))
        return super().score(batch, rows, taps)


@pytest.fixture
def teachers() -> list[CountedTeacher]:
    models = (tiny.tiny_model(V, seed=2, width=16), tiny.tiny_model(V + 4, seed=3, width=24))
    made = [CountedTeacher(n, m.double(), vocab_size=V) for n, m in zip("ab", models, strict=True)]
    for teacher in made:
        teacher.calls = []
    return made


@pytest.fixture(scope="module")
def student() -> Any:
    return tiny.tiny_model(V, seed=1, width=16).double()


def make_dataset(max_length: int, *, packing: bool = True) -> PackedDataset:
    generator = np.random.default_rng(0)
    documents = []
    for number, length in enumerate(LENGTHS):
        is_target = np.arange(length) >= (1 if number % 2 else max(1, length // 3))
        ids = generator.integers(2, V, length)
        documents.append(Encoded(ids, is_target, np.ones(length, np.int64), can_split=False))
    return PackedDataset(
        documents, max_length=max_length, packing=packing, domains=DOMAINS, teachers=NAMED
    )


def make_batches(dataset: PackedDataset, size: int) -> list[Batch]:
    items = [dataset[i] for i in range(len(dataset))]
    groups = [items[i : i + size] for i in range(0, len(items), size)]
    return [Batch.from_inputs(Collator()(group)) for group in groups]


def gradient(
    student: Any,
    teachers: Sequence[CountedTeacher],
    batches: Sequence[Batch],
    fusion: Fusion,
    *,
    num_items: int | None = None,
) -> Tensor:
    """The gradient of one optimizer step over all batches, as the trainer forms it."""
    objective = Objective(ObjectiveOptions(kd_ratio=0.7, temperature=2.0, block_size=7), fusion)
    num_items = num_items or sum(len(batch.rows()) for batch in batches)
    student.zero_grad()
    for batch in batches:
        rows = batch.rows()
        scored = score_teachers(teachers, batch, rows, fusion)
        states = forward_rows(student, batch, rows, vocab_size=V)
        (row_losses(objective, states, scored, rows).total / num_items).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def naive_gradient(student: Any, teachers: Sequence[CountedTeacher]) -> Tensor:
    """Each document by itself, with its teacher of the table above."""
    batches = make_batches(make_dataset(20, packing=False), 1)
    num_items = sum(len(batch.rows()) for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch, name in zip(batches, EXPECTED, strict=True):
        alone = [teacher for teacher in teachers if teacher.name == name]
        fusion = Fusion(weighting=BestSingle(teacher=name))
        total = total + gradient(student, alone, [batch], fusion, num_items=num_items)
    return total


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize(
    ("max_length", "packing"), [(20, True), (32, True), (72, True), (20, False)]
)
def test_layout_and_micro_batches_change_nothing(student, teachers, max_length, packing, size):
    batches = make_batches(make_dataset(max_length, packing=packing), size)
    found = gradient(student, teachers, batches, Fusion(weighting=ROUTE))
    expected = naive_gradient(student, teachers)
    assert float((found - expected).norm() / expected.norm()) < 1e-12


def test_every_row_of_a_document_knows_its_teacher_wherever_it_is_packed():
    for batch in make_batches(make_dataset(32), 2):
        rows = batch.rows()
        shares = ROUTE.shares(rows, ["a", "b"])
        for name, own_m in zip("ab", shares, strict=True):
            assert {EXPECTED[number] for number in rows.samples[own_m].tolist()} <= {name}
        assert batch.teacher_ids is not None
        assert batch.teacher_ids[batch.sample_ids < 0].unique().tolist() in ([], [0])
    assert make_dataset(32).fingerprint != PackedDataset(
        [Encoded(np.arange(4), np.arange(4) > 0, np.ones(4, np.int64), can_split=False)],
        max_length=32,
    ).fingerprint  # fmt: skip


def test_teachers_score_their_own_rows_and_are_skipped_without_any(teachers):
    batches = make_batches(make_dataset(20, packing=False), 2)
    for batch in batches:
        scored = score_teachers(teachers, batch, batch.rows(), Fusion(weighting=ROUTE))
        assert [answer.name for answer in scored] == ["a", "b"]
    sizes = [[len(own) for own in ROUTE.shares(b.rows(), ["a", "b"])] for b in batches]
    assert [rows for rows, _ in teachers[0].calls] == [a for a, _ in sizes if a]
    assert [rows for rows, _ in teachers[1].calls] == [b for _, b in sizes if b]
    assert [windows for _, windows in teachers[0].calls] == [2, 2, 1]
    assert [windows for _, windows in teachers[1].calls] == [2]
    every = score_teachers(teachers, batches[0], batches[0].rows(), Fusion())
    assert all(answer.rows is None for answer in every)


def test_masked_rows_change_nothing(student, teachers):
    """Neither the teacher named at a token that is not trained on, nor the token's domain."""
    (batch,) = make_batches(make_dataset(72), 100)
    fusion = Fusion(weighting=ROUTE)
    expected = gradient(student, teachers, [batch], fusion)
    assert batch.teacher_ids is not None
    assert batch.domain_ids is not None
    is_free = batch.labels < 0
    changed = replace(
        batch,
        teacher_ids=torch.where(is_free, teacher_number("another"), batch.teacher_ids),
        domain_ids=torch.where(is_free, 7, batch.domain_ids),
    )
    assert is_free.any()
    assert torch.equal(gradient(student, teachers, [changed], fusion), expected)


def test_all_rows_to_one_teacher_train_as_best_single(student, teachers):
    batches = make_batches(make_dataset(32), 2)
    batches = [replace(batch, teacher_ids=None) for batch in batches]
    route, single = Fusion(weighting=Route(default="b")), Fusion(weighting=BestSingle(teacher="b"))
    expected = gradient(student, teachers, batches, single)
    for teacher in teachers:
        teacher.calls.clear()
    assert torch.equal(gradient(student, teachers, batches, route), expected)
    assert teachers[0].calls == []


def test_hidden_states_are_compared_at_all_rows(student, teachers):
    (batch,) = make_batches(make_dataset(72), 100)
    rows, fusion = batch.rows(), Fusion(weighting=ROUTE)
    models = {teacher.name: teacher.model for teacher in teachers}
    widths = {n: {tap: tap_width(m, tap) for tap in tap_names(m)} for n, m in models.items()}
    mine = {tap: tap_width(student, tap) for tap in tap_names(student)}
    features = FeatureLoss(FeatureOptions(teacher_weights={"a": 0.0}), mine, widths, seed=0)
    objective = Objective(ObjectiveOptions(), fusion, states=[features.double()])

    taps = {name: objective.teacher_taps(name) for name in "ab"}
    scored = score_teachers(teachers, batch, rows, fusion, taps=taps)
    assert scored[0].rows is not None
    assert scored[1].rows is None
    states = forward_rows(student, batch, rows, vocab_size=V, taps=objective.student_taps)
    loss = row_losses(objective, states, scored, rows)
    assert loss.terms["feature/b"] > 0
    with torch.no_grad():
        plain = fuse(fusion, [t.score(batch, rows) for t in teachers], rows)
        routed = fuse(fusion, scored, rows)
        block = slice(0, len(rows))
        found, expected = (target.block(block).logp() for target in (routed, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_bad_row_is_traced_to_its_document(student, teachers):
    (batch,) = make_batches(make_dataset(72), 100)
    rows = batch.rows()
    scored = score_teachers(teachers, batch, rows, Fusion(weighting=ROUTE))
    assert scored[1].rows is not None
    assert isinstance(scored[1].distribution, HiddenRows)
    scored[1].distribution.hidden[-1] = torch.nan
    states = forward_rows(student, batch, rows, vocab_size=V)
    loss = LossSum(torch.zeros(()), {}, {}, {}, rows)
    found = first_bad_rows(states, scored, loss)
    assert found is not None
    assert found[0] == "teacher `b`"
    assert found[1].tolist() == [int(rows.samples[scored[1].rows[-1]])]


class WithTeachers(training_runs.Windows):
    """Windows whose second document names its teacher."""

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        item = super().__getitem__(number)
        is_second = item["sample_ids"] % 2 == 1
        return item | {"teacher_ids": torch.where(is_second, teacher_number("teacher_1"), 0)}


def test_the_trainer_routes_and_logs_the_weights(tmp_path: Path):
    objective = Objective(ObjectiveOptions(), Fusion(weighting=Route(default="teacher_0")))
    trainer = training_runs.trainer(
        tmp_path, train_dataset=WithTeachers(), objective=objective, options={"max_steps": 2}
    )
    trainer.train()
    shares = trainer.state.log_history[0]
    first, second = (shares[f"teacher_weights/teacher_{k}"] for k in (0, 1))
    assert first + second == pytest.approx(1.0)
    assert 0.2 < second < 0.8
