"""`train.max_steps=10` on the command line: one value of a recipe, set before the recipe is decoded."""

from __future__ import annotations

from typing import Any

from collegium.errors import RecipeError
from collegium.yaml12 import Document, KeyPath, dotted, read_yaml


def apply_override(document: Document, override: str) -> None:
    """Set one value of a recipe from the command line; the path is checked when the whole is decoded.

    Raises:
        RecipeError: not of the form KEY=VALUE, or a path through something that has no such part.
    """
    label = f"override `{override}`"
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"{label}: must be KEY=VALUE, for example train.max_steps=10")
    value = read_yaml(text, label)
    if value.problems:
        raise RecipeError(f"{label}: {value.problems[0].text}")
    target: Any = document.data
    path: KeyPath = ()
    for part in parts[:-1]:
        step = _step(target, part, path, label)
        path = (*path, step)
        if isinstance(target, dict) and target.get(step) is None:
            target[step] = {}
            document.origins[path] = (0, label)
        target = target[step]
    last = _step(target, parts[-1], path, label)
    target[last] = value.data
    path = (*path, last)
    for old in [o for o in document.origins if o[: len(path)] == path]:
        del document.origins[old]
    document.forget(path)
    document.origins[path] = (0, label)


def _step(target: Any, part: str, path: KeyPath, label: str) -> Any:
    if isinstance(target, dict):
        return part
    if isinstance(target, list):
        if part.isdecimal() and int(part) < len(target):
            return int(part)
        raise RecipeError(
            f"{label}: {dotted(path)} has {len(target)} items; the next key must be the number of one, from 0"
        )
    raise RecipeError(f"{label}: {dotted(path)} is `{target}`, not a mapping; set it as a whole")
