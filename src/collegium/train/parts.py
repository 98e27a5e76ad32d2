"""Defaults and checks of `DistillTrainer`: arguments, vocabulary, named teachers, objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from collegium.distributions import Teacher
from collegium.errors import TrainingError
from collegium.fusion.fuse import Fusion
from collegium.teachers.local import LocalTeacher
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions

LiveTeachers = Sequence[Teacher | PreTrainedModel] | Mapping[str, Teacher | PreTrainedModel]


def adopt_arguments(args: TrainingArguments) -> None:
    """Set the arguments that this trainer depends on, and refuse those that it does not support.

    Raises:
        TrainingError: an argument has an unsupported value.
    """
    problems = [
        (args.n_gpu > 1, "n_gpu", args.n_gpu, "at most 1; set CUDA_VISIBLE_DEVICES to one device"),
        (bool(args.fsdp), "fsdp", args.fsdp, "empty; wrap `DistillStep` in your own loop"),
        (args.deepspeed is not None, "deepspeed", "a config", "None; use DDP"),
        (args.fp16, "fp16", args.fp16, "False; use bf16"),
        (
            args.label_smoothing_factor != 0,
            "label_smoothing_factor",
            args.label_smoothing_factor,
            "0",
        ),
        (args.load_best_model_at_end, "load_best_model_at_end", True, "False; use the checkpoints"),
        (args.save_total_limit == 1, "save_total_limit", 1, "at least 2, in case one is damaged"),
    ]
    for is_wrong, name, value, expected in problems:
        if is_wrong:
            raise TrainingError(f"{name}: got {value}; must be {expected}")
    # Our collator needs columns that the student's `forward` does not take.
    args.remove_unused_columns = False
    # The filter would hide a NaN from the log; a step that is not finite is refused instead.
    args.logging_nan_inf_filter = False
    if args.data_seed is None:
        # The order of the data must not depend on other users of the global generators.
        args.data_seed = args.seed


def vocabulary_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """V: the largest token id + 1, else the rows of the student's head."""
    if tokenizer is not None:
        return max(tokenizer.get_vocab().values()) + 1
    return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[union-attr]


def named_teachers(
    teachers: LiveTeachers, student: PreTrainedModel, vocab_size: int, device: torch.device
) -> list[Teacher]:
    """Wrap models as `LocalTeacher`, named by their key or `teacher_0`, ...

    Raises:
        TrainingError: two teachers share a name, or a key differs from the teacher's own name.
    """
    if isinstance(teachers, Mapping):
        pairs = list(teachers.items())
    else:
        pairs = [
            (f"teacher_{i}" if isinstance(teacher, PreTrainedModel) else teacher.name, teacher)
            for i, teacher in enumerate(teachers)
        ]
    named: list[Teacher] = []
    for name, teacher in pairs:
        if isinstance(teacher, PreTrainedModel):
            teacher.to(device)  # type: ignore[arg-type]
            teacher = LocalTeacher(name, teacher, vocab_size=vocab_size, student=student)
        if teacher.name != name or name in [other.name for other in named]:
            raise TrainingError(
                f"teachers: got the name `{name}` for {teacher.name}; must be one name for each; "
                "rename it"
            )
        named.append(teacher)
    return named


def default_objective(teachers: Sequence[Teacher]) -> Objective:
    """0.9 forward KL to the linear pool under prefix likelihood, and 0.1 CE."""
    return Objective(ObjectiveOptions(), Fusion() if teachers else None)
