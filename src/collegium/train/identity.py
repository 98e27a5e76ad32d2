"""Identity of a run from live objects: digests of weights and data, and options as plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from collegium.data.windows import PackedDataset
from collegium.distributions import Teacher
from collegium.fusion.options import to_recipe
from collegium.models.adapters import trained_adapters
from collegium.options import plain
from collegium.storage.files import fingerprint
from collegium.teachers.local import LocalTeacher
from collegium.train import state
from collegium.train.arguments import arguments_identity
from collegium.train.objective import Objective
from collegium.train.step import DistillStep

SPEED_ONLY = ("block_size", "block_megabytes", "backend")
"""Options of the objective that change no number beyond rounding."""
WITHOUT_EFFECT = ("_name_or_path", "transformers_version", "use_cache")
"""Keys of a config that do not change the outputs."""
DIGITS = 16
"""Length of a digest: 64 bits, short enough for a message."""
_MAX_ROWS = 64


def run_identity(
    step: DistillStep,
    args: TrainingArguments,
    dataset: Any,
    identity: Mapping[str, str],
    weights: Mapping[str, str | None],
) -> dict[str, Any]:
    """Return everything that a checkpoint and the run that resumes it must share.

    `identity` has digests of more, such as `teacher NAME` for the files of a teacher, whose weights
    are not read again. `weights` are the identities of teachers that can no longer be read.
    """
    unknown = [t for t in step.teachers if f"teacher {t.name}" not in identity]
    return {
        **identity,
        "seed": args.seed,
        "student": frozen_digest(step.student),
        "teachers": [teacher.name for teacher in step.teachers],
        "weights": {
            teacher.name: weights.get(teacher.name) or teacher_identity(teacher)
            for teacher in unknown
        },
        "vocab_size": step.vocab_size,
        "windows_per_step": args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size,
        **arguments_identity(args),
        "data": data_identity(dataset),
        **objective_identity(step.objective),
    }


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the start of the SHA-256 of named tensors: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:DIGITS]


def frozen_digest(student: nn.Module) -> str | None:
    """Return the digest of the parameters that are not trained, None if all are."""
    frozen = [(name, p) for name, p in student.named_parameters() if not p.requires_grad]
    return tensors_digest(frozen) if frozen else None


def teacher_identity(teacher: Teacher) -> str | None:
    """Return the digest of a live teacher, None for one whose answers come from elsewhere."""
    if not isinstance(teacher, LocalTeacher):
        return None
    model = teacher.model
    others = {*getattr(model, "peft_config", {})} - {teacher.adapter}
    if teacher.adapter is None:
        others -= {*trained_adapters(model)}
    weights = tensors_digest(
        (name, tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not others & {*name.split(".")}
    )
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in WITHOUT_EFFECT}
    return fingerprint([weights, config, teacher.logit_scale, teacher.vocab_size])[:DIGITS]


def objective_identity(objective: Objective) -> dict[str, Any]:
    """Return the options of the loss and of its fusion as plain data."""
    options = {k: v for k, v in plain(objective.options).items() if k not in SPEED_ONLY}
    # By number, so that a message can name the option that differs.
    options["terms"] = {str(number): term for number, term in enumerate(options["terms"] or ())}
    fusion = objective.fusion
    return {"objective": options, "fusion": None if fusion is None else plain(to_recipe(fusion))}


def data_identity(dataset: Any) -> Any:
    """Return the fingerprint of packed windows, else the number of rows and a digest of some.

    None for a stream. Rows that differ between two readings, as augmented ones do, have no digest.
    """
    if isinstance(dataset, PackedDataset):
        return dataset.fingerprint
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return None
    size = len(dataset)
    numbers = range(0, size, max(1, -(-size // _MAX_ROWS)))
    # Reading a row must not change the random numbers of the run.
    generators = state.rng_state()
    first, second = (fingerprint([_plain(dataset[i]) for i in numbers]) for _ in range(2))
    state.load_rng_state(generators)
    return {"num_rows": size, "rows": first[:DIGITS] if first == second else None}


def _plain(value: Any) -> Any:
    """Return an item of a dataset as plain lists and numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value
