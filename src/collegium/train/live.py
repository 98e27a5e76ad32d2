"""Checks of live models and of batches from any source: the guards that recipes have.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from collegium.distributions import Teacher
from collegium.errors import DataError, ModelError, TrainingError, VocabularyError
from collegium.models.adapters import unwrapped
from collegium.models.families import rope_limit
from collegium.models.forward import head_layer, router_weight
from collegium.models.probe import probe
from collegium.teachers.local import LocalTeacher
from collegium.train.arguments import BFLOAT16_RATE, bfloat16_warning
from collegium.types import IGNORE, Batch
from collegium.vocabulary.verdict import compare, require_compatible

LiveTeacher = Teacher | PreTrainedModel
LiveTeachers = LiveTeacher | Sequence[LiveTeacher] | Mapping[str, LiveTeacher]
_log = logging.getLogger(__name__)


def live_student(model: Any, args: TrainingArguments) -> PreTrainedModel:
    """Return the transformers model to train, out of its PEFT wrapper.

    Raises:
        TrainingError: it is no loaded model, or has trained weights in float16.
        ModelError: its adapters or its router loss are not supported.
    """
    _refuse_name(model, "model")
    student = unwrapped(model, "model")
    if not isinstance(student, PreTrainedModel):
        raise TrainingError(
            f"model: got {type(model).__name__}; must be a causal language model of transformers, "
            "or a PeftModel around one"
        )
    router_weight(student)
    dtypes = {p.dtype for p in student.parameters() if p.requires_grad}
    if torch.float16 in dtypes:
        raise TrainingError(
            "model: got weights in float16; must be float32 or bfloat16, since AdamW's epsilon is "
            "0 in float16; use model.float() with bf16=True"
        )
    if torch.bfloat16 in dtypes and args.learning_rate < BFLOAT16_RATE:
        _log.warning(bfloat16_warning("model", args.learning_rate))
    return student


def vocabulary_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """V: the largest token id + 1, else the rows of the student's head."""
    if tokenizer is not None:
        return max(tokenizer.get_vocab().values()) + 1
    return head_layer(model).weight.shape[0]


def named_teachers(
    teachers: Any, student: PreTrainedModel, vocab_size: int, device: torch.device
) -> list[Teacher]:
    """Wrap models as `LocalTeacher`, named by their key or `teacher_0`, ...

    A `PeftModel` under several names gives one teacher for each adapter of these names.

    Raises:
        TrainingError: a teacher is no model, two share a name, or a key differs from its name.
        VocabularyError: a model has fewer rows than the vocabulary.
    """
    if isinstance(teachers, TrainingArguments):
        raise TrainingError(
            "teachers: got TrainingArguments; must be the teachers; use args=TrainingArguments(...)"
        )
    _refuse_name(teachers, "teachers")
    if not isinstance(teachers, Mapping):
        is_list = isinstance(teachers, Iterable) and not hasattr(teachers, "score")
        teachers = list(teachers) if is_list else [teachers]
    given: Mapping[str, Any] = (
        teachers
        if isinstance(teachers, Mapping)
        else {_name_of(teacher, number): teacher for number, teacher in enumerate(teachers)}
    )
    if len(given) < len(teachers):
        names = ", ".join(_name_of(teacher, number) for number, teacher in enumerate(teachers))
        raise TrainingError(f"teachers: got the names {names}; must be distinct; rename one")
    models = [id(unwrapped(teacher, "teachers")) for teacher in given.values()] + [id(student)]
    named: list[Teacher] = []
    for name, teacher in given.items():
        where = f"teachers.{name}"
        _refuse_name(teacher, where)
        model = unwrapped(teacher, where)
        if isinstance(model, PreTrainedModel):
            model.to(device)  # type: ignore[arg-type]
            has_adapters = bool(getattr(model, "peft_config", None))
            adapter = name if has_adapters and models.count(id(model)) > 1 else None
            check_rows(model, vocab_size, where)
            teacher = LocalTeacher(
                name, model, vocab_size=vocab_size, student=student, adapter=adapter
            )
        elif not hasattr(teacher, "score"):
            raise TrainingError(
                f"{where}: got {type(teacher).__name__}; must be a causal language model of "
                "transformers, a PeftModel around one, or an object with `score`"
            )
        if teacher.name != name:
            raise TrainingError(
                f"teachers: got the name `{name}` for {teacher.name}; must be one name for each; "
                "rename it"
            )
        named.append(teacher)
    return named


def _name_of(teacher: Any, number: int) -> str:
    return getattr(teacher, "name", None) or f"teacher_{number}"


def _refuse_name(value: Any, where: str) -> None:
    if isinstance(value, str):
        raise TrainingError(
            f"{where}: got the name `{value}`; must be a loaded model; load it with "
            "AutoModelForCausalLM.from_pretrained"
        )


def check_rows(model: PreTrainedModel, vocab_size: int, where: str) -> None:
    """Check that head and embedding have a row for every token id.

    Raises:
        VocabularyError: one of them has fewer rows.
    """
    layers = (head_layer(model), model.get_input_embeddings())
    rows = min(layer.weight.shape[0] for layer in layers)  # type: ignore[union-attr]
    if rows < vocab_size:
        raise VocabularyError(
            f"{where}: has {rows} rows, the student's vocabulary has {vocab_size} ids; must have a "
            "row for each; use models with one tokenizer, and give it as processing_class where "
            "the student's head has more rows"
        )


