"""A recipe to start from, for models and text that exist."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collegium.config.yaml import yaml_writer
from collegium.errors import RecipeError
from collegium.models.options import ModelOptions

MAX_LENGTH = 1024
"""Tokens per window, unless a model has fewer positions."""
HEADER = """\
# Next: `collegium check {path}`, then `collegium preflight {path}`, then `collegium run {path}`.
# `collegium options` explains all keys.
"""


def starter_recipe(
    path: Path,
    *,
    teachers: Sequence[str],
    data: Sequence[str],
    student: str | None = None,
    student_from: str | None = None,
) -> str:
    """Return the YAML of a recipe with these teachers and text.

    Args:
        path: the file that it is written to.
        teachers: folders or hub ids.
        data: files, globs or folders of text.
        student: a folder or hub id to start from.
        student_from: one of the teachers, of which the student gets every other layer.

    Raises:
        RecipeError: a part is missing, or there are two students.
        ModelError: the config of a model cannot be loaded.
    """
    if not teachers or not data:
        raise RecipeError(
            f"init: got {len(teachers)} teachers and {len(data)} sources of text; must have both; "
            "repeat --teacher and --data for each"
        )
    if (student is None) == (student_from is None):
        raise RecipeError(
            "init: got both --student and --student-from, or none; must have one; --student names "
            "a model, --student-from a teacher of which it gets every other layer"
        )
    names = _names(teachers)
    if student_from is not None and student_from not in {*teachers, *names}:
        raise RecipeError(
            f"init: --student-from: got {student_from}; must be a teacher: {', '.join(teachers)}"
        )
    models = [*teachers, *([student] if student else [])]
    limits = [ModelOptions(model=one).max_length(f"init: {one}") for one in models]
    start: dict[str, Any] = {"model": student}
    if student_from is not None:
        number = (
            names.index(student_from) if student_from in names else teachers.index(student_from)
        )
        config = ModelOptions(model=teachers[number]).load_config(f"init: {teachers[number]}")
        keep = max(1, config.get_text_config().num_hidden_layers // 2)
        start = {"from_layers": {"teacher": names[number], "keep": keep}}
    values = {
        "student": start,
        "teachers": {name: {"model": one} for name, one in zip(names, teachers, strict=True)},
        "data": {
            "train": [{"path": source} for source in data],
            "max_length": min([MAX_LENGTH, *(limit for limit in limits if limit is not None)]),
        },
        "fusion": "auto",
        "train": {"learning_rate": 1e-4, "num_train_epochs": 1},
        "evaluate": {"controls": ["ce_only", "best_single"]},
    }
    stream = io.StringIO()
    yaml_writer().dump(values, stream)
    return HEADER.format(path=path) + stream.getvalue()


def _names(teachers: Sequence[str]) -> list[str]:
    """Return a name for each teacher: the last part of its path, numbered where it repeats."""
    names: list[str] = []
    for teacher in teachers:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(teacher).name).strip("-") or "teacher"
        count = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{count + 1}" if name in names else name)
    return names
