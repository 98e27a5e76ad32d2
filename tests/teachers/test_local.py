"""A teacher is frozen, pinned to eval, and leaves the student alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from collegium.distributions import LIVE, HiddenRows, Teacher
from collegium.errors import ModelError, TrainingError
from collegium.models.loading import count_parameters
from collegium.teachers.local import LocalTeacher, MovedRows
from collegium.teachers.options import LocalOptions
from collegium.types import Batch
from refusals import refused
from tiny import save_tiny, tiny_model

V = 90
EVERYTHING = slice(None)


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(1))
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], list(range(9))])
    samples = torch.tensor([[7] * 4 + [8] * 5, [9] * 9])
    return Batch(ids, position, ids.clone(), samples)


def test_scores_are_the_logits_of_the_model(batch: Batch) -> None:
    model = tiny_model(96)
    teacher: Teacher = LocalTeacher("t", model, vocab_size=V)
    rows = batch.rows()
    scored = teacher.score(batch, rows, taps=["layer_0", "final_postnorm"])
    own = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).logits.flatten(0, 1)
    torch.testing.assert_close(
        scored.distribution.logits(EVERYTHING), own[rows.index, :V], atol=1e-5, rtol=1e-5
    )
    assert scored.name == "t"
    assert set(scored.features) == {"layer_0", "final_postnorm"}
    assert teacher.capabilities == LIVE


def test_dropout_stays_off_even_after_train(batch: Batch) -> None:
    model = tiny_model(96, model_type="gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    teacher = LocalTeacher("t", model, vocab_size=V)
    rows = batch.rows()
    first = teacher.score(batch, rows).distribution.logits(EVERYTHING)
    nn.ModuleList([model]).train()
    assert model.training
    second = teacher.score(batch, rows).distribution.logits(EVERYTHING)
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_nothing_has_a_gradient(batch: Batch) -> None:
    model = tiny_model(96, model_type="phi")
    teacher = LocalTeacher("t", model, vocab_size=V)
    with torch.enable_grad():
        scored = teacher.score(batch, batch.rows(), taps=["layer_1"])
    assert not any(p.requires_grad for p in model.parameters())
    assert isinstance(scored.distribution, HiddenRows)
    head = scored.distribution.head
    assert head.bias is not None
    tensors = [scored.distribution.hidden, head.weight, head.bias, *scored.features.values()]
    assert not any(t.requires_grad for t in tensors)
    assert not any(t.is_inference() for t in tensors)
    model.requires_grad_(True)  # even if someone thaws it
    again = teacher.score(batch, batch.rows()).distribution.logits(EVERYTHING)
    assert not again.requires_grad


@pytest.mark.parametrize("vocab_size", [V, 96])
def test_head_is_cut_to_the_vocabulary(batch: Batch, vocab_size: int) -> None:
    teacher = LocalTeacher("t", tiny_model(96), vocab_size=vocab_size)
    scored = teacher.score(batch, batch.rows())
    assert scored.distribution.logits(slice(0, 3)).shape == (3, vocab_size)


def test_live_student_is_no_teacher() -> None:
    student = tiny_model(96)
    with pytest.raises(ModelError, match="teacher big: shares 21 parameters with the student"):
        LocalTeacher("big", student, vocab_size=V, student=student)
    assert all(p.requires_grad for p in student.parameters())
    other = tiny_model(96, seed=1)
    other.lm_head = student.lm_head
    with pytest.raises(
        ModelError, match=r"shares 1 parameters with the student \(lm_head.weight\)"
    ):
        LocalTeacher("big", other, vocab_size=V, student=student)
    LocalTeacher("big", copy.deepcopy(student), vocab_size=V, student=student)
    assert all(p.requires_grad for p in student.parameters())


def test_keeps_its_own_number_type(batch: Batch) -> None:
    teacher = LocalTeacher("t", tiny_model(96).bfloat16(), vocab_size=V)
    scored = teacher.score(batch, batch.rows())
    assert isinstance(scored.distribution, HiddenRows)
    assert scored.distribution.hidden.dtype == torch.bfloat16
    assert scored.distribution.logits(EVERYTHING).dtype == torch.float32


def test_non_finite_states_name_teacher_and_samples(batch: Batch) -> None:
    model = tiny_model(96)
    teacher = LocalTeacher("bad", model, vocab_size=V)
    token = int(batch.input_ids[0, 5])
    model.model.embed_tokens.weight.data[token] = float("nan")
    assert not bool((batch.input_ids[1] == token).any())
    with pytest.raises(
        TrainingError, match="teacher bad: non-finite hidden states at the last layer"
    ) as caught:
        teacher.score(batch, batch.rows())
    # Attention weighs a masked value with 0, and 0 * NaN is NaN: one whole window is lost.
    assert "in 7 of 15 rows (samples 7, 8); must be finite" in str(caught.value)


def test_load(tmp_path: Path, batch: Batch) -> None:
    folder = save_tiny(tmp_path / "m", seed=4)
    options = LocalOptions(model=str(folder), device="cpu", offload=True)
    teacher = LocalTeacher.load("t", options, vocab_size=V, where="teachers[0]")
    assert teacher.num_parameters == count_parameters(teacher.model)
    live = LocalTeacher("t", tiny_model(teacher.model.config.vocab_size, seed=4), vocab_size=V)
    rows = batch.rows()
    torch.testing.assert_close(
        teacher.score(batch, rows).distribution.logits(EVERYTHING),
        live.score(batch, rows).distribution.logits(EVERYTHING),
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize("key", ["adapter", "quantize", "offload"])
def test_a_teacher_to_shard_is_a_plain_model(key: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", seed=4)
    values: dict[str, Any] = {"adapter": str(folder), "quantize": "int8", "offload": True}
    options = LocalOptions(model=str(folder), shard=True)
    options.check("teachers.a")
    with refused(ModelError, "teachers.a.shard"):
        replace(options, **{key: values[key]}).check("teachers.a")
    assert options.identity() == LocalOptions(model=str(folder)).identity()


def test_a_teacher_to_shard_stays_whole_in_one_process(batch: Batch) -> None:
    teacher = LocalTeacher("t", tiny_model(96), vocab_size=V, shard=True)
    before = teacher.score(batch, batch.rows()).distribution.logits(EVERYTHING)
    teacher.shard_layers()
    assert not teacher.is_sharded
    after = teacher.score(batch, batch.rows()).distribution.logits(EVERYTHING)
    assert torch.equal(before, after)


def test_moved_rows_give_the_same_logits(batch: Batch) -> None:
    scored = LocalTeacher("t", tiny_model(96), vocab_size=V).score(batch, batch.rows())
    assert isinstance(scored.distribution, HiddenRows)
    moved = MovedRows(scored.distribution, torch.device("cpu"))
    torch.testing.assert_close(moved.logits(slice(2, 4)), scored.distribution.logits(slice(2, 4)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [False, True])
def test_teacher_on_another_device(batch: Batch, offload: bool) -> None:
    expected = LocalTeacher("t", tiny_model(96), vocab_size=V).score(batch, batch.rows())
    model = tiny_model(96).cuda()
    teacher = LocalTeacher("t", model, vocab_size=V, offload=offload)
    for _ in range(2):
        scored = teacher.score(batch, batch.rows(), taps=["layer_0"])
        assert model.device.type == ("cpu" if offload else "cuda")
        assert scored.features["layer_0"].device.type == "cpu"
        torch.testing.assert_close(
            scored.distribution.logits(EVERYTHING),
            expected.distribution.logits(EVERYTHING),
            atol=1e-4,
            rtol=1e-4,
        )


def test_a_scale_multiplies_the_logits_whatever_the_head_does(batch: Batch, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    rows = batch.rows()
    plain, scaled = (
        LocalTeacher.load(
            "t",
            LocalOptions(model=str(tmp_path), logit_scale=scale),
            vocab_size=V,
            where="teachers.t",
        )
        for scale in (1.0, 2.5)
    )
    expected = 2.5 * plain.score(batch, rows).distribution.logits(slice(1, 4))
    torch.testing.assert_close(scaled.score(batch, rows).distribution.logits(slice(1, 4)), expected)
