"""A recipe to start from, for models and text that exist, with or without another recipe."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from collegium.config.recipe import decode_recipe
from collegium.config.yaml import read_text, yaml_writer
from collegium.errors import RecipeError, first_line
from collegium.models.options import ModelOptions

MAX_LENGTH = 1024
"""Tokens per window, unless a model has fewer positions."""
DEFAULTS: dict[str, Any] = {
    "student": {},
    "teachers": {},
    "data": {},
    "fusion": "auto",
    "train": {"learning_rate": 1e-4, "num_train_epochs": 1},
    "evaluate": {"controls": ["ce_only", "best_single"]},
}
"""The recipe without a base, in the order of its keys."""
TRAINING = ("dtype", "device", "attention", "vocabulary", "lora", "gradient_checkpointing")
"""Options of a student that do not depend on the model that it starts from."""
HEADER = """\
# Next: `collegium check {path}`, then `collegium preflight {path}`, then `collegium run {path}`.
# `collegium options` explains all keys.
"""


def starter_recipe(
    path: Path,
    *,
    teachers: Sequence[str] = (),
    data: Sequence[str] = (),
    student: str | None = None,
    student_from: str | None = None,
    base: str | None = None,
) -> str:
    """Return the YAML of a recipe with these teachers and text.

    Args:
        path: the file that it is written to.
        teachers: folders or hub ids.
        data: files, globs or folders of text.
        student: a folder or hub id to start from.
        student_from: one of the teachers, of which the student gets every other layer.
        base: a recipe file, or the name of a recipe in this package. Everything else comes from it.

    Raises:
        RecipeError: a part is missing, there are two students, or the parts do not fit the base.
        ModelError: the config of a model cannot be loaded.
    """
    if base is None and not (teachers and data):
        raise RecipeError(
            f"init: got {len(teachers)} teachers and {len(data)} sources of text; must have both; "
            "repeat --teacher and --data for each, or start from a recipe with --from"
        )
    num_students = (student is not None) + (student_from is not None)
    if num_students > 1 or (base is None and num_students == 0):
        raise RecipeError(
            "init: got both --student and --student-from, or none; must have one; --student names "
            "a model, --student-from a teacher of which it gets every other layer"
        )
    values = copy.deepcopy(DEFAULTS) if base is None else _read_base(base)
    before = set(values.get("teachers") or {})
    _set_models(values, teachers, student, student_from)
    if data:
        values["data"] = values.get("data") or {}
        for part in ("calibration", "validation"):
            values["data"].pop(part, None)
        values["data"]["train"] = [{"path": source} for source in data]
    models = [*teachers, *([student] if student else [])]
    limits = [ModelOptions(model=one).max_length(f"init: {one}") for one in models]
    length = values["data"].get("max_length", MAX_LENGTH)
    values["data"]["max_length"] = min([length, *(limit for limit in limits if limit is not None)])
    stream = io.StringIO()
    yaml_writer().dump(values, stream)
    text = stream.getvalue()
    if base is None:
        return HEADER.format(path=path) + text
    try:
        decode_recipe(text, path.name)
    except RecipeError as error:
        gone = ", ".join(sorted(before - set(values.get("teachers") or {})))
        hint = f"; it names teachers of the base ({gone})" if gone else ""
        raise RecipeError(f"init: --from {base}: does not fit{hint}:\n{error}") from error
    return text


def _read_base(base: str) -> dict[str, Any]:
    """Read a recipe with its comments, without its name and its folder, which stay its own."""
    file, shipped = Path(base), shipped_recipes()
    files = [one for one in (file, file.with_name(f"{file.name}.yaml")) if one.is_file()]
    if not files and file.name.removesuffix(".yaml") not in shipped:
        raise RecipeError(
            f"init: --from: got {base}; must be a recipe file, or one of {', '.join(shipped)}"
        )
    text = read_text(files[0]) if files else shipped[file.name.removesuffix(".yaml")]
    try:
        values = yaml_writer().load(text)
    except YAMLError as error:
        raise RecipeError(f"init: --from: {base} is no YAML ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise RecipeError(f"init: --from: {base} must be a recipe, a mapping of keys")
    for key in ("name", "output_dir"):
        values.pop(key, None)
    return values


def shipped_recipes() -> dict[str, str]:
    """Return the text of each recipe in the package by name."""
    entries = (one for one in files("collegium.demo").iterdir() if one.name.endswith(".yaml"))
    texts = {one.name.removesuffix(".yaml"): one.read_text(encoding="utf-8") for one in entries}
    return dict(sorted(texts.items()))


def _set_models(
    values: dict[str, Any], teachers: Sequence[str], student: str | None, student_from: str | None
) -> None:
    if teachers:
        named = zip(_names(teachers), teachers, strict=True)
        values["teachers"] = {name: {"model": one} for name, one in named}
    models = {name: one["model"] for name, one in (values.get("teachers") or {}).items()}
    kept = {k: v for k, v in (values.get("student") or {}).items() if k in TRAINING}
    if student is not None:
        values["student"] = {"model": student, **kept}
    elif student_from is not None:
        matches = [name for name, model in models.items() if student_from in (name, model)]
        if not matches:
            raise RecipeError(
                f"init: --student-from: got {student_from}; must be a teacher: "
                f"{', '.join(models.values())}"
            )
        config = ModelOptions(model=models[matches[0]]).load_config(f"init: {models[matches[0]]}")
        keep = max(1, config.get_text_config().num_hidden_layers // 2)
        values["student"] = {"from_layers": {"teacher": matches[0], "keep": keep}, **kept}
    elif teachers and "config" in values["student"]:
        # Random weights have no tokenizer of their own, and the teachers share one.
        values["student"]["tokenizer"] = teachers[0]


def _names(teachers: Sequence[str]) -> list[str]:
    """Return a name for each teacher: the last part of its path, numbered where it repeats."""
    names: list[str] = []
    for teacher in teachers:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(teacher).name).strip("-") or "teacher"
        count = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{count + 1}" if name in names else name)
    return names