def compare_tokenizers(
    student: PreTrainedTokenizerBase | None,
    teachers: Sequence[Teacher],
    tokenizers: Mapping[str, Any],
) -> None:
    """Compare the tokenizers of teachers with the student's, id by id.

    Raises:
        TrainingError: the student has no tokenizer, or a name is that of no teacher.
        VocabularyError: some id maps to other bytes.
    """
    named = {teacher.name: teacher for teacher in teachers}
    for name, tokenizer in tokenizers.items():
        if student is None or name not in named:
            raise TrainingError(
                f"tokenizers.{name}: cannot be compared; must be the name of a teacher "
                f"({', '.join(named)}), with the student's tokenizer as processing_class"
            )
        teacher = named[name]
        rows = None
        if isinstance(teacher, LocalTeacher):
            rows = head_layer(teacher.model).weight.shape[0]
        require_compatible(
            compare(
                student,  # type: ignore[arg-type]
                tokenizer,
                student_head_size=None,
                teacher_head_size=rows,
                where=f"tokenizers.{name}",
            )
        )


@dataclass
class BatchCheck:
    """Checks each batch before the models see it: token ids, positions, documents of a window."""

    vocab_size: int
    max_positions: int | None = None
    """Positions of the model with the fewest, None without a limit."""
    leaks: list[ModelError] = field(default_factory=list)
    """Reasons why a window must hold one document only."""
    _num_empty_steps: int | None = 0
    """Steps without a target since the start, None once one had some."""

    @classmethod
    def of(
        cls, student: PreTrainedModel, teachers: Sequence[Teacher], vocab_size: int
    ) -> BatchCheck:
        """Probe the models of a run.

        Raises:
            ModelError: a model computes its logits in an unsupported way.
            VocabularyError: the student has fewer rows than the vocabulary.
        """
        local = [teacher for teacher in teachers if isinstance(teacher, LocalTeacher)]
        check_rows(student, vocab_size, "model")
        made = cls(vocab_size)
        limits = [_max_positions(model) for model in (student, *(t.model for t in local))]
        made.max_positions = min((limit for limit in limits if limit is not None), default=None)
        longest = made.max_positions
        made._probe(
            partial(probe, student, vocab_size=vocab_size, where="model", max_length=longest)
        )
        for teacher in local:
            made._probe(partial(teacher.probe, f"teachers.{teacher.name}", max_length=longest))
        return made

    def _probe(self, run: Any) -> None:
        try:
            run()
        except ModelError as error:
            # Exact on single documents: accepted until a window holds two.
            run(packed=False)
            self.leaks.append(error)

    def __call__(self, batch: Batch) -> None:
        """Check a batch, at the cost of one synchronization.

        Raises:
            DataError: an id or a position is out of range.
            ModelError: a window holds several documents, which a model does not keep apart.
        """
        ids_BT, labels_BT, positions_BT = batch.input_ids, batch.labels, batch.position_ids
        is_label_BT = labels_BT != IGNORE
        starts_BT = (positions_BT == 0) & (batch.sample_ids >= 0)
        facts = [
            ids_BT.amin(),
            ids_BT.amax(),
            labels_BT.where(is_label_BT, 0).amin(),
            labels_BT.where(is_label_BT, 0).amax(),
            positions_BT.amax() + 1,
            starts_BT[:, 1:].any().long(),
        ]
        if ids_BT.numel() == 0:
            return
        low, high, low_label, high_label, length, is_packed = torch.stack(facts).tolist()
        for name, least, most in (("input_ids", low, high), ("labels", low_label, high_label)):
            if least < 0 or most >= self.vocab_size:
                raise DataError(
                    f"batch.{name}: got the id {least if least < 0 else most}; must be from 0 to "
                    f"{self.vocab_size - 1}; encode the data with the student's tokenizer"
                )
        if self.max_positions is not None and length > self.max_positions:
            raise DataError(
                f"batch.input_ids: got a document of {length} tokens; must be at most "
                f"{self.max_positions}, the smallest max_position_embeddings of the models; "
                "shorten it"
            )
        if is_packed and self.leaks:
            raise ModelError(f"{self.leaks[0]}; or put one document into each window")

    def require_targets(self, num_rows: Tensor, num_steps: int) -> None:
        """Check that one of the first `num_steps` steps has a target, given those of a step.

        Raises:
            DataError: none has one.
        """
        if self._num_empty_steps is None:
            return
        if int(num_rows) > 0:
            self._num_empty_steps = None
            return
        self._num_empty_steps += 1
        if self._num_empty_steps == num_steps:
            raise DataError(
                f"train_dataset: got no target in the first {num_steps} steps (all labels are "
                f"{IGNORE}, or start a document); must have some; check the collator, the chat "
                "template and truncation"
            )


def _max_positions(model: PreTrainedModel) -> int | None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (positions, rope_limit(model.config)) if isinstance(n, int) and n > 0]
    return min(limits, default=None)
