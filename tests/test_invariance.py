"""A training step against a naive one: same gradient for any layout, split and block size.

The naive step reads one document per forward pass, with plain loops and no masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from collegium.data.collate import Collator
from collegium.data.encode import Encoded
from collegium.data.windows import PackedDataset
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import PrefixLikelihood
from collegium.models.forward import forward_rows
from collegium.teachers.local import LocalTeacher
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Batch, Rows

V = 60
KD_RATIO, TEMPERATURE, ETA, DECAY = 0.7, 2.0, 0.3, 0.9


def make_documents() -> list[Encoded]:
    """Make seven documents of different lengths, half of them with an untrained prompt."""
    generator = np.random.default_rng(0)
    documents = []
    for number, length in enumerate((9, 2, 17, 5, 12, 3, 20)):
        is_target = np.arange(length) >= (1 if number % 2 else max(1, length // 2))
        ids = generator.integers(2, V, length)
        documents.append(Encoded(ids, is_target, np.ones(length, dtype=np.int64), can_split=False))
    return documents


@pytest.fixture(scope="module")
def student() -> torch.nn.Module:
    return tiny.tiny_model(V, seed=1, width=16).double()


@pytest.fixture(scope="module")
def teachers() -> list[LocalTeacher]:
    models = (tiny.tiny_model(V, seed=2, width=16), tiny.tiny_model(V + 4, seed=3, width=24))
    return [
        LocalTeacher(name, model.double(), vocab_size=V)
        for name, model in zip(("a", "b"), models, strict=True)
    ]


Step = Callable[[Batch], Rows]


def gradient(
    student: torch.nn.Module,
    teachers: Sequence[LocalTeacher],
    batches: Sequence[dict[str, Tensor]],
    *,
    block_size: int | None = None,
    choose_rows: Step = Batch.rows,
) -> Tensor:
    """Return the gradient of one optimizer step over all batches, as in the trainer."""
    options = ObjectiveOptions(kd_ratio=KD_RATIO, temperature=TEMPERATURE, block_size=block_size)
    fusion = Fusion(weighting=PrefixLikelihood(eta=ETA, decay=DECAY))
    objective = Objective(options, fusion)
    read = [Batch.from_inputs(inputs) for inputs in batches]
    num_items = sum(len(choose_rows(batch)) for batch in read)
    student.zero_grad()
    for batch in read:
        rows = choose_rows(batch)
        scored = [teacher.score(batch, rows) for teacher in teachers]
        states = forward_rows(student, batch, rows, vocab_size=V)
        (row_losses(objective, states, scored, rows).total / num_items).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def naive_gradient(
    student: torch.nn.Module, teachers: Sequence[LocalTeacher], documents: Sequence[Encoded]
) -> Tensor:
    """Return the same gradient from loops over documents and tokens."""
    total, num_items = torch.zeros((), dtype=torch.float64), 0
    for document in documents:
        ids = torch.as_tensor(document.ids)[None]
        with torch.no_grad():
            theirs = [
                teacher.model(ids, use_cache=False).logits[0, :, :V].log_softmax(-1)
                for teacher in teachers
            ]
        ours = student(ids, use_cache=False).logits[0]
        evidence = [0.0] * len(teachers)
        for t in range(1, ids.shape[1]):
            if not document.is_target[t]:
                continue
            label = int(ids[0, t])
            weights = torch.tensor(evidence, dtype=torch.float64).mul(ETA).softmax(0)
            prob = sum(w * logp[t - 1].exp() for w, logp in zip(weights, theirs, strict=True))
            target = (prob.log() / TEMPERATURE).softmax(-1)
            soft = (ours[t - 1] / TEMPERATURE).log_softmax(-1)
            kl = (target * (target.log() - soft)).sum()
            ce = -ours[t - 1].log_softmax(-1)[label]
            total = total + KD_RATIO * TEMPERATURE**2 * kl + (1 - KD_RATIO) * ce
            num_items += 1
            evidence = [
                DECAY * (seen + float(logp[t - 1, label]))
                for seen, logp in zip(evidence, theirs, strict=True)
            ]
    student.zero_grad()
    (total / num_items).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def lay_out(max_length: int, *, packing: bool, batch_size: int) -> list[dict[str, Tensor]]:
    dataset = PackedDataset(make_documents(), max_length=max_length, packing=packing)
    items = [dataset[i] for i in range(len(dataset))]
    groups = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    return [Collator()(group) for group in groups]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).norm() / expected.norm()) < 1e-12


@pytest.mark.parametrize("block_size", [None, 1, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize(
    ("max_length", "packing"), [(20, True), (32, True), (68, True), (20, False)]
)
def test_layout_split_and_blocks_change_nothing(
    student, teachers, max_length, packing, batch_size, block_size
):
    batches = lay_out(max_length, packing=packing, batch_size=batch_size)
    actual = gradient(student, teachers, batches, block_size=block_size)
    assert_same(actual, naive_gradient(student, teachers, make_documents()))


def shifted(batch: Batch) -> Rows:
    """Predict each token from itself: the shift is missing."""
    rows = batch.rows()
    return dataclasses.replace(rows, index=rows.index + 1)


def unmasked(batch: Batch) -> Rows:
    """Train on prompts as well: the mask is missing."""
    return dataclasses.replace(batch, labels=batch.input_ids).rows()


def joined(batch: Batch) -> Rows:
    """Carry evidence across documents: the boundaries are missing."""
    rows = batch.rows()
    return dataclasses.replace(rows, documents=torch.zeros_like(rows.documents))


@pytest.mark.parametrize("mutation", [shifted, unmasked, joined])
def test_the_test_above_can_fail(student, teachers, mutation):
    batches = lay_out(32, packing=True, batch_size=2)
    actual = gradient(student, teachers, batches, choose_rows=mutation)
    with pytest.raises(AssertionError):
        assert_same(actual, naive_gradient(student, teachers, make_documents()))


def test_means_of_micro_batches_would_give_another_gradient(student, teachers):
    """The error that the global denominator avoids."""
    batches = lay_out(20, packing=False, batch_size=1)
    means = [gradient(student, teachers, [batch]) for batch in batches]
    expected = naive_gradient(student, teachers, make_documents())
    assert float((torch.stack(means).mean(0) - expected).norm() / expected.norm()) > 1e-3


def test_untrained_positions_may_hold_anything(student, teachers, monkeypatch):
    """NaN in the states of student and teachers at every position that is not a row."""
    batches = lay_out(32, packing=True, batch_size=2)
    expected = gradient(student, teachers, batches)
    read = [Batch.from_inputs(inputs) for inputs in batches]

    def poison(module: torch.nn.Module, arguments: object, output: Tensor) -> Tensor:
        rows = next(batch for batch in read if batch.input_ids.shape == output.shape[:2]).rows()
        is_row = torch.zeros(output.shape[0] * output.shape[1], dtype=torch.bool)
        is_row[rows.index] = True
        return torch.where(is_row.view(*output.shape[:2], 1), output, torch.nan)

    assert len({batch.input_ids.shape for batch in read}) == len(read), "shapes tell batches apart"
    models = [student, *(teacher.model for teacher in teachers)]
    hooks = [model.model.norm.register_forward_hook(poison) for model in models]
    try:
        actual = gradient(student, teachers, batches)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.isfinite(actual).all()
    assert_same(actual, expected)


def test_a_student_equal_to_its_only_teacher_has_zero_gradient(teachers):
    model = tiny.tiny_model(V, seed=2, width=16).double()
    objective = Objective(ObjectiveOptions(kd_ratio=1.0), Fusion())
    for inputs in lay_out(32, packing=True, batch_size=2):
        batch = Batch.from_inputs(inputs)
        rows = batch.rows()
        states = forward_rows(model, batch, rows, vocab_size=V)
        loss = row_losses(objective, states, [teachers[0].score(batch, rows)], rows)
        loss.total.backward()
        assert abs(float(loss.total.detach())) < 1e-10
    assert all(float(p.grad.abs().max()) < 1e-12 for p in model.parameters() if p.grad is not None)
