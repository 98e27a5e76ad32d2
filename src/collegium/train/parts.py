"""What a trainer is made of: sound arguments, the size of the vocabulary, teachers with names, a default loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from collegium.errors import TrainingError
from collegium.fusion.pooling import Fusion
from collegium.teachers.local import LocalTeacher
from collegium.train.objective import Objective, ObjectiveOptions
from collegium.types import Teacher

LiveTeachers = Sequence[Teacher | PreTrainedModel] | Mapping[str, Teacher | PreTrainedModel]


def adopt_arguments(args: TrainingArguments) -> None:
    """Refuse what would go wrong without a word, and set what this trainer cannot do without."""
    problems = [
        (args.world_size > 1, "world_size", args.world_size, "1; start a single process"),
        (args.n_gpu > 1, "n_gpu", args.n_gpu, "at most 1; set CUDA_VISIBLE_DEVICES to one device"),
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
    for is_wrong, name, value, wanted in problems:
        if is_wrong:
            raise TrainingError(f"{name}: got {value}; must be {wanted}")
    args.remove_unused_columns = False
    args.logging_nan_inf_filter = False
    if args.data_seed is None:
        # The order of the data must not depend on who drew random numbers before.
        args.data_seed = args.seed


def vocabulary_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is not None:
        return max(tokenizer.get_vocab().values()) + 1
    return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[union-attr]


def named_teachers(
    teachers: LiveTeachers, student: PreTrainedModel, vocab_size: int, device: torch.device
) -> list[Teacher]:
    """Wrap live models; everything else already answers for itself."""
    if isinstance(teachers, Mapping):
        pairs = list(teachers.items())
    else:
        pairs = [
            (f"teacher_{i}" if isinstance(teacher, PreTrainedModel) else teacher.name, teacher)
            for i, teacher in enumerate(teachers)
        ]
    found: list[Teacher] = []
    for name, teacher in pairs:
        if isinstance(teacher, PreTrainedModel):
            teacher.to(device)  # type: ignore[arg-type]
            teacher = LocalTeacher(name, teacher, vocab_size=vocab_size, student=student)
        if teacher.name != name or name in [known.name for known in found]:
            raise TrainingError(
                f"teachers: got the name `{name}` for {teacher.name}; must be one name for each; rename it"
            )
        found.append(teacher)
    return found


def default_objective(teachers: Sequence[Teacher]) -> Objective:
    return Objective(ObjectiveOptions(), Fusion() if teachers else None)
