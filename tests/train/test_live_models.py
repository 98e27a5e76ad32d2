"""Live models and any batch meet the guards that a recipe has."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    TrainingArguments,
    default_data_collator,
)

import tiny
from collegium.data.collate import Collator
from collegium.distributions import Teacher
from collegium.errors import DataError, ModelError, TrainingError, VocabularyError
from collegium.storage.records import read_log
from collegium.train.trainer import DistillTrainer, TrainOptions, training_arguments
from collegium.types import IGNORE
from refusals import refused
from training_runs import VOCAB, FakeTeacher, small_model, trainer

LEAKY: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 8},
    "mamba": {"state_size": 8, "intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 4},
}


def rows(num: int = 8, length: int = 10, **columns: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB, (num, length), generator=generator).tolist()
    return [{"input_ids": one, "labels": one, **columns} for one in ids]


def distilled(folder: Path, data: Any = None, **more: Any) -> DistillTrainer:
    """A trainer over plain rows with our collator, three steps of two rows."""
    options = {"max_steps": 3, "gradient_accumulation_steps": 1, "logging_steps": 1}
    more.setdefault("data_collator", Collator())
    more.setdefault("model", small_model())
    return trainer(folder, options=options, train_dataset=data or rows(), **more)


@pytest.mark.parametrize("family", LEAKY)
def test_a_model_that_mixes_packed_documents_needs_windows_of_one(
    tmp_path: Path, family: str
) -> None:
    def leaky(seed: int) -> Any:
        return small_model(seed, model_type=family, initializer_range=0.3, **LEAKY[family])

    alone = distilled(tmp_path / "alone", teachers={"a": leaky(1)})
    alone.train()
    assert alone.state.global_step == 3
    packed = rows(position_ids=[0, 1, 2, 3, 0, 1, 2, 3, 4, 5])
    with refused(ModelError, "teachers.a: "):
        distilled(tmp_path / "teacher", packed, teachers={"a": leaky(1)}).train()
    with refused(ModelError, "model: "):
        distilled(tmp_path / "student", packed, model=leaky(2)).train()


def test_a_model_with_an_unknown_head_is_refused(tmp_path: Path) -> None:
    odd = small_model(1, model_type="modernbert-decoder", cls_token_id=0, sep_token_id=0)
    with refused(ModelError, "teachers.teacher_0: ", volatile=r"(?<=difference )[\d.e-]+"):
        distilled(tmp_path, teachers=[odd])


def test_too_few_rows_for_the_vocabulary_are_refused(tmp_path: Path) -> None:
    few = tiny.tiny_model(12, width=8, num_attention_heads=2, num_key_value_heads=1)
    with refused(VocabularyError, "teachers.teacher_0: "):
        distilled(tmp_path, teachers=[few])
    with refused(VocabularyError, "model: "):
        distilled(tmp_path, model=few, processing_class=tiny.tiny_tokenizer(300), teachers=[])


def test_tokenizers_of_teachers_are_compared(tmp_path: Path) -> None:
    tokenizer, other = tiny.tiny_tokenizer(300), tiny.tiny_tokenizer(300)
    other = type(tokenizer).from_pretrained(_swapped(tokenizer, tmp_path / "swapped"))

    def make(theirs: dict[str, Any], **more: Any) -> DistillTrainer:
        return DistillTrainer(
            tiny.tiny_model(300, width=8),
            {"a": tiny.tiny_model(300, seed=1, width=8)},
            training_arguments(TrainOptions(), output_dir=tmp_path / "run", seed=0),
            tokenizers=theirs,
            **more,
        )

    make({"a": tokenizer}, processing_class=tokenizer)
    with refused(VocabularyError, "tokenizers.a: "):
        make({"a": other}, processing_class=tokenizer)
    with refused(TrainingError, "tokenizers.b: "):
        make({"b": tokenizer}, processing_class=tokenizer)
    with refused(TrainingError, "tokenizers.a: "):
        make({"a": tokenizer})


def _swapped(tokenizer: Any, folder: Path) -> Path:
    """Save a tokenizer with the ids of two tokens exchanged."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    vocab = tokenizer.get_vocab()
    first, second = (f'"{token}": {vocab[token]}' for token in ("a", "b"))
    assert first in text
    assert second in text
    swapped = text.replace(first, f'"a": {vocab["b"]}').replace(second, f'"b": {vocab["a"]}')
    file.write_text(swapped, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "columns",
    [
        {"input_ids": [3, VOCAB, 4]},
        {"input_ids": [3, -1, 4]},
        {"labels": [3, VOCAB + 7, 4]},
        {"labels": [3, -1, 4]},
    ],
)
@pytest.mark.parametrize("part", ["train", "eval"])
def test_ids_out_of_range_are_refused(
    tmp_path: Path, columns: dict[str, list[int]], part: str
) -> None:
    bad = [{"input_ids": [3, 5, 4], "labels": [3, 5, 4], **columns}] * 4
    with refused(DataError, f"batch.{next(iter(columns))}: "):
        if part == "train":
            distilled(tmp_path, bad).train()
        else:
            distilled(tmp_path, eval_dataset=bad).evaluate()


def test_a_document_longer_than_the_positions_of_a_model_is_refused(tmp_path: Path) -> None:
    short = small_model(1, max_position_embeddings=16)
    distilled(tmp_path / "a", rows(length=16), teachers=[short]).train()
    with refused(DataError, "batch.input_ids: "):
        distilled(tmp_path / "b", rows(length=17), teachers=[short]).train()
    # Two short documents in one long window fit.
    packed = rows(length=20, position_ids=[*range(10), *range(10)])
    distilled(tmp_path / "c", packed, teachers=[short]).train()


def test_data_without_a_target_is_refused(tmp_path: Path) -> None:
    untrained = rows(labels=[IGNORE] * 10)
    made = distilled(tmp_path / "a", untrained)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with refused(DataError, "train_dataset: "):
        made.train()
    assert made.state.global_step == 2
    # Without a gradient, weight decay still shrinks weights, so the steps are few.
    assert max((before[n] - v).abs().max() for n, v in made.model.state_dict().items()) < 1e-2
    with refused(DataError, "eval_dataset: "):
        distilled(tmp_path / "b", eval_dataset=untrained).evaluate()
    # Some steps without a target are no error.
    mixed = distilled(tmp_path / "c", untrained[:2] + rows())
    mixed.train()
    assert mixed.state.global_step == 3


def first_loss(folder: Path, collate: Any, data: list[dict[str, Any]]) -> float:
    made = distilled(folder, data, data_collator=collate)
    made.train()
    return (read_log(folder / "log.jsonl") or ())[0].loss


def test_the_collators_of_transformers_give_the_losses_of_ours(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(300)
    equal = rows()
    ours = first_loss(tmp_path / "ours", Collator(), equal)
    for number, collate in enumerate((default_data_collator, DataCollatorWithFlattening())):
        loss = first_loss(tmp_path / str(number), collate, equal)
        assert loss == pytest.approx(ours, rel=1e-5)
    ragged = [{key: one[key][: 4 + n % 5] for key in one} for n, one in enumerate(rows())]
    ours = first_loss(tmp_path / "ragged", Collator(), ragged)
    padded = DataCollatorForSeq2Seq(tokenizer, padding=True)
    assert first_loss(tmp_path / "padded", padded, ragged) == pytest.approx(ours, rel=1e-5)
    only_ids = [{"input_ids": one["input_ids"]} for one in ragged]
    language = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert first_loss(tmp_path / "ids", language, only_ids) == pytest.approx(ours, rel=1e-5)


ARGUMENTS = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("org/model", []), "model: "),
        ((torch.nn.Linear(2, 2), []), "model: "),
        ((small_model(), "org/model"), "teachers: "),
        ((small_model(), ["org/model"]), "teachers.teacher_0: "),
        ((small_model(), {"a": "org/model"}), "teachers.a: "),
        ((small_model(), [3]), "teachers.teacher_0: "),
        ((small_model(), ARGUMENTS), "teachers: "),
        ((small_model(), [], {"max_steps": 3}), "args: "),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(arguments: Any, where: str) -> None:
    with refused(TrainingError, where):
        DistillTrainer(*arguments)


def test_teachers_may_be_one_or_any_collection(tmp_path: Path) -> None:
    one: Teacher = FakeTeacher("wise")
    several = torch.nn.ModuleList([small_model(1), small_model(2)])
    for number, (teachers, count) in enumerate(
        [(small_model(1), 1), (one, 1), (several, 2), ((small_model(1),), 1)]
    ):
        made = trainer(tmp_path / str(number), teachers=teachers)
        assert len(made.step.teachers) == count


def test_half_precision_weights_of_the_student(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with refused(TrainingError, "model: "):
        trainer(tmp_path, model=small_model().half())
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, model=small_model().bfloat16(), options={"learning_rate": 1e-3})
        assert "bfloat16" not in caplog.text
        trainer(tmp_path, model=small_model().bfloat16(), options={"learning_rate": 1e-5})
    assert "model: has bfloat16 weights at learning rate 1e-05" in caplog.text
